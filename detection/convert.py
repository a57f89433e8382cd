"""From a pretraining checkpoint to backbone weights for R50-C4, proven equal before written.

Kept: the query encoder without `fc` (facebookresearch/moco,
detection/convert-pretrain-to-detectron2.py). Files of other projects are read too, in the layouts
of `moco/training/layouts.py` (docs/CHECKPOINTS.md). Every tensor of the source is either mapped or
dropped under a reported name; the mapped ones must give, inside the detection trunk, the features
that the source network gives (`self_check.py`).
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from detection.keymap import ResNetShape, is_batch_counter, read_shape, to_detectron2
from detection.safe_pickle import write_pickled_arrays
from detection.self_check import SELF_CHECK_SIZE, self_check
from moco.errors import CheckpointError
from moco.training.checkpoint import sha256_of, write_atomic, write_json_atomic
from moco.training.image_record import (
    REPORT_KEY,
    ImageRecord,
    Unknown,
    record_of,
    remove_beside,
    write_beside,
)
from moco.training.layouts import (
    COUNTER,
    find_source,
    named_tensors,
    read_backbone,
    read_weights,
    recognise,
    settings_of,
)

AUTHOR = "MoCo"  # any but "Caffe2", which makes Detectron2 rename the tensors
# Normalisation of 0-255 pixels by the ImageNet statistics, RGB.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Layout(NamedTuple):
    """Whose file it is ("moco", "torchvision", ...), and what its backbone's names start with."""

    name: str
    prefix: str


@dataclass(frozen=True)
class Converted:
    """A converted state: `model` has Detectron2's names, `names` maps source names to them."""

    layout: Layout
    shape: ResNetShape
    source: dict[str, torch.Tensor]  # torchvision's names, float32
    model: dict[str, torch.Tensor]
    names: dict[str, str]
    dropped: dict[str, list[str]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` did; `refused` are newer checkpoints of a run it passed over."""

    source: Path
    out: Path
    layout: Layout
    encoder: str
    shape: ResNetShape
    names: dict[str, str]
    dropped: dict[str, list[str]]
    self_check: dict[str, float]
    source_sha256: str
    out_sha256: str
    yaml_lines: list[str]
    images: ImageRecord | Unknown
    notes: tuple[str, ...] = ()
    refused: list[tuple[Path, str]] = field(default_factory=list)


def convert_checkpoint(
    source_path: str | os.PathLike,
    out_path: str | os.PathLike,
    *,
    encoder: str = "query",
    drop: Sequence[str] = (),
) -> ConversionReport:
    """Convert a checkpoint file, or a run folder's newest verified one, and write the weights.

    Writes `out_path`, which is a `.pth` of tensors or a `.pkl` of numpy arrays, and
    `<out_path>.conversion.json`; beside them, where the source knows the images it was trained on,
    `<out_path>.images.safetensors`. All replace what was there, atomically.

    Args:
        encoder: "query", or "key" for the momentum copy. drop: see `read_backbone`.
    Raises: CheckpointError for a source that is missing, damaged or of another network, for
        non-finite weights, another suffix, or a failed self-check. Nothing is written then.
    """
    out = Path(out_path)
    if out.suffix not in (".pth", ".pkl"):
        raise CheckpointError(
            f"{out}: the output's suffix is {out.suffix!r}; allowed: .pth (tensors), .pkl (numpy)"
        )
    source, refused = find_source(source_path)
    content = read_weights(source)
    if out.exists() and out.samefile(source):
        raise CheckpointError(f"{out}: is the source itself; give another output file")
    converted = convert_state(content, where=str(source), encoder=encoder, drop=drop)
    lines = yaml_lines(converted.shape, *_pixel_statistics(content, str(source)))
    images = record_of(source, content)
    figures = self_check(converted.source, converted.model, converted.shape, str(source))
    report = ConversionReport(
        source=source,
        out=out,
        layout=converted.layout,
        encoder=encoder,
        shape=converted.shape,
        names=converted.names,
        dropped=converted.dropped,
        self_check=figures,
        source_sha256=sha256_of(source),
        out_sha256=_write_weights(out, converted.model),
        yaml_lines=lines,
        images=images,
        notes=converted.notes,
        refused=refused,
    )
    about_images = write_beside(out, images)
    write_json_atomic(_report_path(out), {**_as_json(report), REPORT_KEY: about_images})
    return report


def identify_layout(content: object, where: str = "checkpoint") -> Layout:
    """The layout of a checkpoint or of the state dict in it.

    Raises: CheckpointError, naming the first keys, for a layout that is unknown.
    """
    found = recognise(named_tensors(content, where), where)
    return Layout(found.name, found.start)


def convert_state(
    content: object,
    where: str = "checkpoint",
    *,
    encoder: str = "query",
    drop: Sequence[str] = (),
) -> Converted:
    """Split and rename the tensors of a checkpoint (or bare state dict); touches no file.

    Raises: CheckpointError where a tensor is neither mapped nor known to be dropped, is not
        finite, or where the network is none that R50-C4 can hold.
    """
    backbone = read_backbone(content, where, encoder=encoder, drop=drop)
    if backbone.network.channels != 3:
        raise CheckpointError(
            f"{where}: its first convolution takes images of {backbone.network.channels} channels; "
            "detection reads INPUT.FORMAT RGB or BGR, so 3 are supported; pretrain with "
            "DATA.CHANNELS 3"
        )
    dropped = {reason: list(names) for reason, names in backbone.dropped.items()}
    names: dict[str, str] = {}
    for name, canonical in backbone.names.items():
        if is_batch_counter(canonical):
            dropped.setdefault(COUNTER, []).append(name)
        else:
            names[name] = canonical
    encoder_state = {canonical: backbone.state[canonical] for canonical in names.values()}
    shape = read_shape(encoder_state, where)
    source = {
        name: encoder_state[name].float().clone(memory_format=torch.contiguous_format)
        for name in shape.tensor_shapes()
    }
    return Converted(
        layout=Layout(backbone.layout, backbone.prefix),
        shape=shape,
        source=source,
        model={to_detectron2(name): tensor for name, tensor in source.items()},
        names={name: to_detectron2(canonical) for name, canonical in names.items()},
        dropped=dropped,
        notes=backbone.notes,
    )


def yaml_lines(
    shape: ResNetShape, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]
) -> list[str]:
    """The lines a Detectron2 config needs for weights of this shape; widths only if not default."""
    lines = [
        "INPUT:",
        '  FORMAT: "RGB"',
        "MODEL:",
        f"  PIXEL_MEAN: {list(pixel_mean)}",
        f"  PIXEL_STD: {list(pixel_std)}",
        "  RESNETS:",
        "    STRIDE_IN_1X1: False",
    ]
    default = ResNetShape()
    for name in ("depth", "stem_out_channels", "res2_out_channels", "width_per_group"):
        if getattr(shape, name) != getattr(default, name):
            lines.append(f"    {name.upper()}: {getattr(shape, name)}")
    return lines


def _pixel_statistics(content: object, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of 0-255 pixels in pretraining or, of a detector, in training: from its config,
    else ImageNet's."""
    settings = settings_of(content)
    if settings is not None and settings["mean"]:
        mean, std = (tuple(round(255 * v, 4) for v in settings[key]) for key in ("mean", "std"))
        return mean, std
    extra = content.get("extra") if isinstance(content, Mapping) else None
    if not isinstance(extra, Mapping) or "config" not in extra:
        return IMAGENET_MEAN, IMAGENET_STD  # the reference and torchvision have no other
    try:
        data = extra["config"]["DATA"]
        mean, std = (tuple(round(255 * v, 4) for v in data[key]) for key in ("MEAN", "STD"))
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)):
            raise ValueError("three finite numbers are needed")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: its config has no usable DATA.MEAN and DATA.STD ({error!r}); "
            "give a checkpoint of tools/pretrain.py"
        ) from error
    return mean, std


def _write_weights(out: Path, model: dict[str, torch.Tensor]) -> str:
    """Write the weights file. Returns: its SHA-256."""
    _report_path(out).unlink(missing_ok=True)  # an old report must not describe new weights
    remove_beside(out)
    fields = {"__author__": AUTHOR, "matching_heuristics": True}
    if out.suffix == ".pth":
        write_atomic(out, lambda file: torch.save({"model": model, **fields}, file))
    else:
        arrays = {name: tensor.numpy() for name, tensor in model.items()}
        write_atomic(out, lambda file: write_pickled_arrays(file, {"model": arrays, **fields}))
    return sha256_of(out)


def _report_path(out: Path) -> Path:
    return Path(f"{out}.conversion.json")


def _as_json(report: ConversionReport) -> dict:
    return {
        "source": report.source.name,
        "source_sha256": report.source_sha256,
        "output": report.out.name,
        "output_sha256": report.out_sha256,
        "layout": report.layout._asdict(),
        "encoder": report.encoder,
        "arch": report.shape.arch,
        "stem_out_channels": report.shape.stem_out_channels,
        "res2_out_channels": report.shape.res2_out_channels,
        "width_per_group": report.shape.width_per_group,
        "num_mapped": len(report.names),
        "num_dropped": sum(map(len, report.dropped.values())),
        "mapped": report.names,
        "dropped": report.dropped,
        "notes": list(report.notes),
        "self_check": {**report.self_check, "image_size": list(SELF_CHECK_SIZE)},
        "yaml": report.yaml_lines,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
