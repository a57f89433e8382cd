"""What a run's folder may hold: one run, of one configuration, engine and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from detection.engines.base import FINAL_MODEL, PERIODIC_MODELS
from moco.cfgnode import CfgNode, digest, flatten, to_dict
from moco.errors import CheckpointError
from moco.safe_yaml import read_yaml
from moco.training.checkpoint import MANIFEST_SUFFIX, read_json, write_json_atomic

RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"
CLASSES_FILE = "classes.json"
# They change no number, or (seed, weights) are compared by themselves.
NOT_IN_DIGEST = (
    "OUTPUT_DIR",
    "SEED",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.PROGRESS_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
    "LOG.TENSORBOARD",
    "MODEL.WEIGHTS",
)
_NUM_DIFFERENCES_SHOWN = 5


def run_digest(cfg: CfgNode, weights_sha256: str | None, engine: str) -> str:
    """16 hex digits that identify the configuration and the content of the initial weights."""
    left_out = _not_in_digest(cfg, engine)
    if cfg.MODEL.COMPILE == "eager":  # runs of before the key go on
        left_out += ("MODEL.COMPILE",)
    text = f"{digest(cfg, left_out)} {weights_sha256}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _not_in_digest(cfg: CfgNode, engine: str) -> tuple[str, ...]:
    # The stream of Detectron2 depends on the number of its workers.
    replayed = "detectron2" in (engine, cfg.DATALOADER.STREAM)
    return tuple(k for k in NOT_IN_DIGEST if not (replayed and k == "DATALOADER.NUM_WORKERS"))


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
                    what = _differences(folder, cfg, engine)
                raise CheckpointError(
                    f"{path}: belongs to another run ({what}); runs are not mixed: give another "
                    "OUTPUT_DIR, or the settings of that run"
                )


def write_class_names(folder: Path, class_names: Sequence[str]) -> None:
    """classes.json: what the numbers of a model's classes mean, where its data may be gone."""
    write_json_atomic(folder / CLASSES_FILE, {"class_names": list(class_names)})


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """The class names of the run in a folder; None where nothing there tells them.

    Raises: CheckpointError for a damaged file.
    """
    path = folder / CLASSES_FILE
    if path.is_file():
        names = _field(path, "class_names", list)
        if names is None or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: needs a list of names 'class_names'; restore it")
        return tuple(names)
    # Results of before classes.json: scores by class, in the order of the classes.
    path = folder / RESULT_FILE
    per_class = _field(path, "per_class", dict) if path.is_file() else None
    return tuple(per_class) if per_class else None


def _field(path: Path, name: str, kind: type) -> object:
    content = read_json(path)
    value = content.get(name) if isinstance(content, dict) else None
    return value if isinstance(value, kind) else None


def changed_keys(
    there: Mapping, here: Mapping, ignored: Sequence[str] = NOT_IN_DIGEST
) -> dict[str, tuple[object, object]]:
    """Dotted key -> (value there, value here) where two configurations' trees differ; None for a
    key that one of them does not have."""
    there, here = flatten(there), flatten(here)
    keys = [key for key in sorted(there.keys() | here.keys()) if key not in ignored]
    return {k: (there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)}


def _identities(folder: Path) -> Iterator[tuple[Path, dict]]:
    manifests = (f"{name}{MANIFEST_SUFFIX}" for name in (FINAL_MODEL, PERIODIC_MODELS))
    for pattern in (RESULT_FILE, *manifests):
        for path in sorted(folder.glob(pattern)):
            content = read_json(path)
            if not isinstance(content, dict):
                raise CheckpointError(f"{path}: holds no mapping; remove or restore it")
            yield path, content


def _differences(folder: Path, cfg: CfgNode, engine: str) -> str:
    path = folder / CONFIG_FILE
    if not path.is_file():
        return "its config.yaml is missing, its config digest differs"
    there = read_yaml(path)
    changed = changed_keys(there, to_dict(cfg), ignored=_not_in_digest(cfg, engine))
    found = [f"{key} {old} there, {new} now" for key, (old, new) in changed.items()]
    if not found:
        return "the content of MODEL.WEIGHTS differs"
    rest = len(found) - _NUM_DIFFERENCES_SHOWN
    return "; ".join(found[:_NUM_DIFFERENCES_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
