"""What a pretraining checkpoint holds, and how a run continues from one."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

from moco.distributed import all_gather_cat
from moco.errors import CheckpointError, DistributedError
from moco.methods import Method
from moco.training import checkpoint as ckpt
from moco.training.identity import RunIdentity


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


def find_checkpoint(
    run_dir: Path, resume: bool, resume_from: str | None, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to continue from; None to start afresh.

    Args: as of `Trainer`. `say` receives why files were refused.
    Raises: CheckpointError where the folder holds a run and it is not to be resumed.
    """
    found = ckpt.checkpoint_files(run_dir)
    if found and not resume:
        raise CheckpointError(
            f"{run_dir}: already holds {len(found)} checkpoints of a run; add --resume to continue "
            "it, or give another --output-dir"
        )
    path, _, refused = ckpt.latest_verified(run_dir)
    for _, reason in refused:
        say(f"refused: {reason}")
    if path is None and resume_from:
        return Path(resume_from)
    if path is None and resume:
        say(f"--resume: {run_dir} holds no verified checkpoint, starting afresh")
    return path


def restore(
    path: Path,
    *,
    method: Method,
    optimizer: torch.optim.Optimizer,
    identity: RunIdentity,
    elastic: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Load a checkpoint of ours or of the reference. Returns the number of finished steps.

    Args:
        elastic: allow another number of processes, see `RunIdentity.check`.
        say: receives a line for what differs and is allowed to.
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
        _check_extra(path, extra)
        for line in identity.check(path, extra, elastic=elastic) + _changed_versions(path, extra):
            say(line)
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


def _check_extra(path: Path, extra: object) -> None:
    needed = {"config": dict, "data_digest": str, "step": int, "versions": dict, "world_size": int}
    given = extra if isinstance(extra, dict) else {}
    missing = [name for name, kind in needed.items() if not isinstance(given.get(name), kind)]
    if missing:
        raise CheckpointError(
            f"{path}: its 'extra' lacks a valid {', '.join(missing)}; give a file that this "
            "project wrote, or one without 'extra'"
        )


def _changed_versions(path: Path, extra: dict) -> list[str]:
    before, now = extra["versions"], versions()
    changed = [f"{n} {before[n]}, now {v}" for n, v in now.items() if before.get(n, v) != v]
    if not changed:
        return []
    return [f"warning: {path}: was made with {'; '.join(changed)}; its last digits may differ"]


def agree_on_step(step: int, output_dir: Path, device: torch.device) -> None:
    """Raise DistributedError on all processes where they would continue at different steps."""
    steps = all_gather_cat(torch.tensor([step], device=device)).tolist()
    if len(set(steps)) > 1:
        raise DistributedError(
            f"{output_dir}: processes would continue at different steps (by rank: {steps}); every "
            "machine must see the same folder, so put --output-dir on a shared file system"
        )


def checkpoint_bytes(method: Method, optimizer: torch.optim.Optimizer) -> int:
    """About how large a checkpoint is once the optimizer has its moments."""
    moments = 2 if "betas" in optimizer.defaults else 1
    trainable = [p for p in method.parameters() if p.requires_grad]
    return ckpt.tensor_bytes(method.state_dict()) + moments * ckpt.tensor_bytes(trainable)


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
