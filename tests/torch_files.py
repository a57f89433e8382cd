"""Files of torch.save with single parts exchanged."""

from __future__ import annotations

import io
import zipfile

import torch


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def rezipped(data: bytes, how: int = zipfile.ZIP_STORED, **changes: bytes) -> bytes:
    """A torch file, written again with `how`, and with other bytes for pkl=, storage= entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", how) as new:
        for entry in old.infolist():
            kind = "pkl" if entry.filename.endswith("data.pkl") else "storage"
            is_changed = kind in changes and (kind == "pkl" or "/data/" in entry.filename)
            new.writestr(entry.filename, changes[kind] if is_changed else old.read(entry))
    return out.getvalue()


def in_archive(pickled: bytes) -> bytes:
    return rezipped(saved({"a": torch.zeros(2)}), pkl=pickled)
