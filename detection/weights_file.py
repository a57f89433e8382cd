"""Weights files: found where Detectron2 looks for them, read without running code.

Read are the converter's `.pth` and `.pkl`, Detectron2's `model_final.pth` and the `.pkl` files of
its model zoo, with its own names or Caffe2's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import torch

from detection import caffe2_names
from detection.safe_pickle import read_pickled_arrays
from moco.errors import CheckpointError
from moco.training.checkpoint import read_torch_file

ZOO = "detectron2://"
_ZOO_URL = "https://dl.fbaipublicfiles.com/detectron2/"
_CONVERT_FIRST = "convert it first with tools/convert_to_d2.py"


@dataclass(frozen=True)
class WeightsFile:
    """The named tensors of a file, on the CPU, in Detectron2's names.

    `dropped` is {what they are: their names in the file}. `fused` marks a file of Caffe2 whose
    norms are a scale and a bias, without running statistics. `class_names` are a detector's, by
    class id, where the file has them, as checkpoints of this project do.
    """

    tensors: dict[str, torch.Tensor]
    dropped: dict[str, list[str]] = field(default_factory=dict)
    fused: bool = False
    class_names: tuple[str, ...] | None = None


def find_weights(path: str | os.PathLike) -> Path:
    """The file that a value of MODEL.WEIGHTS names; nothing is downloaded.

    `detectron2://...` and `https://...` are looked up in the folder where Detectron2 keeps its
    downloads: $FVCORE_CACHE, else ~/.torch/iopath_cache (iopath/common/file_io.py).
    Raises: CheckpointError where there is no such file, saying what to do.
    """
    if "://" not in str(path):
        if not os.path.isfile(path):
            raise CheckpointError(
                f"{path}: there is no such weights file; give the .pth or .pkl that "
                "tools/convert_to_d2.py wrote, in MODEL.WEIGHTS"
            )
        return Path(path)
    name = str(path)
    url = urlparse(_ZOO_URL + name.removeprefix(ZOO) if name.startswith(ZOO) else name)
    if url.scheme not in ("http", "https"):
        raise CheckpointError(
            f"MODEL.WEIGHTS {name}: is no file; allowed: a path, {ZOO}... or https://..., the last "
            "two for files that were downloaded before; give a path"
        )
    cache = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    cached = cache / url.path.lstrip("/")
    if not cached.is_file():
        raise CheckpointError(
            f"MODEL.WEIGHTS {name}: nothing is downloaded here; download {url.geturl()} and set "
            f"MODEL.WEIGHTS to the file, or put it at {cached}"
        )
    return cached


def read_weights_file(path: str | os.PathLike) -> WeightsFile:
    """Read `path`, a local file; no code in it is run.

    Raises: CheckpointError for a missing, damaged or unsafe file, for a checkpoint that is not
        converted yet, and for Caffe2's names of another network.
    """
    path = find_weights(path)
    names = None
    if str(path).endswith(".pkl"):
        arrays, fields = read_pickled_arrays(path)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        author = fields.get("__author__")
    else:
        content = read_torch_file(path)
        tensors = _model_of(content, path)
        author = content.get("__author__")
        names = _class_names_of(content, path)
    if author == caffe2_names.AUTHOR or caffe2_names.has_caffe2_names(tensors):
        tensors, dropped = caffe2_names.from_caffe2(tensors, str(path))
        fused = not any(name.endswith(".running_var") for name in tensors)
        return WeightsFile(tensors, dropped, fused)
    _refuse_unconverted(tensors, path)
    return WeightsFile(tensors, class_names=names)


def _class_names_of(content: Mapping, path: Path) -> tuple[str, ...] | None:
    names = content.get("class_names")
    if names is None or torch.is_tensor(names):
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: 'class_names' is not a list of names; remove or correct it")
    return tuple(names)


def _model_of(content: object, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping):
        for wrapper in ("model", "state_dict"):
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no dict of named tensors; {_CONVERT_FIRST}")
    for name, value in content.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise CheckpointError(
                f"{path}: the entry {str(name)[:80]!r} is no tensor; allowed: tensors by name, or "
                "such a dict under 'model'"
            )
    return dict(content)


def _refuse_unconverted(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    for name in ("module.encoder_q.conv1.weight", "encoder_q.conv1.weight", "conv1.weight"):
        if name in tensors or f"module.{name}" in tensors:
            raise CheckpointError(
                f"{path}: is a checkpoint with {name!r}, not converted weights; {_CONVERT_FIRST}"
            )
