"""What a checkpoint of linear classification or fine-tuning holds, and exact continuation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

from moco import cfgnode
from moco.cfgnode import CfgNode
from moco.errors import CheckpointError
from moco.evaluation.config import DIGEST_EXCLUDE
from moco.evaluation.weights import Pretrained
from moco.training import checkpoint as ckpt


@dataclass
class Progress:
    """Where a run stands. curve: one record an evaluated epoch, see `linear.py`; seconds: spent."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class LinearIdentity:
    """What must be the same when a run continues."""

    config: dict
    config_digest: str
    weights_digest: str
    data_digest: str
    world_size: int

    @classmethod
    def of(cls, cfg: CfgNode, weights: Pretrained, train, test, world_size: int) -> LinearIdentity:
        names = "\n".join([*train.paths, "", *test.paths])
        return cls(
            config=cfgnode.to_dict(cfg),
            config_digest=cfgnode.digest(cfg, DIGEST_EXCLUDE),
            weights_digest=weights.digest(),
            data_digest=hashlib.sha256(names.encode()).hexdigest()[:16],
            world_size=world_size,
        )

    def check(self, where: object, found: dict) -> None:
        """Raises: CheckpointError that names what differs from `found`, made by `as_dict`."""
        if found.get("config_digest") != self.config_digest:
            old, new = cfgnode.flatten(found.get("config", {})), cfgnode.flatten(self.config)
            excluded = tuple(f"{key}." for key in DIGEST_EXCLUDE)
            changed = [
                f"{key} {old.get(key)!r} -> {new.get(key)!r}"
                for key in sorted(old.keys() | new.keys())
                if old.get(key) != new.get(key) and not f"{key}.".startswith(excluded)
            ]
            raise CheckpointError(
                f"{where}: was made with another configuration ({'; '.join(changed)}); restore "
                "these keys, or give another --output-dir"
            )
        for name, what in (
            ("weights_digest", "other pretrained weights"),
            ("data_digest", "other images"),
            ("world_size", "another number of processes"),
        ):
            if found.get(name) != getattr(self, name):
                raise CheckpointError(
                    f"{where}: was made with {what} ({name} {found.get(name)}, now "
                    f"{getattr(self, name)}); give the same to continue exactly, or another "
                    "--output-dir"
                )

    def as_dict(self) -> dict:
        names = ("config", "config_digest", "weights_digest", "data_digest", "world_size")
        return {name: getattr(self, name) for name in names}


def save(
    path: Path,
    *,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    steps_per_epoch: int,
    arch: str,
    identity: LinearIdentity,
) -> None:
    """Write a checkpoint in the layout of the reference's (main_lincls.py), the rest in `extra`."""
    best = max((record["top1"] for record in progress.curve), default=0.0)
    content = {
        "epoch": progress.step // steps_per_epoch,
        "arch": arch,
        "state_dict": {f"module.{name}": t for name, t in encoder.state_dict().items()},
        "best_acc1": best,
        "optimizer": optimizer.state_dict(),
        "extra": {
            "step": progress.step,
            "seconds": progress.seconds,
            "curve": progress.curve,
            **identity.as_dict(),
        },
    }
    ckpt.save_checkpoint(
        path, content, step=progress.step, config_digest=identity.config_digest
    )


def restore(
    path: Path, *, encoder: nn.Module, optimizer: torch.optim.Optimizer, identity: LinearIdentity
) -> Progress:
    """Load a checkpoint that `save` wrote.

    Raises: CheckpointError where it is another run's, or its tensors do not fit.
    """
    content = ckpt.read_torch_file(path)
    if not isinstance(content, dict) or "extra" not in content or "best_acc1" not in content:
        raise CheckpointError(
            f"{path}: is no checkpoint of tools/evaluate_linear.py; give another --output-dir"
        )
    identity.check(path, content["extra"])
    state = {name.removeprefix("module."): t for name, t in content["state_dict"].items()}
    try:
        encoder.load_state_dict(state)
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: its tensors do not fit this run ({reason})") from error
    extra = content["extra"]
    return Progress(extra["step"], extra["seconds"], list(extra["curve"]))
