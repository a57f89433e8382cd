"""Checkpoint files: written atomically with a manifest, read without running code.

A file counts as a checkpoint only once its manifest verifies, and the manifest is written last.
So whatever moment a process dies at, the newest verified checkpoint is whole. Which of them are
kept is in `retention.py`.
The layout of the pretraining checkpoint is the reference's (facebookresearch/moco,
main_moco.py): `epoch`, `arch`, `state_dict`, `optimizer`; all else is under `extra`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from moco.errors import CheckpointError
from moco.training.pickle_outline import how_to_keep_tensors
from moco.training.plain_content import as_plain, odd_part

EPOCH_FILE = re.compile(r"^checkpoint_(\d{4,})\.pth\.tar$")
STEP_FILE = re.compile(r"^checkpoint_step_(\d+)\.pth\.tar$")
MANIFEST_SUFFIX = ".manifest.json"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(
    path: str | os.PathLike, write: Callable[[BinaryIO], None], *, num_bytes: int | None = None
) -> None:
    """Write a file so that `path` holds either the old or the whole new content.

    Temporary file in the same folder -> flush, fsync -> rename -> fsync of the folder.

    Args:
        num_bytes: about how large it becomes, for the message of a full disk.
    Raises: CheckpointError where it cannot be written; nothing is left of it then.
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
        raise _write_error(path, error, num_bytes) from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_error(path: Path, error: OSError, num_bytes: int | None) -> CheckpointError:
    reason = error.strerror
    if error.errno in _NO_SPACE:
        needed = "" if num_bytes is None else f"about {num_bytes} bytes are needed, "
        reason += f"; {needed}{free_bytes(path.parent)} are free there"
    return CheckpointError(
        f"{path}: cannot be written ({reason}); free space or give another folder. "
        "What was there before is untouched"
    )


def free_bytes(folder: str | os.PathLike) -> int:
    """Bytes this user may still write where `folder` is, or where it would be made."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    data = text.encode()
    write_atomic(path, lambda file: file.write(data), num_bytes=len(data))


def write_json_atomic(path: str | os.PathLike, content: object) -> None:
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> object:
    """The content of a JSON file. Raises CheckpointError where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # the latter for deep nesting
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
    """Record the size and hash of a finished file beside it, with `fields` (JSON values).

    Where `fields` give `bytes` and `sha256`, known from writing, the file is not read again.
    """
    if "sha256" not in fields:
        fields = {"bytes": os.path.getsize(path), "sha256": sha256_of(path), **fields}
    write_json_atomic(manifest_path(path), fields)


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
    try:
        size = os.path.getsize(path)
        if size != manifest["bytes"]:
            raise CheckpointError(
                f"{path}: has {size} bytes, its manifest says {manifest['bytes']}"
            )
        if sha256_of(path) != manifest["sha256"]:
            raise CheckpointError(
                f"{path}: its SHA-256 differs from its manifest's; it was altered"
            )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return manifest


def step_in_manifest(path: str | os.PathLike) -> int | None:
    """Steps a checkpoint stands for, unverified; None where its manifest is missing or damaged."""
    try:
        step = read_json(manifest_path(path))["step"]
    except (CheckpointError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def read_torch_file(path: str | os.PathLike) -> object:
    """`torch.load` on the CPU with `weights_only=True`: tensors and plain values, never code.

    Raises: CheckpointError for a file that is missing, damaged or holds other objects; then it
        says how to write one without them.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: there is no such file; give the path of a checkpoint file")
    refuse_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            first = f" (first: {found.group(1)})" if found else ""
            reason = f"it holds objects other than tensors and plain values{first}; "
            reason += how_to_keep_tensors(path)
        else:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise CheckpointError(f"{path}: is not a readable checkpoint, {reason}") from error
    odd = odd_part(content)
    if odd:
        raise CheckpointError(f"{path}: is not a readable checkpoint, {odd}; give another file")
    return content


def refuse_compressed(path: str | os.PathLike) -> None:
    """Raise CheckpointError for an archive with compressed entries.

    torch.save never compresses; torch.load would unpack half a megabyte to gigabytes.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [e.filename for e in archive.infolist() if e.compress_type]
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: is a damaged archive ({error})") from error
    if packed:
        raise CheckpointError(
            f"{path}: its entry {packed[0][:80]!r} is compressed, which torch.save never does; "
            "write it again with torch.save"
        )


class _Sink:
    """What torch.save writes into: counts and hashes on the way, so nothing is read again."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None
        self.num_bytes, self.sha = 0, hashlib.sha256()

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(path: str | os.PathLike, content: dict, **manifest_fields: object) -> None:
    """Write a checkpoint atomically, then its manifest. Tensors are written as `as_plain` has them.

    Until both are there an older file of that name, with its manifest, either still verifies or,
    its manifest being of another hash, does not: a manifest never vouches for the wrong file.
    """
    found, content = {}, as_plain(content)

    def write(file: BinaryIO) -> None:
        sink = _Sink(file)
        try:
            torch.save(content, sink)
        except RuntimeError as error:
            if sink.error is None:
                raise
            # torch reports a failed write as an archive whose positions do not match.
            raise sink.error from error
        found.update(bytes=sink.num_bytes, sha256=sink.sha.hexdigest())

    write_atomic(path, write, num_bytes=tensor_bytes(content))
    write_manifest(path, **found, **manifest_fields)


def tensor_bytes(content: object) -> int:
    """Bytes of all tensors in nested dicts and lists: nearly all of what a file of them takes."""
    if torch.is_tensor(content):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(tensor_bytes, content.values()))
    return sum(map(tensor_bytes, content)) if isinstance(content, list | tuple) else 0


def checkpoint_files(run_dir: str | os.PathLike) -> list[Path]:
    """The pretraining checkpoints of a run, by name only; unsorted, verified by nobody."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    return [p for p in run_dir.iterdir() if EPOCH_FILE.match(p.name) or STEP_FILE.match(p.name)]


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
        step = step_in_manifest(path)
        if step is None:
            refused.append((path, f"{path}: has no readable manifest"))
        else:
            candidates.append((step, path))
    for _, path in sorted(candidates, reverse=True):
        try:
            return path, verify_manifest(path), refused
        except CheckpointError as error:
            refused.append((path, str(error)))
    return None, None, refused


def find_checkpoint(
    run_dir: str | os.PathLike, resume: bool, say: Callable[[str], None]
) -> Path | None:
    """The newest checkpoint of a run that verifies, to continue from; None where there is none.

    Args:
        say: receives why others were refused.
    Raises: CheckpointError where the folder holds a run and it is not to be resumed.
    """
    found = checkpoint_files(run_dir)
    if found and not resume:
        raise CheckpointError(
            f"{run_dir}: already holds {len(found)} checkpoints of a run; add --resume to continue "
            "it, or give another --output-dir"
        )
    path, _, refused = latest_verified(run_dir)
    for _, reason in refused:
        say(f"refused: {reason}")
    return path


def remove_checkpoint(path: str | os.PathLike) -> None:
    """Remove a checkpoint and then its manifest: a kill between leaves a manifest of nothing."""
    Path(path).unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)
