"""Weights in Detectron2's `.pkl` form: read without running code, written for numpy 1 and 2.

`pickle.load` runs what the file says, and an allow-list of importable names can still be abused.
So nothing here imports or calls what a file names. Three gates:

1. every opcode must be in a short list, every global exactly one of those that numpy arrays
   need, and nothing may follow STOP;
2. a small stack machine runs the opcodes on inert stand-ins; an array is made only after its
   dtype, and its shape x item size against its payload, were checked;
3. the result must be a dict of str -> numeric array, or hold one under "model" (Detectron2) or
   "blobs" (Caffe2's Detectron).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from moco.errors import CheckpointError

MAX_OPCODES = 1_000_000  # a ResNet-50 has about 10,000; bounds memory and time
_MAX_DIMS = 8
_DTYPE = re.compile(r"f[248]|[iu][1248]")
_PUSH = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OTHERS = frozenset(
    "PROTO FRAME STOP MARK EMPTY_DICT TUPLE BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL "
    "STACK_GLOBAL REDUCE BUILD SETITEM SETITEMS".split()
)
_ALLOWED_OPCODES = _PUSH | _CONSTANTS.keys() | _TUPLES.keys() | _OTHERS
# Global named in a file -> what it stands for. numpy 2 writes numpy._core, numpy 1 numpy.core.
_GLOBALS = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
    **{f"numpy.{core}.multiarray _reconstruct": "reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": "scalar" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": "frombuffer" for core in ("core", "_core")},
}


class _Refused(Exception):
    """Why a file is refused; the reader adds the path."""


def read_pickled_arrays(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """The arrays of a `.pkl` weights file, and the plain values beside them.

    Returns: (arrays, fields). `arrays` is the "model" or "blobs" dict of a file, if it has one,
        else the file's own dict; native byte order, writable, numeric. `fields` holds the other
        entries of the former: str, bool, int, float or None.
    Raises: CheckpointError for a missing file and for any content other than that.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); give the path of a weights file"
        ) from error
    try:
        return _check_schema(_Machine(len(data)).run(_scan(data)))
    except _Refused as reason:
        raise CheckpointError(
            f"{path}: refused, {reason}; allowed: a pickled dict of numeric numpy arrays as "
            "tools/convert_to_d2.py and Detectron2 write; use a .pth file instead"
        ) from None


def write_pickled_arrays(file: BinaryIO, content: Mapping[str, object]) -> None:
    """Pickle `content` so that numpy 1 and numpy 2 read it.

    numpy 2 pickles name `numpy._core`, which numpy 1 lacks; both know `numpy.core`. Protocol 3
    is the last that writes global names as plain text, which can be replaced in place.
    """
    data = pickle.dumps(content, protocol=3)
    copied = 0
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name == "GLOBAL" and argument.startswith("numpy._core."):
            module, name = argument.replace("numpy._core.", "numpy.core.").split(" ")
            file.write(data[copied:position])
            file.write(f"c{module}\n{name}\n".encode())
            copied = position + len(f"c{argument}\n")
    file.write(data[copied:])


def _scan(data: bytes) -> list[tuple[str, object]]:
    """Gate 1. Returns: (opcode name, argument) up to and without STOP."""
    steps: list[tuple[str, object]] = []
    end = 0
    try:
        for opcode, argument, position in pickletools.genops(io.BytesIO(data)):
            name = opcode.name
            if name not in _ALLOWED_OPCODES:
                raise _Refused(f"it uses the pickle opcode {name} at byte {position}")
            if name == "GLOBAL":
                _meaning(argument)
            if len(steps) >= MAX_OPCODES:
                raise _Refused(f"it has more than {MAX_OPCODES} pickle opcodes")
            steps.append((name, argument))
            end = position + 1
    except ValueError as error:  # truncated, unknown opcode or bad text
        raise _Refused(f"it is not a whole pickle ({' '.join(str(error).split())[:100]})") from None
    if end != len(data):  # genops ends at STOP
        raise _Refused(f"{len(data) - end} bytes follow its end")
    return steps[:-1]


def _meaning(name: str) -> str:
    if name not in _GLOBALS:
        raise _Refused(f"it names {name[:80]!r}")
    return _GLOBALS[name]


class _Global:
    """Stand-in of an importable object: a label, never the object."""

    def __init__(self, meaning: str):
        self.meaning = meaning


class _DType:
    """Stand-in of a dtype: a checked code such as "f4", and its byte order once known."""

    def __init__(self, code: str):
        self.code = code
        self.order: str | None = None

    def resolve(self) -> np.dtype:
        if self.order is None:
            raise _Refused("a dtype has no byte order")
        return np.dtype(self.order + self.code)


class _Array:
    """Stand-in of an array: None until its state was checked."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value


_MARK = object()


class _Machine:
    """Gate 2: runs vetted opcodes. Everything on its stack is plain data or a stand-in."""

    def __init__(self, file_bytes: int):
        self.stack: list[object] = []
        self.memo: list[object] = []
        # Payloads may be shared through the memo; what is made from them may not outgrow the
        # file: once as bytes (protocol 2 keeps them as text), once as arrays.
        self.budget = 2 * file_bytes

    def run(self, steps: list[tuple[str, object]]) -> object:
        for name, argument in steps:
            self._step(name, argument)
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise _Refused("its pickle leaves no single object")
        return self.stack[0]

    def _step(self, name: str, argument) -> None:
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "TUPLE":
            self.stack.append(tuple(self._pop_to_mark()))
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "EMPTY_DICT":
            self.stack.append({})
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memoize(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            if argument >= len(self.memo):
                raise _Refused("it reads a memo entry that was never written")
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(_Global(_meaning(argument)))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop(2)
            if type(module) is not str or type(attribute) is not str:
                raise _Refused("it names a global by something other than text")
            self.stack.append(_Global(_meaning(f"{module} {attribute}")))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            self.stack.append(self._call(function, arguments))
        elif name == "BUILD":
            (state,) = self._pop(1)
            self._build(self._top(), state)
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._pop(2) if name == "SETITEM" else self._pop_to_mark())

    def _top(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Refused("its pickle stack runs empty")
        return self.stack[-1]

    def _pop(self, count: int) -> list[object]:
        values = self.stack[len(self.stack) - count :] if count else []
        if len(values) < count or any(value is _MARK for value in values):
            raise _Refused("its pickle stack runs empty")
        del self.stack[len(self.stack) - count :]
        return values

    def _pop_to_mark(self) -> list[object]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise _Refused("its pickle has no MARK where one is needed")

    def _memoize(self, index: int | None) -> None:
        # Picklers number entries in order; a far index would be a way to claim memory.
        if index is not None and index != len(self.memo):
            raise _Refused(f"it writes memo entry {index} out of order")
        self.memo.append(self._top())

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            raise _Refused("it sets items of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # before hashing: nested tuples hash in exponential time
                raise _Refused(f"a dict has a key of type {type(key).__name__.lstrip('_')}")
            if key in target:
                raise _Refused(f"the key {key[:80]!r} occurs twice")
            target[key] = value

    def _spend(self, num_bytes: int) -> None:
        self.budget -= num_bytes
        if self.budget < 0:
            raise _Refused("its arrays are larger than the file")

    def _call(self, function: object, arguments: object) -> object:
        if type(function) is not _Global or type(arguments) is not tuple:
            raise _Refused("it calls something that is no known global")
        match function.meaning, arguments:
            case "dtype", (str() as code, bool() | 0 | 1, bool() | 0 | 1):
                if not _DTYPE.fullmatch(code):
                    raise _Refused(f"an array has the dtype {code[:20]!r}, which is not numeric")
                return _DType(code)
            case "encode", (str() as text, "latin1" | "latin-1"):
                self._spend(len(text))
                return _latin1(text)
            case "reconstruct", (_Global(meaning="ndarray"), (0,), b"b" | "b"):
                return _Array()
            case "scalar", (_DType() as dtype, payload):
                return _Array(self._array(dtype, (), "C", payload))
            case "frombuffer", (payload, _DType() as dtype, shape, order):
                return _Array(self._array(dtype, shape, order, payload))
        raise _Refused(f"it calls {function.meaning} with unexpected arguments")

    def _build(self, target: object, state: object) -> None:
        match target, state:
            case _DType(order=None), (3, "<" | ">" | "|" as order, None, None, None, -1, -1, 0):
                target.order = order
            case _Array(value=None), (1, shape, _DType() as dtype, bool() | 0 | 1 as fortran, data):
                target.value = self._array(dtype, shape, "F" if fortran else "C", data)
            case _:
                raise _Refused("it sets the state of something other than a new array or dtype")

    def _array(self, dtype: _DType, shape: object, order: object, payload: object) -> np.ndarray:
        if type(shape) is not tuple or len(shape) > _MAX_DIMS or order not in ("C", "F"):
            raise _Refused("an array has an unusable shape")
        if any(type(size) is not int or not 0 <= size < 1 << 48 for size in shape):
            raise _Refused("an array has an unusable shape")
        if type(payload) is str:  # a Python 2 string
            self._spend(len(payload))
            payload = _latin1(payload)
        if type(payload) not in (bytes, bytearray):
            raise _Refused("an array's content is not bytes")
        resolved = dtype.resolve()
        num_bytes = math.prod(shape) * resolved.itemsize
        if num_bytes != len(payload):
            raise _Refused(f"an array of shape {shape} comes with {len(payload)} bytes")
        self._spend(num_bytes)
        array = np.frombuffer(payload, resolved).reshape(shape, order=order)
        return array.astype(resolved.newbyteorder("="), order="C", copy=True)


def _latin1(text: str) -> bytes:
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise _Refused("an array's content is not bytes") from None


def _check_schema(content: object) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Gate 3."""
    if type(content) is not dict:
        raise _Refused("it holds no dict")
    arrays, fields = content, {}
    wrapper = next((key for key in ("model", "blobs") if key in content), None)
    if wrapper is not None:
        arrays = content[wrapper]
        fields = {key: value for key, value in content.items() if key != wrapper}
    for key, value in fields.items():
        if value is not None and type(value) not in (str, bool, int, float):
            raise _Refused(f"the entry {key[:80]!r} is no plain value")
    if type(arrays) is not dict or not arrays:
        raise _Refused("it holds no dict of arrays")
    for name, value in arrays.items():
        if type(value) is not _Array or value.value is None:
            raise _Refused(f"the entry {name[:80]!r} is no numeric array")
    return {name: value.value for name, value in arrays.items()}, fields
