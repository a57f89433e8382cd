"""What must be the same when a run continues, and what `--elastic` lets differ."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from moco import cfgnode
from moco.cfgnode import CfgNode
from moco.config import DIGEST_EXCLUDE, LATER_KEYS, unused_later_keys
from moco.data.images import ImageSource
from moco.errors import CheckpointError

ACCUMULATION = "TRAIN.ACCUMULATION_STEPS"
DATA = "data"  # the list of images, beside the configuration's keys


@functools.cache
def code_digest() -> str:
    """SHA-256 (first 16 hex digits) over the sources of the package `moco`."""
    package = Path(__file__).resolve().parents[1]
    sha = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        content = path.read_bytes()
        sha.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return sha.hexdigest()[:16]


@dataclass(frozen=True)
class RunIdentity:
    """Configuration, images and processes of a run.

    world_size: processes. Each cuts its share of the batch into TRAIN.ACCUMULATION_STEPS parts
    that act as processes of their own, so batch norm sees groups of
    batch / (processes x parts x MODEL.BN_SPLITS) images.
    """

    config: dict
    config_digest: str
    data_digest: str
    world_size: int
    steps_per_epoch: int

    @classmethod
    def of(cls, cfg: CfgNode, source: ImageSource, world_size: int) -> RunIdentity:
        names = "\n".join(source.paths)
        return cls(
            config=cfgnode.to_dict(cfg),
            config_digest=cfgnode.digest(
                cfg, tuple({*DIGEST_EXCLUDE, *unused_later_keys(cfg)})
            ),
            data_digest=hashlib.sha256(names.encode()).hexdigest()[:16],
            world_size=world_size,
            steps_per_epoch=len(source) // cfg.TRAIN.BATCH_SIZE,
        )

    def differences(self, extra: dict) -> dict[str, tuple[object, object]]:
        """name -> (then, now) of the keys that differ, and of DATA where the images do."""
        found = self._changed_keys(extra["config"])
        if extra["data_digest"] != self.data_digest:
            found[DATA] = (extra["data_digest"], self.data_digest)
        return found

    def check(
        self, path: Path, extra: dict, *, elastic: bool = False, allowed: Collection[str] = ()
    ) -> list[str]:
        """Compare with what a checkpoint says of its run.

        Args:
            extra: of the checkpoint: config, data_digest and world_size.
            elastic: let the number of processes and TRAIN.ACCUMULATION_STEPS differ.
            allowed: keys, and DATA, that may differ.
        Returns: lines that say what `elastic` lets differ and what that means.
        Raises: CheckpointError for any other difference.
        """
        changed = self.differences(extra)
        refused = {name: pair for name, pair in changed.items() if name not in allowed}
        parts_changed = refused.pop(ACCUMULATION, None)
        images = refused.pop(DATA, None)
        if refused:
            listed = "; ".join(f"{k} {old!r} -> {new!r}" for k, (old, new) in refused.items())
            raise CheckpointError(
                f"{path}: was made with another configuration ({listed}); restore these keys, name "
                "each with --allow-change, or give another --output-dir"
            )
        if images:
            raise CheckpointError(
                f"{path}: was made on another set of images (digest {images[0]}, now {images[1]}); "
                f"give the same --data, add --allow-change {DATA}, or give another --output-dir"
            )
        parts = []
        if extra["world_size"] != self.world_size:
            parts.append(f"{extra['world_size']} processes, now there are {self.world_size}")
        if parts_changed:
            parts.append(f"{ACCUMULATION} {parts_changed[0]}, now it is {parts_changed[1]}")
        if not parts:
            return []
        made = f"{path}: was made with {', and '.join(parts)}"
        if not elastic:
            raise CheckpointError(
                f"{made}; give the same to continue exactly, or add --elastic to continue with "
                "the same batches and pixels, but sums in another order"
            )
        return self._elastic_lines(made, extra)

    def _changed_keys(self, config: dict) -> dict[str, tuple[object, object]]:
        old, new = {**LATER_KEYS, **cfgnode.flatten(config)}, cfgnode.flatten(self.config)
        excluded = tuple(f"{key}." for key in DIGEST_EXCLUDE)
        return {
            key: (old.get(key), new.get(key))
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not f"{key}.".startswith(excluded)
        }

    def _elastic_lines(self, made: str, extra: dict) -> list[str]:
        before = _bn_group(extra["config"], extra["world_size"])
        now = _bn_group(self.config, self.world_size)
        lines = [
            f"--elastic: {made}; batches, their order and every pixel stay the same, sums are "
            "rounded in another order"
        ]
        if before == now:
            return lines
        needed, rest = divmod(_num_parts(extra["config"], extra["world_size"]), self.world_size)
        remedy = "" if rest else f"; {ACCUMULATION} {needed} keeps groups of {before}"
        lines.append(
            f"warning: --elastic: batch norm saw groups of {before} images before and sees groups "
            f"of {now} now, so its statistics and what shuffle BN mixes change{remedy}"
        )
        return lines


def _num_parts(config: dict, world_size: int) -> int:
    return world_size * config["TRAIN"].get("ACCUMULATION_STEPS", 1)


def _bn_group(config: dict, world_size: int) -> int:
    """Images that batch norm normalises together."""
    train, model = config["TRAIN"], config["MODEL"]
    if model["NORM"] == "SyncBN":
        return train["BATCH_SIZE"]
    return train["BATCH_SIZE"] // (_num_parts(config, world_size) * model["BN_SPLITS"])
