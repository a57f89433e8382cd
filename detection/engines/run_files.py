"""The checkpoints of a training run: model_0000999.pth ... and model_final.pth, with manifests.

Names are Detectron2's (fvcore/common/checkpoint.py), `last_checkpoint` holds the name of the
newest one. The contents beside `IDENTITY` are the engine's own.
"""

from __future__ import annotations

import re
from pathlib import Path

from detection.engines.base import BEST_MODEL, FINAL_MODEL, PERIODIC_MODELS, Run
from moco.errors import CheckpointError
from moco.training.checkpoint import (
    read_torch_file,
    remove_checkpoint,
    save_checkpoint,
    verify_manifest,
    write_text_atomic,
)

NUM_KEPT = 2
_NUMBER = re.compile(r"^model_(\d{7})\.pth$")


def periodic_path(output_dir: Path, iteration: int) -> Path:
    """The checkpoint of the state after `iteration` (0-based) was done."""
    return output_dir / f"model_{iteration:07d}.pth"


def write_state(
    run: Run, path: Path, content: dict, *, iteration: int, engine: str, **fields: object
) -> None:
    """Write one checkpoint (call it on rank 0 only) and remove older ones but `NUM_KEPT`.

    Args:
        fields: more of the manifest.
    """
    identity = {
        "iteration": iteration,
        "config_digest": run.config_digest,
        "seed": run.seed,
        "engine": engine,
    }
    save_checkpoint(path, {**content, **identity}, **identity, **fields)
    if path.name == BEST_MODEL:  # no state to resume from
        return
    write_text_atomic(run.output_dir / "last_checkpoint", path.name)
    _remove_old(run.output_dir)


def read_state(run: Run, path: Path, *, engine: str, keys: tuple[str, ...]) -> dict:
    """The content of a checkpoint of this run.

    Args:
        keys: what the engine's checkpoints hold.
    Raises: CheckpointError where it belongs to another engine, configuration or seed.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not {*keys, "iteration"} <= content.keys():
        raise CheckpointError(f"{path}: is not a checkpoint of a training run of this engine")
    wanted = {"config_digest": run.config_digest, "seed": run.seed, "engine": engine}
    for name, value in wanted.items():
        if content.get(name) != value:
            raise CheckpointError(
                f"{path}: has {name} {content.get(name)}, this run has {value}; give the settings "
                "it was started with, or another OUTPUT_DIR"
            )
    return content


def newest_state(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were refused."""
    refused = []
    final = output_dir / FINAL_MODEL
    for path in [final, *_periodic(output_dir)]:
        if not path.exists():
            continue
        try:
            verify_manifest(path)
            return path, refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def _periodic(output_dir: Path) -> list[Path]:
    """Newest first, by the iteration in the name."""
    found = [path for path in output_dir.glob(PERIODIC_MODELS) if _NUMBER.match(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _remove_old(output_dir: Path) -> None:
    num_verified = 0
    for path in _periodic(output_dir):
        if num_verified == NUM_KEPT:
            remove_checkpoint(path)
            continue
        try:
            verify_manifest(path)
            num_verified += 1
        except CheckpointError:
            continue  # it does not count; `newest_state` names it when it would be needed
