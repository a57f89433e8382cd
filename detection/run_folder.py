"""What a run's folder may hold: one run, of one configuration, engine and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detection.engines.base import FINAL_MODEL, PERIODIC_MODELS
from moco.cfgnode import CfgNode, digest, flatten, to_dict
from moco.data.rgb import FULL_RANGE
from moco.errors import CheckpointError
from moco.safe_yaml import read_yaml
from moco.training.checkpoint import MANIFEST_SUFFIX, read_json, write_json_atomic

if TYPE_CHECKING:
    from detection.run_identity import RunIdentity

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
    "INPUT.MAX_IMAGE_PIXELS",
)
# Where the data lie: what they are is compared by its fingerprint.
DATA_PLACES = ("DATASETS.VOC_ROOT", "DATASETS.COCO_FILES")
# In the digest only where they differ from this, so that runs of before the key go on.
_YOUNGER_KEYS = {
    "MODEL.COMPILE": "eager",
    "MODEL.RESET_PREDICTORS": False,
    "INPUT.SIXTEEN_BIT_RANGE": list(FULL_RANGE),
}


def run_digest(
    cfg: CfgNode, weights_sha256: str | None, engine: str, places: Mapping | None = None
) -> str:
    """16 hex digits that identify the configuration and the content of the initial weights.

    Args:
        places: values of `DATA_PLACES` that count, as all did before runs knew their data; else
            none counts.
    """
    left_out = not_in_digest(cfg, engine)
    values = flatten(to_dict(cfg))
    left_out += tuple(k for k, default in _YOUNGER_KEYS.items() if values[k] == default)
    placed = cfg.clone()
    placed.defrost()
    places = {"DATASETS.VOC_ROOT": "", "DATASETS.COCO_FILES": [], **(places or {})}
    placed.DATASETS.update({key.rpartition(".")[2]: value for key, value in places.items()})
    text = f"{digest(placed, left_out)} {weights_sha256}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def not_in_digest(cfg: CfgNode, engine: str) -> tuple[str, ...]:
    # The stream of Detectron2 depends on the number of its workers.
    replayed = "detectron2" in (engine, cfg.DATALOADER.STREAM)
    return tuple(k for k in NOT_IN_DIGEST if not (replayed and k == "DATALOADER.NUM_WORKERS"))


def holds_a_run(folder: Path) -> bool:
    """Whether the folder has a result or a checkpoint, finished or not."""
    names = (RESULT_FILE, FINAL_MODEL, PERIODIC_MODELS)
    return any(path for name in names for path in folder.glob(name))


@dataclass(frozen=True)
class FolderState:
    """What a folder holds of the run that is to go on in it.

    Attributes:
        result: the result of a finished run to which there is nothing left to train, else None.
        differences: name -> (then, now) of what differs and may.
        lines: what the user should know.
    """

    result: dict | None
    differences: dict[str, tuple[object, object]]
    lines: tuple[str, ...]


def examine_folder(
    folder: Path, identity: RunIdentity, seed: int, allowed: Collection[str] = ()
) -> FolderState:
    """Compare the folder's result and checkpoints with the run that is to go on there.

    Args:
        allowed: names of configuration keys, and "data", that may differ.
    Raises: CheckpointError where they belong to another run.
    """
    config = read_config(folder)
    names = read_class_names(folder)
    manifests = sorted(_manifests(folder), key=lambda found: _iterations(found[1]), reverse=True)
    num_done = _iterations(manifests[0][1]) if manifests else 0
    differences, is_known = {}, True
    for number, (where, found) in enumerate(manifests):
        _refuse_other(where, found, identity, seed)
        if number and manifests[0][1].get("changes"):
            continue  # it may be of before them
        found = {"config": config, "class_names": names, **found}
        differences.update(identity.check(where, found, allowed))
        is_known = is_known and "data" in found
    path, result = folder / RESULT_FILE, None
    if path.is_file():
        found = _mapping(path)
        _refuse_other(path, found, identity, seed)
        of_result = identity.check(path, {"config": config, "class_names": names, **found}, allowed)
        differences.update(of_result)
        is_known = is_known and "data" in found
        goes_on = of_result and 0 < num_done < identity.cfg.SOLVER.MAX_ITER
        if found.get("status") == "finished" and not goes_on:
            result, differences = found, of_result
    lines = () if is_known else (
        f"{folder}: was started before runs kept a fingerprint of their data, so whether it was on "
        "these data is unknown",
    )  # fmt: skip
    return FolderState(result, differences, lines)


def read_config(folder: Path) -> dict | None:
    """The tree of a folder's config.yaml, None without one."""
    path = folder / CONFIG_FILE
    return read_yaml(path) if path.is_file() else None


def set_result_aside(folder: Path) -> None:
    """Keep the result of a finished run under another name: it is to be trained on."""
    path = folder / RESULT_FILE
    if path.is_file() and _mapping(path).get("status") == "finished":
        number = 1 + sum(1 for _ in folder.glob("result_before_change_*.json"))
        path.rename(folder / f"result_before_change_{number}.json")


def _refuse_other(path: Path, found: Mapping, identity: RunIdentity, seed: int) -> None:
    for name, value in (("engine", identity.engine), ("seed", seed)):
        if found.get(name) != value:
            raise CheckpointError(
                f"{path}: belongs to another run ({name} {found.get(name)} there, {value} now); "
                "runs are not mixed: give another OUTPUT_DIR, or the settings of that run"
            )


def _iterations(manifest: Mapping) -> int:
    """That are done. The final model comes first of two of as many, being the one that counts."""
    iteration = manifest.get("iteration")
    return iteration + 1 if type(iteration) is int else 0


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
    key that one of them does not have. Where the data lie is no difference."""
    there, here = ({**_YOUNGER_KEYS, **flatten(tree)} for tree in (there, here))
    ignored = (*ignored, *DATA_PLACES)
    keys = [key for key in sorted(there.keys() | here.keys()) if key not in ignored]
    return {k: (there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)}


def _manifests(folder: Path) -> Iterator[tuple[Path, dict]]:
    for name in (FINAL_MODEL, PERIODIC_MODELS):
        for path in sorted(folder.glob(f"{name}{MANIFEST_SUFFIX}")):
            yield path, _mapping(path)


def _mapping(path: Path) -> dict:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a mapping; remove or restore it")
    return content
