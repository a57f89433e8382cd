"""What a pretraining checkpoint holds, and how a run continues from one."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision

from moco.distributed import all_gather_cat
from moco.errors import CheckpointError, DistributedError
from moco.methods import Method
from moco.training import checkpoint as ckpt
from moco.training import fit
from moco.training.changes import Changes
from moco.training.identity import WEIGHTS, RunIdentity, code_digest
from moco.training.image_record import KEY as SEEN_IMAGES
from moco.training.initial_weights import Start, is_record
from moco.training.loss_scale import LossScale
from moco.training.optimizer import plain_state
from moco.training.seen_images import SeenImages


def save(
    path: Path,
    *,
    method: Method,
    optimizer: torch.optim.Optimizer,
    step: int,
    arch: str,
    identity: RunIdentity,
    changes: Changes | None = None,
    start: Start | None = None,
    loss_scale: LossScale | None = None,
    seen: SeenImages | None = None,
    excluded: Sequence[dict] = (),
) -> None:
    """Write a checkpoint in the reference's layout, with what it lacks under `extra`.

    Args: as of `restore`; changes: those of the run so far; excluded: of `Trainer`.
    """
    made = changes.all() if changes else []
    weights = {"weights": start.record} if start and start.record else {}
    images = {} if seen is None else {SEEN_IMAGES: seen.state()}
    summary = {} if seen is None else {SEEN_IMAGES: seen.summary()}
    content = {
        "epoch": step // identity.steps_per_epoch,
        "arch": arch,
        "state_dict": {f"module.{name}": t for name, t in method.state_dict().items()},
        "optimizer": plain_state(optimizer),
        "extra": {
            "step": step,
            "config": identity.config,
            "config_digest": identity.config_digest,
            "data_digest": identity.data_digest,
            "world_size": identity.world_size,
            "versions": versions(),
            "code_digest": code_digest(),
            "changes": made,
            **weights,
            **({"loss_scale": loss_scale.state()} if loss_scale is not None else {}),
            "excluded": list(excluded),
            **images,
        },
    }
    ckpt.save_checkpoint(
        path, content, step=step, config_digest=identity.config_digest,
        code_digest=code_digest(), changes=made, excluded=list(excluded), **weights, **summary,
    )  # fmt: skip


def find_checkpoint(
    run_dir: Path, resume: bool, resume_from: str | None, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to continue from; None to start afresh.

    Args: as of `Trainer`. `say` receives why files were refused.
    Raises: CheckpointError where the folder holds a run and it is not to be resumed.
    """
    path = ckpt.find_checkpoint(run_dir, resume, say)
    if path is None and resume_from:
        path = Path(resume_from)
        if ckpt.manifest_path(path).exists():  # the reference's files have none
            ckpt.verify_manifest(path)
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
    changes: Changes | None = None,
    start: Start | None = None,
    loss_scale: LossScale | None = None,
    seen: SeenImages | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Load a checkpoint of ours or of the reference. Returns the number of finished steps.

    Args:
        elastic: allow another number of processes, see `RunIdentity.check`.
        changes: which keys may differ; receives those that do.
        start: receives what the run's encoders started from.
        loss_scale: receives the file's; one that begins is left where another run is continued.
        seen: receives the images that the run has seen.
        say: receives a line for what differs and is allowed to.
    Raises: CheckpointError where names, shapes, configuration, data or world size differ.
    """
    content = ckpt.read_torch_file(path)
    needed = {"epoch", "arch", "state_dict", "optimizer"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise CheckpointError(
            f"{path}: is not a pretraining checkpoint; needed keys: {', '.join(sorted(needed))}"
        )
    extra, changes, start = content.get("extra"), changes or Changes(), start or Start()
    if extra is None and identity.config["MODEL"]["WEIGHTS"]:
        raise CheckpointError(
            f"{path}: is continued with its own weights, {WEIGHTS} would not be read; give one of "
            "the two"
        )
    if extra is not None:
        _check_extra(path, extra)
        start.record = extra.get("weights")
        lines = identity.check(path, extra, elastic=elastic, allowed=changes.allowed)
        made = changes.add(extra["step"], extra.get("changes", []), identity.differences(extra))
        for line in lines + made + _changed_code(path, extra) + _changed_versions(path, extra):
            say(line)
    arch = identity.config["MODEL"]["ARCH"]
    if content["arch"] != arch:
        raise CheckpointError(
            f"{path}: its 'arch' is {content['arch']!r}, MODEL.ARCH is {arch!r}; give the same"
        )
    state = fit.unwrapped(path, content["state_dict"])
    fit.check_weights(path, state, method.state_dict())
    counted = content["epoch"] if extra is None else extra["step"]
    if type(counted) is not int or counted < 0:
        raise CheckpointError(f"{path}: 'epoch' or 'step' is {counted!r}; 0 or more is needed")
    fit.check_optimizer(path, content["optimizer"], optimizer, has_stepped=counted > 0)
    if loss_scale is not None and extra is not None and "loss_scale" in extra:
        loss_scale.load(extra["loss_scale"], path)
    method.load_state_dict(state)
    # Decay, momentum and the like are the configuration's, not the file's, as they may be changed.
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(content["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    step = counted * (identity.steps_per_epoch if extra is None else 1)
    if seen is not None:
        given = extra or {}
        same = given.get("data_digest") == identity.data_digest
        seen.restore(str(path), given.get(SEEN_IMAGES), step=step, same_images=same)
    return step


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
    if not isinstance(given.get("changes", []), list):  # older files have none
        missing.append("changes")
    weights = given.get("weights")  # of runs with MODEL.WEIGHTS
    if weights is not None and not is_record(weights):
        missing.append("weights")
    if missing:
        raise CheckpointError(
            f"{path}: its 'extra' lacks a valid {', '.join(missing)}; give a file that this "
            "project wrote, or one without 'extra'"
        )


def _changed_code(path: Path, extra: dict) -> list[str]:
    before = extra.get("code_digest", "not recorded")
    if before == code_digest():
        return []
    return [
        f"warning: {path}: was made by other code of this project (sha256 {before}, now "
        f"{code_digest()}); what changed may change the numbers"
    ]


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


def checkpoint_bytes(
    method: Method, optimizer: torch.optim.Optimizer, seen: SeenImages | None = None
) -> int:
    """About how large a checkpoint is once the optimizer has its moments."""
    moments = 2 if "betas" in optimizer.defaults else 1
    trainable = [p for p in method.parameters() if p.requires_grad]
    tensors = ckpt.tensor_bytes(method.state_dict()) + moments * ckpt.tensor_bytes(trainable)
    return tensors + (0 if seen is None else seen.max_bytes)
