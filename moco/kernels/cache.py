"""Compiled kernels kept between processes, in the user's cache folder.

`$MOCO_KERNEL_CACHE` names another folder, or is `off`. A build is found again by all that it
depends on (sources, compiler, flags, processor, torch), and is loaded only from folders that
nobody else can write to and after each file was compared with the SHA-256 noted beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

SETTING = "MOCO_KERNEL_CACHE"
_OFF = ("off", "0", "")
_HASHES = "sha256.json"
_NUM_KEPT = 8  # builds; one has about 1 MB
_UNFINISHED = ".build-"


def folder() -> Path | None:
    """Where builds are kept, None where nothing is to be kept."""
    setting = os.environ.get(SETTING)
    if setting is not None:
        return None if setting.lower() in _OFF else Path(setting).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "moco_kernels"
    except RuntimeError:  # no home is known for this user
        return None


def key(sources: Iterable[Path], compiler: str, version: str, flags: Iterable[str]) -> str:
    """What a build depends on, as 32 hex digits.

    Args:
        sources: files of C++, headers too.
        version: what the compiler says of itself.
    """
    sha = hashlib.sha256()
    for part in (compiler, version, *flags, torch.__version__, platform.machine(), _processor()):
        sha.update(f"{len(part)} {part}\n".encode())
    for path in sorted(sources):
        content = path.read_bytes()
        sha.update(f"{path.name} {len(content)}\n".encode() + content)
    return sha.hexdigest()[:32]


def find(build: Path) -> bool:
    """Whether `build` holds what `keep` left there, and only this user can have written it."""
    try:
        if not (_is_private(build.parent) and _is_private(build)):
            return False
        hashes = json.loads((build / _HASHES).read_text(encoding="utf-8"))
        found = {p.name: _sha256(p) for p in build.iterdir() if p.name != _HASHES}
        os.utime(build)  # the builds used last are those that are kept
    except (OSError, ValueError):
        return False
    return bool(found) and found == hashes


def start(build: Path) -> Path | None:
    """A new folder beside `build` to compile into, None where the cache cannot be written to or
    somebody else can write there too."""
    try:
        build.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(build.parent):
            return None
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=build.parent))
    except OSError:
        return None


def keep(unfinished: Path, build: Path) -> bool:
    """Make a folder of `start` the build that `find` finds. Returns: whether it is there now."""
    try:
        hashes = {path.name: _sha256(path) for path in unfinished.iterdir()}
        (unfinished / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
        if not find(build):
            shutil.rmtree(build, ignore_errors=True)  # damaged, or not there
            try:
                os.rename(unfinished, build)
            except OSError:
                pass  # another process was first: `find` below says whether its build is good
        _remove_old(build)
    except OSError:
        return False
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return find(build)


def _remove_old(build: Path) -> None:
    builds = [p for p in build.parent.iterdir() if not p.name.startswith(_UNFINISHED)]
    builds.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in builds[_NUM_KEPT:]:
        if path != build:
            shutil.rmtree(path, ignore_errors=True)


def _is_private(path: Path) -> bool:
    """Whether it is a folder of this user's, not a link, that no other user can write to."""
    status = path.lstat()
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return stat.S_ISDIR(status.st_mode) and is_own and not others_write


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """Model and instruction sets: what -march=native asks for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
    first = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            first.setdefault(name.strip(), value.strip())
    return json.dumps(first, sort_keys=True)
