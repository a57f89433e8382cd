"""Weights files as they lie on disk: a run folder's newest checkpoint, torch files, safetensors."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moco.errors import CheckpointError
from moco.training.checkpoint import (
    latest_verified,
    manifest_path,
    read_json,
    read_torch_file,
    verify_manifest,
)
from moco.training.layouts_detector import FINAL_MODEL, with_settings

SAFETENSORS = ".safetensors"


def find_source(path: str | os.PathLike) -> tuple[Path, list[tuple[Path, str]]]:
    """The file that `path`, a file or a run folder, stands for.

    Returns: the file, and the newer checkpoints of a run that were passed over with the reason.
    Raises: CheckpointError where a run has no verified checkpoint, or a file's manifest does not
        verify. Files without a manifest are other projects'.
    """
    path = Path(path)
    if path.is_dir():
        newest, _, refused = latest_verified(path)
        if newest is None and (path / FINAL_MODEL).is_file():  # a detector's trial
            return find_source(path / FINAL_MODEL)
        if newest is None:
            reasons = "; ".join(reason for _, reason in refused[:3])
            raise CheckpointError(
                f"{path}: this folder holds no verified checkpoint_*.pth.tar"
                + (f" ({reasons})" if reasons else "")
                + f" and no {FINAL_MODEL}; give a run folder, a trial's, or a weights file"
            )
        return newest, refused
    if manifest_path(path).exists():
        verify_manifest(path)
    return path, []


def read_weights(path: str | os.PathLike) -> object:
    """The content of a weights file, tensors on the CPU; no code of the file is run.

    A `.safetensors` file is given as a checkpoint is: tensors under `state_dict`, beside them what
    its metadata says. To a detector's weights the settings beside them are added, see
    `layouts_detector.py`.
    Raises: CheckpointError for a file that is missing or damaged, or that holds other objects than
        tensors and plain values; where the settings beside it are another network's.
    """
    path = Path(path)
    if path.suffix == SAFETENSORS:
        content: object = _read_safetensors(path)
    else:
        content = read_torch_file(path)
    _refuse_other_strides(path)
    return with_settings(content, path)


def _refuse_other_strides(path: Path) -> None:
    """Hugging Face's configuration beside a file says where a ResNet's strides are; no tensor does.
    (transformers, models/resnet/configuration_resnet.py)"""
    config = path.parent / "config.json"
    if not config.is_file():
        return
    try:
        settings = read_json(config)
    except CheckpointError:  # of something else
        return
    if not isinstance(settings, dict) or settings.get("model_type") != "resnet":
        return
    for key in ("downsample_in_first_stage", "downsample_in_bottleneck"):
        if settings.get(key):
            raise CheckpointError(
                f"{path}: config.json beside it says {key} true: its strides are elsewhere than in "
                "torchvision's network, which has these tensors too; allowed: false"
            )


def _read_safetensors(path: str | os.PathLike) -> dict[str, object]:
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: there is no such file; give the path of a weights file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {**(file.metadata() or {}), "state_dict": state}
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: is not a readable safetensors file, {reason}") from error
