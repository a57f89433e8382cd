"""What a pretraining checkpoint holds, and the checks before a run continues from one."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision

from moco import cfgnode
from moco.cfgnode import CfgNode
from moco.config import DIGEST_EXCLUDE
from moco.data.images import ImageSource
from moco.errors import CheckpointError
from moco.methods import Method
from moco.training import checkpoint as ckpt


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same when a run continues."""

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
            config_digest=cfgnode.digest(cfg, DIGEST_EXCLUDE),
            data_digest=hashlib.sha256(names.encode()).hexdigest()[:16],
            world_size=world_size,
            steps_per_epoch=len(source) // cfg.TRAIN.BATCH_SIZE,
        )


def save(
    path: Path,
    *,
    method: Method,
    optimizer: torch.optim.Optimizer,
    step: int,
    arch: str,
    identity: RunIdentity,
) -> None:
    """Write a checkpoint in the reference's layout, with what it lacks under `extra`."""
    content = {
        "epoch": step // identity.steps_per_epoch,
        "arch": arch,
        "state_dict": {f"module.{name}": t for name, t in method.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "extra": {
            "step": step,
            "config": identity.config,
            "config_digest": identity.config_digest,
            "data_digest": identity.data_digest,
            "world_size": identity.world_size,
            "versions": versions(),
        },
    }
    ckpt.save_checkpoint(path, content, step=step, config_digest=identity.config_digest)


def restore(
    path: Path, *, method: Method, optimizer: torch.optim.Optimizer, identity: RunIdentity
) -> int:
    """Load a checkpoint of ours or of the reference. Returns the number of finished steps.

    Raises: CheckpointError where names, shapes, configuration, data or world size differ.
    """
    content = ckpt.read_torch_file(path)
    needed = {"epoch", "arch", "state_dict", "optimizer"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise CheckpointError(
            f"{path}: is not a pretraining checkpoint; needed keys: {', '.join(sorted(needed))}"
        )
    extra = content.get("extra")
    if extra is not None:
        _check_identity(path, extra, identity)
    state = {name.removeprefix("module."): t for name, t in content["state_dict"].items()}
    _check_state(path, state, method.state_dict())
    method.load_state_dict(state)
    try:
        optimizer.load_state_dict(content["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its optimizer state does not fit ({error})") from error
    if extra is None:
        return content["epoch"] * identity.steps_per_epoch
    return extra["step"]


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def _check_identity(path: Path, extra: dict, identity: RunIdentity) -> None:
    if extra["config_digest"] != identity.config_digest:
        old, new = cfgnode.flatten(extra["config"]), cfgnode.flatten(identity.config)
        excluded = tuple(f"{key}." for key in DIGEST_EXCLUDE)
        changed = [
            f"{key} {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not f"{key}.".startswith(excluded)
        ]
        raise CheckpointError(
            f"{path}: was made with another configuration ({'; '.join(changed)}); restore these "
            "keys, or give another --output-dir"
        )
    if extra["data_digest"] != identity.data_digest:
        raise CheckpointError(
            f"{path}: was made on another set of images (digest {extra['data_digest']}, now "
            f"{identity.data_digest}); give the same --data, or another --output-dir"
        )
    if extra["world_size"] != identity.world_size:
        raise CheckpointError(
            f"{path}: was made with {extra['world_size']} processes, now there are "
            f"{identity.world_size}; start the same number to continue exactly"
        )


def _check_state(path: Path, given: dict, needed: dict) -> None:
    missing = [name for name in needed if name not in given]
    unknown = [name for name in given if name not in needed]
    shapes = [
        f"{name} {tuple(given[name].shape)} (needed {tuple(needed[name].shape)})"
        for name in needed
        if name in given and given[name].shape != needed[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of other shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path}: its weights do not fit this model; {'; '.join(problems)}. Use the "
            "configuration it was made with"
        )
