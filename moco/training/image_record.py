"""Which images weights were trained on, as hashes: checkpoints keep it, converted files carry it.

A checkpoint holds it under `extra`. Beside weights made from one lies
`<weights>.images.safetensors`, named with its SHA-256 in the report of the conversion or export.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from moco.data.image_rows import ROW_BYTES
from moco.errors import CheckpointError
from moco.training.checkpoint import read_json, sha256_of, write_atomic

KEY = "seen_images"  # in a checkpoint's `extra`
REPORT_KEY = "pretraining_images"  # in the report of a conversion or export
FORMAT = 1
_REPORTS = (".conversion.json", ".export.json")
_SUFFIX = ".images.safetensors"


@dataclass(frozen=True)
class ImageRecord:
    """The images that weights have seen.

    Attributes:
        rows: uint8 [n, 24] of `moco.data.image_rows`.
        lacks: why images may be missing; "" where none is.
    """

    rows: np.ndarray
    lacks: str = ""


@dataclass(frozen=True)
class Unknown:
    """No record, and why."""

    reason: str


def record_in(content: object, where: str) -> ImageRecord | Unknown:
    """The record in the content of a checkpoint of `tools/pretrain.py`.

    Raises: CheckpointError where it is damaged.
    """
    extra = content.get("extra") if isinstance(content, Mapping) else None
    found = extra.get(KEY) if isinstance(extra, Mapping) else None
    if found is None:
        written = "an older version of this project wrote it" if isinstance(extra, Mapping) else (
            "it is not a checkpoint of tools/pretrain.py"
        )
        # The name alone: a report that carries it on goes to other machines.
        return Unknown(f"{Path(where).name} has no record of its images: {written}")
    rows, lacks = checked_rows(found, "rows", where), found.get("lacks")
    earlier = checked_rows(found, "earlier", where)
    if not isinstance(lacks, str):
        raise CheckpointError(f"{where}: its record of images is damaged; give another file")
    return ImageRecord(np.unique(np.concatenate([rows, earlier]), axis=0), lacks)


def checked_rows(found: object, name: str, where: str) -> np.ndarray:
    """uint8 [n, 24], a tensor of a checkpoint's record. Raises: CheckpointError."""
    version = found.get("format") if isinstance(found, Mapping) else None
    rows = found.get(name) if isinstance(found, Mapping) else None
    if version == FORMAT and torch.is_tensor(rows) and rows.dtype == torch.uint8:
        if rows.dim() == 2 and rows.shape[1] == ROW_BYTES:
            return rows.numpy()
    raise CheckpointError(
        f"{where}: its record of images is damaged or of another version (format {version!r:.40}, "
        f"this code reads {FORMAT}); give another file"
    )


def record_of(path: str | os.PathLike, content: object) -> ImageRecord | Unknown:
    """The record of a weights file: in it, or beside it.

    Raises: CheckpointError where a record is damaged.
    """
    inside = record_in(content, str(path))
    if isinstance(inside, ImageRecord):
        return inside
    beside = record_beside(path)
    return inside if beside is None else beside


def record_beside(path: str | os.PathLike) -> ImageRecord | Unknown | None:
    """The record that a conversion or export left beside its weights; None without its report.

    Raises: CheckpointError where a file that the report names is damaged.
    """
    for suffix in _REPORTS:
        report = Path(f"{path}{suffix}")
        if report.is_file():
            return _read_beside(Path(path), report)
    return None


def _read_beside(path: Path, report: Path) -> ImageRecord | Unknown:
    content = read_json(report)
    content = content if isinstance(content, dict) else {}
    found = content.get(REPORT_KEY)
    if content.get("output_sha256") != sha256_of(path):
        return Unknown(f"{report} is of other weights than {path.name}")
    if not isinstance(found, dict):
        return Unknown(f"{report} has no record of images; an older version wrote it")
    if "file" not in found:
        return Unknown(str(found.get("unknown", f"{report} does not say")))
    file = path.with_name(Path(str(found["file"])).name)
    if not file.is_file():
        return Unknown(f"{file}, which {report.name} names, is missing")
    if sha256_of(file) != found.get("sha256"):
        raise CheckpointError(
            f"{file}: its SHA-256 is not the one in {report.name}; copy both again, or convert the "
            "checkpoint again"
        )
    try:
        rows = safetensors.numpy.load(file.read_bytes())["rows"]
    except (SafetensorError, KeyError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); convert again") from error
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != ROW_BYTES:
        raise CheckpointError(f"{file}: holds no rows of {ROW_BYTES} bytes; convert again")
    return ImageRecord(rows, str(found.get("lacks", "")))


def remove_beside(out: str | os.PathLike) -> None:
    """Remove the record of weights that are about to be replaced."""
    Path(f"{out}{_SUFFIX}").unlink(missing_ok=True)


def write_beside(out: str | os.PathLike, record: ImageRecord | Unknown) -> dict[str, object]:
    """Write the record of the weights `out` beside them. Returns: what their report says of it."""
    if isinstance(record, Unknown):
        remove_beside(out)
        return {"unknown": record.reason}
    path = Path(f"{out}{_SUFFIX}")
    # One entry: several would be written in an order that changes from process to process.
    about = {"format": str(FORMAT)}
    data = safetensors.numpy.save({"rows": np.ascontiguousarray(record.rows)}, about)
    write_atomic(path, lambda file: file.write(data), num_bytes=len(data))
    return {
        "file": path.name,
        "sha256": sha256_of(path),
        "num_images": len(record.rows),
        "lacks": record.lacks,
    }


def in_words(record: ImageRecord | Unknown) -> str:
    """One line for people."""
    if isinstance(record, Unknown):
        return f"images of the pretraining: unknown ({record.reason})"
    known = f"images of the pretraining: {len(record.rows)} are known by their hashes"
    return f"{known}; others may be missing: {record.lacks}" if record.lacks else known


def merged(parts: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [n, 24]: the rows of all parts, each once."""
    return np.unique(np.concatenate(parts), axis=0)
