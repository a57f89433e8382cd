"""Backbones for other libraries: torchvision's or timm's names, as torch or safetensors files.

A file is written only after a network built from its very bytes gave, on a random image, bitwise
the features of the source (`export_check.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from moco.errors import CheckpointError
from moco.training.checkpoint import sha256_of, write_atomic, write_json_atomic
from moco.training.export_check import check_export, network_for
from moco.training.image_record import REPORT_KEY, record_of, remove_beside, write_beside
from moco.training.layouts import (
    Backbone,
    ViT,
    find_source,
    read_backbone,
    read_weights,
    settings_of,
)

SUFFIXES = {"torchvision": ".pth", "timm": ".pth", "safetensors": ".safetensors"}
FORMATS = tuple(SUFFIXES)


@dataclass(frozen=True)
class Export:
    """What `export_backbone` did.

    record: what `<out>.export.json` holds. is_new: False where the file was there with the same
    bytes. refused: newer checkpoints of a run that were passed over, with the reason.
    """

    source: Path
    out: Path
    backbone: Backbone
    record: dict[str, object]
    is_new: bool
    refused: list[tuple[Path, str]]


def export_backbone(
    source_path: str | os.PathLike,
    out_path: str | os.PathLike,
    *,
    form: str,
    encoder: str = "query",
    num_heads: int | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
) -> Export:
    """Write the backbone of a checkpoint file, or of a run folder's newest verified one.

    Writes `out_path` and `<out_path>.export.json`, each atomically. Same source, same bytes.

    Args:
        form: one of FORMATS. encoder: "query" or "key".
        num_heads: of a ViT whose file does not say it. drop: see `read_backbone`.
        overwrite: replace an `out_path` of other content.
    Raises: CheckpointError for a source that cannot be read (see `read_backbone`), a network the
        format has no names for, another suffix, an `out_path` that holds something else, or
        features that differ. Nothing is written then.
    """
    out = Path(out_path)
    if out.suffix != SUFFIXES[form]:
        raise CheckpointError(
            f"{out}: the output's suffix is {out.suffix!r}; format {form} writes {SUFFIXES[form]}"
        )
    source, refused = find_source(source_path)
    content = read_weights(source)
    if out.exists() and out.samefile(source):
        raise CheckpointError(f"{out}: is the source itself; give another output file")
    backbone = read_backbone(
        content, str(source), encoder=encoder, num_heads=num_heads, drop=drop
    )
    images = record_of(source, content)
    target = network_for(backbone.network, form, str(source))
    source_sha256 = sha256_of(source)
    data = serialise(backbone, form, source_sha256)
    check = check_export(backbone, parse(data, form), target, str(source))
    sha256 = hashlib.sha256(data).hexdigest()
    is_new = _may_write(out, sha256, overwrite)
    record = {
        "source": source.name,
        "source_sha256": source_sha256,
        "output": out.name,
        "output_sha256": sha256,
        "format": form,
        **describe(backbone),
        "network": target.call,
        "missing_there": list(target.missing),
        "pixels": _pixels(content),
        "num_mapped": len(backbone.names),
        "num_dropped": sum(map(len, backbone.dropped.values())),
        "mapped": backbone.names,
        "dropped": backbone.dropped,
        "notes": list(backbone.notes),
        "self_check": check,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    if is_new:
        report_path(out).unlink(missing_ok=True)  # an old report must not describe new weights
        remove_beside(out)
        write_atomic(out, lambda file: file.write(data), num_bytes=len(data))
        if sha256_of(out) != sha256:
            raise CheckpointError(f"{out}: reads back other than written; check the disk")
    record[REPORT_KEY] = write_beside(out, images)
    write_json_atomic(report_path(out), record)
    return Export(source, out, backbone, record, is_new, refused)


def report_path(out: str | os.PathLike) -> Path:
    return Path(f"{out}.export.json")


def describe(backbone: Backbone) -> dict[str, object]:
    """What a reader has to know about the tensors; JSON values."""
    network = backbone.network
    facts: dict[str, object] = {
        "arch": network.arch,
        "layout": backbone.layout,
        "encoder": backbone.encoder,
        "names": "timm" if isinstance(network, ViT) else "torchvision",
    }
    if isinstance(network, ViT):
        return {
            **facts,
            "num_heads": network.num_heads,
            "image_size": network.image_size,
            "patch_size": network.patch_size,
        }
    return {**facts, "planes": network.planes, "stem": network.stem}


def serialise(backbone: Backbone, form: str, source_sha256: str) -> bytes:
    """The bytes of the file; the same for the same tensors, whenever they are made."""
    # Clones: a view would take the whole of its storage along.
    state = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in backbone.state.items()
    }
    if form != "safetensors":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()
    facts = {"format": "pt", "source_sha256": source_sha256, **describe(backbone)}
    metadata = {name: str(value) for name, value in facts.items() if value is not None}
    return _with_sorted_header(safetensors.torch.save(state, metadata))


def parse(data: bytes, form: str) -> dict[str, torch.Tensor]:
    """The tensors of a file's bytes, the inverse of `serialise`."""
    if form == "safetensors":
        return safetensors.torch.load(data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _with_sorted_header(data: bytes) -> bytes:
    """The library writes its metadata in an order that changes from process to process."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _may_write(out: Path, sha256: str, overwrite: bool) -> bool:
    """Whether `out` has to be written. Raises CheckpointError where it holds something else."""
    if not out.exists():
        return True
    if not out.is_file():
        raise CheckpointError(f"{out}: is no file; give the name of a file to write")
    if sha256_of(out) == sha256:
        return False
    if not overwrite:
        raise CheckpointError(
            f"{out}: exists and holds other bytes; add --overwrite to replace them, or give "
            "another file"
        )
    return True


def _pixels(content: object) -> dict[str, object] | None:
    """Size and statistics of the images that the network was trained with, where they are known."""
    settings = settings_of(content)
    if settings is not None:
        return {"mean": settings["mean"], "std": settings["std"]} if settings["mean"] else None
    extra = content.get("extra") if isinstance(content, Mapping) else None
    config = extra.get("config") if isinstance(extra, Mapping) else None
    data = config.get("DATA") if isinstance(config, Mapping) else None
    if not isinstance(data, Mapping):
        return None
    return {key.lower(): data[key] for key in ("SIZE", "MEAN", "STD") if key in data}
