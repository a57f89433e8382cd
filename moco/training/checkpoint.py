"""Checkpoint files: written atomically with a manifest, read without running code.

A file counts as a checkpoint only once its manifest verifies, and the manifest is written last.
So whatever moment a process dies at, the newest verified checkpoint is whole.
The layout of the pretraining checkpoint is the reference's (facebookresearch/moco,
main_moco.py): `epoch`, `arch`, `state_dict`, `optimizer`; all else is under `extra`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from moco.errors import CheckpointError

_EPOCH_FILE = re.compile(r"^checkpoint_(\d{4,})\.pth\.tar$")
_STEP_FILE = re.compile(r"^checkpoint_step_(\d+)\.pth\.tar$")
MANIFEST_SUFFIX = ".manifest.json"


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that `path` holds either the old or the whole new content.

    Temporary file in the same folder -> flush, fsync -> rename -> fsync of the folder.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror}); free space or give another folder. "
            "What was there before is untouched"
        ) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json_atomic(path: str | os.PathLike, content: object) -> None:
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> object:
    """The content of a JSON file. Raises CheckpointError where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is no valid JSON ({error}); restore it") from error


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, in hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def manifest_path(path: str | os.PathLike) -> Path:
    return Path(f"{path}{MANIFEST_SUFFIX}")


def write_manifest(path: str | os.PathLike, **fields: object) -> None:
    """Record the size and hash of a finished file beside it, with `fields` (JSON values)."""
    content = {"bytes": os.path.getsize(path), "sha256": sha256_of(path), **fields}
    write_json_atomic(manifest_path(path), content)


def verify_manifest(path: str | os.PathLike) -> dict:
    """The manifest of `path`, after its size and hash were compared with the file.

    Raises: CheckpointError that says which of them fails.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: does not exist")
    if not manifest_path(path).is_file():
        raise CheckpointError(f"{path}: has no manifest, so its writing was not finished")
    manifest = read_json(manifest_path(path))
    if not isinstance(manifest, dict) or not {"bytes", "sha256"} <= manifest.keys():
        raise CheckpointError(f"{manifest_path(path)}: lacks 'bytes' and 'sha256'")
    size = os.path.getsize(path)
    if size != manifest["bytes"]:
        raise CheckpointError(f"{path}: has {size} bytes, its manifest says {manifest['bytes']}")
    if sha256_of(path) != manifest["sha256"]:
        raise CheckpointError(f"{path}: its SHA-256 differs from its manifest's; it was altered")
    return manifest


def read_torch_file(path: str | os.PathLike) -> object:
    """`torch.load` on the CPU with `weights_only=True`: tensors and plain values, never code.

    Raises: CheckpointError for a file that is missing, damaged or holds other objects.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: there is no such file; give the path of a checkpoint file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            reason = "it holds objects other than tensors and plain values"
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise CheckpointError(f"{path}: is not a readable checkpoint, {reason}") from error


def save_checkpoint(path: str | os.PathLike, content: dict, **manifest_fields: object) -> None:
    """Write a checkpoint atomically, then its manifest."""
    # A stale manifest must never vouch for a new file of the same name.
    manifest_path(path).unlink(missing_ok=True)
    write_atomic(path, lambda file: torch.save(content, file))
    write_manifest(path, **manifest_fields)


def checkpoint_files(run_dir: str | os.PathLike) -> list[Path]:
    """The pretraining checkpoints of a run, by name only; unsorted, verified by nobody."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    return [p for p in run_dir.iterdir() if _EPOCH_FILE.match(p.name) or _STEP_FILE.match(p.name)]


def latest_verified(
    run_dir: str | os.PathLike,
) -> tuple[Path | None, dict | None, list[tuple[Path, str]]]:
    """The newest checkpoint of a run that verifies.

    Returns: (path, its manifest, refused), the first two None where there is none; `refused`
        lists newer or unfinished files with the reason.
    """
    refused: list[tuple[Path, str]] = []
    candidates: list[tuple[int, Path]] = []
    for path in checkpoint_files(run_dir):
        try:
            step = read_json(manifest_path(path))["step"] if manifest_path(path).exists() else None
        except (CheckpointError, KeyError, TypeError):
            step = None
        if step is None:
            refused.append((path, f"{path}: has no readable manifest"))
        else:
            candidates.append((int(step), path))
    for _, path in sorted(candidates, reverse=True):
        try:
            return path, verify_manifest(path), refused
        except CheckpointError as error:
            refused.append((path, str(error)))
    return None, None, refused


def remove_checkpoint(path: str | os.PathLike) -> None:
    """Remove a checkpoint; its manifest goes first, so a half-removed one never verifies."""
    manifest_path(path).unlink(missing_ok=True)
    Path(path).unlink(missing_ok=True)


def prune(run_dir: str | os.PathLike, *, keep_last: int, milestone: int) -> None:
    """Keep the newest `keep_last` checkpoints and those at multiples of `milestone` steps.

    Checkpoints written at a stop (`checkpoint_step_*`) go as soon as a newer one exists. The
    newest verified one is never removed.

    Args:
        milestone: in steps; 0 keeps none for good.
    """
    newest, manifest, _ = latest_verified(run_dir)
    if newest is None:
        return
    steps = {}
    for path in checkpoint_files(run_dir):
        if manifest_path(path).exists():
            steps[path] = int(read_json(manifest_path(path))["step"])
    epochs = [p for p in sorted(steps, key=steps.get, reverse=True) if _EPOCH_FILE.match(p.name)]
    for path, step in steps.items():
        if path == newest or step >= manifest["step"]:
            continue
        at_stop = bool(_STEP_FILE.match(path.name))
        is_milestone = not at_stop and milestone and step % milestone == 0
        if at_stop or (path not in epochs[:keep_last] and not is_milestone):
            remove_checkpoint(path)
