"""Compiles the kernels for this machine.

That takes a few seconds by the C++ compiler that `$CXX` names, or c++, g++ or clang++. Later
processes load what was compiled from the user's cache folder (`moco/kernels/cache.py`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn

from moco.errors import ConfigError
from moco.kernels import cache

# The types that kernels of images have, as their names end.
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip


def compile_kernels() -> str:
    """Load the kernels, once a process.

    Returns: in words, whether they were compiled now or before.
    Raises: ConfigError, in one line, where there is no compiler or it fails.
    """
    return _compiled()[1]


@functools.cache
def kernel(source: str, name: str, num_pointers: int, *sizes: type) -> ctypes._CFuncPtr:
    """The function `name` of `source`.cpp, which takes `sizes` and then pointers.

    Raises: ConfigError as `compile_kernels`.
    """
    function = library(source)[name]
    function.argtypes = [*sizes, *[ctypes.c_void_p] * num_pointers]
    function.restype = None
    return function


def computes(module: nn.Module) -> bool:
    """Whether `use_kernels_` chose the module for what it does now; not where something that is
    hooked onto it waits for its call."""
    if not getattr(module, "compiled", False):
        return False
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_hooks
    evaluates = getattr(module, "compiled_evaluation", False) and not torch.is_grad_enabled()
    return (module.training or evaluates) and not any(hooks)


def is_compiled() -> bool:
    """Whether this process has the kernels."""
    return _compiled.cache_info().currsize > 0


def library(source: str) -> ctypes.CDLL:
    """All of `source`.cpp. Raises: ConfigError as `compile_kernels`."""
    return _compiled()[0][source]


@functools.cache
def has_kernel(source: str, name: str) -> bool:
    """Whether `source`.cpp has the function on this processor."""
    return hasattr(library(source), name)


@functools.cache
def _compiled() -> tuple[dict[str, ctypes.CDLL], str]:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise ConfigError(
            f"no C++ compiler was found (looked for $CXX, {', '.join(_COMPILERS)}); install one, "
            "or set COMPILE eager"
        )
    return _from_cache(compiler) or _from_temporary_folder(compiler)


def _from_cache(compiler: str) -> tuple[dict[str, ctypes.CDLL], str] | None:
    """From the user's cache, compiled into it where it lacks them; None where there is no cache."""
    folder = cache.folder()
    if folder is None:
        return None
    name = cache.key((*_SOURCES, *_HEADERS), compiler, _version(compiler), _FLAGS)
    build = folder / name
    origin = f"compiled before, kept in {folder}"
    if not cache.find(build):
        unfinished = cache.start(build)
        if unfinished is None:
            return None
        try:
            origin = f"compiled in {_compile(compiler, unfinished):.1f} s, kept in {folder}"
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if not cache.keep(unfinished, build):
            return None
    try:
        return _load(build), origin
    except OSError:  # a file system whose files cannot be executed
        return None


def _from_temporary_folder(compiler: str) -> tuple[dict[str, ctypes.CDLL], str]:
    with tempfile.TemporaryDirectory() as folder:
        seconds = _compile(compiler, Path(folder))
        return _load(Path(folder)), f"compiled in {seconds:.1f} s"


def _library_path(folder: Path, source: Path) -> Path:
    return folder / f"{source.stem}.so"


def _load(folder: Path) -> dict[str, ctypes.CDLL]:
    return {source.stem: ctypes.CDLL(str(_library_path(folder, source))) for source in _SOURCES}


def _version(compiler: str) -> str:
    """What the compiler says of itself, and which file it is."""
    first, *rest = compiler.split()
    process = _start(compiler, [first, *rest, "--version"], stdout=subprocess.PIPE)
    return f"{shutil.which(first)} {process.communicate()[0]}"


def _compile(compiler: str, folder: Path) -> float:
    """Compile all sources side by side into a folder. Returns: seconds that took."""
    started = time.monotonic()
    command = [*compiler.split(), *_FLAGS, "-fPIC", "-shared", "-o"]
    running = [
        _start(compiler, [*command, str(_library_path(folder, source)), str(source)])
        for source in _SOURCES
    ]
    said = [process.communicate()[1] for process in running]  # all end before the folder does
    for source, process, text in zip(_SOURCES, running, said, strict=True):
        if process.returncode:
            first = (text.strip() or "no message").splitlines()[0]
            raise ConfigError(
                f"C++ compiler {compiler!r} does not compile {source.name}: {first}; let CXX name "
                "one that does (C++17 with OpenMP), or set COMPILE eager"
            )
    return time.monotonic() - started


def _start(
    compiler: str, command: Sequence[str], stdout: int = subprocess.DEVNULL
) -> subprocess.Popen:
    try:
        return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise ConfigError(
            f"C++ compiler {compiler!r} cannot be run ({error.strerror}); let CXX name one "
            "that can, or set COMPILE eager"
        ) from error
