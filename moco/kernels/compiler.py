"""Compiles the kernels for this machine.

That takes a few seconds, once a process, by the C++ compiler that `$CXX` names, or c++, g++ or
clang++; nothing is kept on disk.
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

# The types that kernels of images have, as their names end.
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast",
)  # fmt: skip


def compile_kernels() -> float:
    """Compile and load the kernels, once a process. Returns: seconds that took.

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
def _compiled() -> tuple[dict[str, ctypes.CDLL], float]:
    started = time.monotonic()
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise ConfigError(
            f"no C++ compiler was found (looked for $CXX, {', '.join(_COMPILERS)}); install one, "
            "or set COMPILE eager"
        )
    with tempfile.TemporaryDirectory() as folder:
        built = {source: Path(folder) / f"{source.stem}.so" for source in _SOURCES}
        _compile(compiler, built)
        libraries = {source.stem: ctypes.CDLL(str(path)) for source, path in built.items()}
    return libraries, time.monotonic() - started


def _compile(compiler: str, built: dict[Path, Path]) -> None:
    """Compile all sources side by side."""
    command = [*compiler.split(), *_FLAGS, "-fPIC", "-shared", "-o"]
    running = [
        _start(compiler, [*command, str(path), str(source)]) for source, path in built.items()
    ]
    said = [process.communicate()[1] for process in running]  # all end before the folder does
    for source, process, text in zip(built, running, said, strict=True):
        if process.returncode:
            first = (text.strip() or "no message").splitlines()[0]
            raise ConfigError(
                f"C++ compiler {compiler!r} does not compile {source.name}: {first}; let CXX name "
                "one that does (C++17 with OpenMP), or set COMPILE eager"
            )


def _start(compiler: str, command: Sequence[str]) -> subprocess.Popen:
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
    except OSError as error:
        raise ConfigError(
            f"C++ compiler {compiler!r} cannot be run ({error.strerror}); let CXX name one "
            "that can, or set COMPILE eager"
        ) from error
