"""What must be the same when a detection run continues, and what `--allow-change` lets differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detection.class_names import classes_differ
from detection.config import get_defaults
from detection.data.datasets import DetectionData
from detection.data.fingerprint import DataFingerprint, data_differences, lists_of
from detection.run_folder import (
    DATA_PLACES,
    NOT_IN_DIGEST,
    changed_keys,
    not_in_digest,
    run_digest,
)
from moco.cfgnode import CfgNode, flatten, to_dict
from moco.errors import CheckpointError
from moco.training.changes import DATA, check_names

_NUM_DIFFERENCES_SHOWN = 5
_MAX_ITER = "SOLVER.MAX_ITER"
_CLASSES_FIXED = "is what the model was trained to tell apart; start a run of its own for others"
_FIXED = {
    "SEED": "makes another run; give another OUTPUT_DIR",
    "MODEL.WEIGHTS": "is where a run begins, and it goes on from its checkpoint; leave it out",
    "DATASETS.VOC_CLASSES": _CLASSES_FIXED,
    "MODEL.ROI_HEADS.NUM_CLASSES": _CLASSES_FIXED,
}


def check_allowed_changes(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that --allow-change cannot let differ in detection."""
    free = tuple(k for k in (*NOT_IN_DIGEST, *DATA_PLACES) if k not in _FIXED)
    if "DATALOADER.NUM_WORKERS" in names:  # which a replayed stream depends on
        free = tuple(key for key in free if key != "DATALOADER.NUM_WORKERS")
    known = flatten(to_dict(get_defaults()))
    check_names(names, known, free=free, fixed=_FIXED, example=_MAX_ITER)


@dataclass(frozen=True)
class RunIdentity:
    """Configuration, initial weights, classes and data of a run; its seed is compared apart.

    weights_sha256: None for random initialisation.
    """

    cfg: CfgNode
    engine: str
    config_digest: str
    weights_sha256: str | None
    class_names: tuple[str, ...]
    data: DataFingerprint

    @classmethod
    def of(
        cls, cfg: CfgNode, engine: str, weights_sha256: str | None, data: DetectionData
    ) -> RunIdentity:
        return cls(
            cfg=cfg,
            engine=engine,
            config_digest=run_digest(cfg, weights_sha256, engine),
            weights_sha256=weights_sha256,
            class_names=tuple(data.class_names),
            data=DataFingerprint.of(data, with_masks=cfg.MODEL.MASK_ON),
        )

    def facts(self) -> dict:
        """Plain values for checkpoints and their manifests."""
        return {
            "weights_sha256": self.weights_sha256,
            "class_names": list(self.class_names),
            "data": self.data.summary(),
            "config": to_dict(self.cfg),
        }

    def check(
        self, path: Path, found: Mapping, allowed: Collection[str] = ()
    ) -> dict[str, tuple[object, object]]:
        """Compare with what a checkpoint, a manifest or a result says of its run.

        Args:
            path: of it; a list of its data's digests is looked for beside it.
            found: its config_digest and, but for those of old runs, "config" and `facts`.
            allowed: configuration keys, and "data", that may differ.
        Returns: name -> (then, now) of what differs and may.
        Raises: CheckpointError for what differs and may not.
        """
        names = found.get("class_names")
        if names is not None and tuple(names) != self.class_names:
            raise CheckpointError(
                f"{path}: {classes_differ(self.cfg, names, self.class_names)}; or give another "
                "OUTPUT_DIR"
            )
        differences = self._changed_keys(path, found)
        refused = {k: pair for k, pair in differences.items() if k not in allowed}
        if refused:
            words = [f"{key} {old} there, {new} now" for key, (old, new) in refused.items()]
            rest = len(words) - _NUM_DIFFERENCES_SHOWN
            more = f"; and {rest} more" if rest > 0 else ""
            raise CheckpointError(
                f"{path}: belongs to another run ({'; '.join(words[:_NUM_DIFFERENCES_SHOWN])}"
                f"{more}); runs are not mixed: give another OUTPUT_DIR, or the settings of that "
                "run, or name each of these with --allow-change"
            )
        num_done = found.get("iteration", -1) + 1
        if num_done > self.cfg.SOLVER.MAX_ITER:
            raise CheckpointError(
                f"{path}: has done {num_done} iterations, {_MAX_ITER} is "
                f"{self.cfg.SOLVER.MAX_ITER}; give {num_done} or more"
            )
        then, now = found.get("data"), self.data.summary()
        if then is not None and then != now:
            if DATA not in allowed:
                words = data_differences(then, now, path.parent, lists_of(self.data))
                raise CheckpointError(
                    f"{path}: belongs to a run on other data ({words}); restore the data, add "
                    f"--allow-change {DATA} to go on with these, or give another OUTPUT_DIR"
                )
            differences[DATA] = (then, now)
        return differences

    def _changed_keys(self, path: Path, found: Mapping) -> dict[str, tuple[object, object]]:
        """Raises: CheckpointError where the initial weights, or unknown keys, differ."""
        there, digest_there = found.get("config"), found.get("config_digest")
        own_places = {k: v for k, v in flatten(to_dict(self.cfg)).items() if k in DATA_PLACES}
        if digest_there in (self.config_digest, self._digest_of_before(own_places)):
            return {}
        if there is None:
            raise CheckpointError(
                f"{path}: belongs to another run (its config.yaml is missing, its config digest "
                "differs); runs are not mixed: give another OUTPUT_DIR, or the settings of that run"
            )
        ignored = not_in_digest(self.cfg, self.engine)
        changed = changed_keys(there, to_dict(self.cfg), ignored=ignored)
        places = {k: v for k, v in flatten(there).items() if k in DATA_PLACES}
        same_weights = digest_there == self._digest_of_before(places)
        if "weights_sha256" in found:
            same_weights = found["weights_sha256"] == self.weights_sha256
        if not same_weights and (not changed or "weights_sha256" in found):
            raise CheckpointError(
                f"{path}: belongs to another run (the content of MODEL.WEIGHTS differs); runs are "
                "not mixed: give another OUTPUT_DIR, or the weights of that run"
            )
        return changed

    def _digest_of_before(self, places: Mapping) -> str:
        """What runs had that did not know their data yet: where these lay was part of it."""
        return run_digest(self.cfg, self.weights_sha256, self.engine, places)
