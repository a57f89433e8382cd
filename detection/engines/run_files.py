"""The checkpoints of a training run: model_0000999.pth ... and model_final.pth, with manifests.

Names are Detectron2's (fvcore/common/checkpoint.py), `last_checkpoint` holds the name of the
newest one. The contents beside `IDENTITY` are the engine's own.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

from detection.engines.base import BEST_MODEL, FINAL_MODEL, PERIODIC_MODELS, Run
from detection.run_folder import read_config
from moco.errors import CheckpointError
from moco.training.checkpoint import (
    manifest_path,
    read_json,
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
        "changes": run.changes.all(),
        **(run.identity.facts() if run.identity else {}),
    }
    save_checkpoint(path, {**content, **identity}, **identity, **fields)
    if path.name == BEST_MODEL:  # no state to resume from
        return
    write_text_atomic(run.output_dir / "last_checkpoint", path.name)
    _remove_old(run.output_dir)


def read_state(run: Run, path: Path, *, engine: str, keys: tuple[str, ...]) -> dict:
    """The content of a checkpoint of this run. What differs and may is noted in `run.changes`.

    Args:
        keys: what the engine's checkpoints hold.
    Raises: CheckpointError where it belongs to another engine, configuration or seed.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not {*keys, "iteration"} <= content.keys():
        raise CheckpointError(f"{path}: is not a checkpoint of a training run of this engine")
    wanted = {"seed": run.seed, "engine": engine}
    if run.identity is None:
        wanted["config_digest"] = run.config_digest
    for name, value in wanted.items():
        if content.get(name) != value:
            raise CheckpointError(
                f"{path}: has {name} {content.get(name)}, this run has {value}; give the settings "
                "it was started with, or another OUTPUT_DIR"
            )
    num_done = content["iteration"] + 1
    differences = {}
    if run.identity is not None:
        config = read_config(path.parent)
        differences = run.identity.check(path, {"config": config, **content}, run.changes.allowed)
    made = run.changes.add(num_done, content.get("changes", []), differences)
    if run.process.is_main and run.progress:
        for line in made:
            print(f"{line} ({path.parent})", flush=True)
    return content


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """First rates, decay, momentum and the like stay the configuration's, as they may be changed.

    Raises: RuntimeError, ValueError where the state does not fit.
    """
    of_state = ("params", "lr")  # the rate is that of the last iteration
    settings = [{k: v for k, v in g.items() if k not in of_state} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def newest_state(output_dir: Path, num_iterations: int) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were refused.

    The final model comes before the checkpoint of the same iteration. Where the run is to have
    more iterations it comes after that, whose random generators precise batch norm has not used.
    """
    refused = []
    final, num_done = output_dir / FINAL_MODEL, iterations_done(output_dir / FINAL_MODEL)
    is_last = num_done is None or num_done >= num_iterations
    candidates = [(_iteration(path) + 1, 0, path) for path in _periodic(output_dir)]
    candidates.append((math.inf if num_done is None else num_done, 1 if is_last else -1, final))
    for _, _, path in sorted(candidates, reverse=True):
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


def _iteration(path: Path) -> int:
    return int(_NUMBER.match(path.name)[1])


def iterations_done(path: Path) -> int | None:
    """What the manifest of a checkpoint says; None where it cannot be read or does not say it."""
    try:
        iteration = read_json(manifest_path(path)).get("iteration")
    except (AttributeError, CheckpointError, OSError):
        return None
    return iteration + 1 if type(iteration) is int else None


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
