"""How to keep the tensors of a file that holds objects, found out without making any of them.

Such a file is not loaded, as that could run code. Its pickle is read with an inert stand-in for
every class and function that it names; nothing is imported or called but these.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

_MOST_BYTES = 1 << 26  # of the pickle alone, tensors lie elsewhere
# Where files keep weights, see `moco.training.layouts.named_tensors`.
_WEIGHTS = (
    "state_dict", "model", "model_state_dict", "student", "teacher", "classy_state_dict", "loss",
)  # fmt: skip
_ALLOWED = ("torch._utils._rebuild_", "torch.Size", "torch.device")  # by weights_only loading
_LOAD = "torch.load(FILE, weights_only=False)"
_KEEP = "it is not loaded, as that could run code. Where it was written, keep the tensors alone: "


class _Inert:
    """An object, or what a function returns: it keeps its state and does nothing."""

    origin, state = "", None

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state) -> None:
        self.state = state

    def __setitem__(self, key, value) -> None:
        pass

    def append(self, value) -> None:
        pass

    def extend(self, values) -> None:
        pass

    add = update = append


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        base = dict if (module, name) == ("collections", "OrderedDict") else _Inert
        return type("Inert", (base,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> type | None:
        """The class of a module, which torch's older format keeps with its source; a storage."""
        return pid[1] if isinstance(pid, tuple) and pid[0] == "module" else None


def how_to_keep_tensors(path: str | os.PathLike) -> str:
    """What to do with a torch file that holds objects, in words that end an error message: the
    line of Python that writes a file with its weights alone."""
    content = _outline(path)
    if _is_module(content):
        what = f"it is a whole pickled module ({content.origin}); "
        return f"{what}{_KEEP}torch.save({_LOAD}.state_dict(), OUT)"
    parts = []
    for name in _WEIGHTS if isinstance(content, dict) else ():
        part = content.get(name)
        if _is_module(part):
            parts.append(f"{name!r}: c[{name!r}].state_dict()")
        elif isinstance(part, dict) and part and _odd(part) is None:
            parts.append(f"{name!r}: c[{name!r}]")
    if not parts and isinstance(content, dict) and any(map(_is_tensor, content.values())):
        kept = "n: c[n] for n in c if torch.is_tensor(c[n])"
        return f"{_KEEP}c = {_LOAD}; torch.save({{{kept}}}, OUT)"
    kept = ", ".join(parts) or "'state_dict': c['state_dict']"
    return f"{_KEEP}c = {_LOAD}; torch.save({{{kept}}}, OUT)"


def _outline(path: str | os.PathLike) -> object:
    """The content of a torch file, inert; None where it cannot be read."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                [name] = [n for n in archive.namelist() if n.split("/")[-1] == "data.pkl"]
                if archive.getinfo(name).file_size > _MOST_BYTES:
                    return None
                with archive.open(name) as file:
                    return _Unpickler(file).load()
        with open(path, "rb") as file:
            return _legacy(file)
    except Exception:  # a damaged pickle raises nearly anything; it is read for a message only
        return None


def _legacy(file: BinaryIO) -> object:
    """torch's older format: magic number, version, machine and then the content, tensors last."""
    for _ in range(3):
        _Unpickler(file).load()
    return _Unpickler(file).load()


def _is_module(part: object) -> bool:
    return isinstance(part, _Inert) and isinstance(part.state, Mapping) and "_modules" in part.state


def _is_tensor(part: object) -> bool:
    return isinstance(part, _Inert) and part.origin.startswith("torch._utils._rebuild_")


def _odd(part: object, depth: int = 0) -> object | None:
    """The first object in nested containers that weights-only loading refuses."""
    if depth > 20:
        return part
    if isinstance(part, dict):
        parts = [*part.keys(), *part.values()]
    elif isinstance(part, list | tuple | set):
        parts = list(part)
    else:
        origin = getattr(part, "origin", "torch.Size")  # plain values have none
        is_type = origin.startswith("torch.") and origin.count(".") == 1  # torch.float32
        return None if is_type or origin.startswith(_ALLOWED) else part
    return next((odd for p in parts if (odd := _odd(p, depth + 1)) is not None), None)
