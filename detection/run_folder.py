"""What a run's folder may hold: one run, of one configuration, engine and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from detection.engines.base import FINAL_MODEL, PERIODIC_MODELS
from moco.cfgnode import CfgNode, digest, flatten, to_dict
from moco.errors import CheckpointError
from moco.training.checkpoint import MANIFEST_SUFFIX, read_json

RESULT_FILE = "result.json"
# They change no number, or (seed, weights) are compared by themselves.
NOT_IN_DIGEST = (
    "OUTPUT_DIR",
    "SEED",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.PROGRESS_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
    "MODEL.WEIGHTS",
)
_NUM_DIFFERENCES_SHOWN = 5


def run_digest(cfg: CfgNode, weights_sha256: str | None) -> str:
    """16 hex digits that identify the configuration and the content of the initial weights."""
    text = f"{digest(cfg, NOT_IN_DIGEST)} {weights_sha256}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def holds_a_run(folder: Path) -> bool:
    """Whether the folder has a result or a checkpoint, finished or not."""
    names = (RESULT_FILE, FINAL_MODEL, PERIODIC_MODELS)
    return any(path for name in names for path in folder.glob(name))


def refuse_other_run(
    folder: Path, cfg: CfgNode, engine: str, config_digest: str, seed: int
) -> None:
    """Raise CheckpointError if the folder's result or checkpoints belong to another run."""
    wanted = {"engine": engine, "config_digest": config_digest, "seed": seed}
    for path, found in _identities(folder):
        for name, value in wanted.items():
            if found.get(name) != value:
                what = f"{name} {found.get(name)} there, {value} now"
                if name == "config_digest":
                    what = _differences(folder, cfg)
                raise CheckpointError(
                    f"{path}: belongs to another run ({what}); runs are not mixed: give another "
                    "OUTPUT_DIR, or the settings of that run"
                )


def _identities(folder: Path) -> Iterator[tuple[Path, dict]]:
    manifests = (f"{name}{MANIFEST_SUFFIX}" for name in (FINAL_MODEL, PERIODIC_MODELS))
    for pattern in (RESULT_FILE, *manifests):
        for path in sorted(folder.glob(pattern)):
            content = read_json(path)
            if not isinstance(content, dict):
                raise CheckpointError(f"{path}: holds no mapping; remove or restore it")
            yield path, content


def _differences(folder: Path, cfg: CfgNode) -> str:
    path = folder / "config.yaml"
    if not path.is_file():
        return "its config.yaml is missing, its config digest differs"
    there = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    here = flatten(to_dict(cfg))
    keys = [k for k in sorted(there.keys() | here.keys()) if k not in NOT_IN_DIGEST]
    found = [
        f"{k} {there.get(k)} there, {here.get(k)} now" for k in keys if there.get(k) != here.get(k)
    ]
    if not found:
        return "the content of MODEL.WEIGHTS differs"
    rest = len(found) - _NUM_DIFFERENCES_SHOWN
    return "; ".join(found[:_NUM_DIFFERENCES_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
