"""Reading `.pkl` weights: every protocol of numpy works, and no hostile file does anything."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from detection.safe_pickle import MAX_OPCODES, read_pickled_arrays, write_pickled_arrays
from moco.errors import CheckpointError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "c": np.arange(3, dtype=">f4"),
    "d": np.float16([1.5, -2.0]),
    "e": np.array([1, 200, 255], np.uint8),
    "f": np.array(7, np.int64),
    "g": np.zeros((0, 3), np.float32),
    "h": np.arange(8, dtype=np.float32)[::2],
}


def read(tmp_path: Path, data: bytes):
    (tmp_path / "w.pkl").write_bytes(data)
    return read_pickled_arrays(tmp_path / "w.pkl")


def assert_same(given: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(given) == list(wanted)
    for name, array in wanted.items():
        assert given[name].dtype == array.dtype.newbyteorder("=")
        assert given[name].shape == array.shape and np.array_equal(given[name], array)
        assert given[name].flags.writeable and given[name].dtype.isnative


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays_of_every_protocol(protocol, tmp_path):
    arrays = dict(ARRAYS)
    if protocol == 2:
        del arrays["g"]  # an empty payload needs one more global there, which is not allowed
    given, fields = read(tmp_path, pickle.dumps(arrays, protocol))
    assert fields == {}
    assert_same(given, arrays)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_detectron2s_form(protocol, tmp_path):
    fields = {"__author__": "someone", "matching_heuristics": True, "n": 3, "x": None, "y": 0.5}
    content = {"model": {"a": ARRAYS["a"], "s": np.float32(2.5)}, **fields}
    arrays, given = read(tmp_path, pickle.dumps(content, protocol))
    assert given == fields
    assert_same(arrays, {"a": ARRAYS["a"], "s": np.array(2.5, np.float32)})


def test_a_python_2_pickle(tmp_path):
    # By hand, as Python 2 writes: names and payloads are 8-bit strings.
    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    payload = np.array([1.5, -3.25, 1e-3], "<f4").tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"f4") + b"K\0K\1\x87R(K\3" + text(b"<") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85"
    array += text(b"b") + b"\x87R"
    array += b"(K\1K\3\x85" + dtype + b"\x89" + text(payload) + b"tb"
    arrays, _ = read(tmp_path, b"\x80\2}" + text(b"conv1_w") + array + b"s.")
    assert_same(arrays, {"conv1_w": np.array([1.5, -3.25, 1e-3], np.float32)})


def test_what_is_written_is_read_by_both_readers(tmp_path):
    content = {"model": ARRAYS, "__author__": "x", "matching_heuristics": True}
    with open(tmp_path / "w.pkl", "wb") as file:
        write_pickled_arrays(file, content)
    arrays, fields = read_pickled_arrays(tmp_path / "w.pkl")
    assert_same(arrays, ARRAYS)
    with open(tmp_path / "w.pkl", "rb") as file:
        plain = pickle.load(file, encoding="latin1")  # as Detectron2 does; the file is our own
    assert {key: plain[key] for key in fields} == fields
    for name, array in ARRAYS.items():
        assert plain["model"][name].dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(plain["model"][name], array)


def test_a_global_name_inside_an_array_is_left_alone():
    # Only opcodes are rewritten, not bytes that happen to look like one.
    lure = b"cnumpy._core.multiarray\n_reconstruct\n"
    file = io.BytesIO()
    write_pickled_arrays(file, {"a": np.frombuffer(lure, np.uint8)})
    assert lure in file.getvalue() and file.getvalue().count(b"_core") == 1
    names = [a for o, a, _ in pickletools.genops(file.getvalue()) if o.name == "GLOBAL"]
    assert "numpy.core.multiarray _reconstruct" in names


# --- hostile files ---------------------------------------------------------------------------

TOUCHED = "touched_by_a_pickle"
DTYPE = (
    b"cnumpy\ndtype\nX\2\0\0\0f4\x89\x88\x87R"
    b"(K\3X\1\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
)
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: bytes, start: bytes = b"\x80\4") -> bytes:
    """A pickle of {"a": value}."""
    return start + b"}" + text("a") + value + b"s."


def an_array(shape: bytes = b"K\1\x85", payload: bytes = b"C\4\0\0\0\0", dtype=DTYPE) -> bytes:
    return EMPTY + b"(K\1" + shape + dtype + b"\x89" + payload + b"tb"


class Reduces:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def dumped(content: object, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol)


TOUCH = f"open({TOUCHED!r}, 'w').close()"
COMMAND = f"touch {TOUCHED}"
HOSTILE = {
    "os.system": dumped({"a": Reduces(os.system, COMMAND)}),
    "os.system, protocol 0": dumped({"a": Reduces(os.system, COMMAND)}, 0),
    "os.system, protocol 4": dumped({"a": Reduces(os.system, COMMAND)}, 4),
    "eval": dumped({"a": Reduces(eval, TOUCH)}),
    "exec at the top": dumped(Reduces(exec, TOUCH)),
    "getattr chain": dumped({"a": Reduces(getattr, Reduces(builtins.__import__, "os"), "system")}),
    "open for writing": dumped({"a": Reduces(open, TOUCHED, "w")}, 5),
    "nested reduce inside arguments": dumped({"a": Reduces(np.dtype, Reduces(eval, TOUCH))}),
    "numpy function": whole(b"cnumpy\nload\n" + text("/etc/hostname") + b"\x85R"),
    "numpy runstring": whole(
        b"cnumpy.testing._private.utils\nrunstring\n" + text(TOUCH) + b"}\x86R"
    ),
    "attribute of an allowed name": whole(b"cnumpy\nndarray.tofile\n" + text(TOUCHED) + b"\x85R"),
    "allowed name of another module": whole(b"cos\nencode\n)R"),
    "build on a function's defaults": whole(
        b"cnumpy.core.multiarray\n_reconstruct\n}" + text("__defaults__") + b")sb"
    ),
    "build on a global, two states": whole(b"c_codecs\nencode\nN}" + text("__code__") + b"Ns\x86b"),
    "build with __setstate__": whole(EMPTY + b"}" + text("__setstate__") + b"cnumpy\ndtype\nsb"),
    "build on a dict": whole(b"}}" + text("__class__") + b"Nsb"),
    "build an array twice": whole(
        an_array() + b"(K\1K\1\x85" + DTYPE + b"\x89C\4\0\0\0\0tb"
    ),
    "build a dtype twice": whole(an_array(dtype=DTYPE + DTYPE[DTYPE.index(b"(") :])),
    "call an array": whole(an_array() + b")R"),
    "call a string": whole(text("os.system") + text(COMMAND) + b"\x85R"),
    "call with a dict of arguments": whole(b"cnumpy\ndtype\n}R"),
    "reconstruct another class": whole(
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\0\x85C\1b\x87R"
    ),
    "huge shape": whole(an_array(shape=b"\x8a\6" + (1 << 40).to_bytes(6, "little") + b"\x85")),
    "shape that overflows to the payload's size": whole(
        an_array(shape=b"\x8a\5\0\0\0\0\1" * 2 + b"\x86", payload=b"C\0")
    ),
    "negative shape": whole(an_array(shape=b"J\xff\xff\xff\xff\x85")),
    "boolean shape": whole(an_array(shape=b"\x88\x85")),
    "shape of hundreds of axes": whole(an_array(shape=b"(" + b"K\1" * 300 + b"t")),
    "short payload": whole(an_array(payload=b"C\3\0\0\0")),
    "payload is a number": whole(an_array(payload=b"K\4")),
    "payload outside latin-1": whole(an_array(payload=text("\u20ac\u20ac\u20ac\u20ac"))),
    "object dtype": dumped({"a": np.array([os.system, "x"], dtype=object)}),
    "object dtype by hand": whole(an_array(dtype=DTYPE.replace(b"\2\0\0\0f4", b"\2\0\0\0O8"))),
    "structured dtype": dumped({"a": np.zeros(2, dtype=[("x", "f4")])}),
    "text dtype": dumped({"a": np.array(["x"])}),
    "dtype without byte order": whole(an_array(dtype=DTYPE[: DTYPE.index(b"(")])),
    "trailing bytes": dumped({"a": ARRAYS["a"]}) + b"\0",
    "a second pickle behind": dumped({"a": ARRAYS["a"]}) + dumped(Reduces(os.system, COMMAND)),
    "truncated": dumped({"a": ARRAYS["a"]})[:-20],
    "truncated by one": dumped({"a": ARRAYS["a"]})[:-1],
    "length beyond the end": b"\x80\4B\xff\xff\xff\xffx.",
    "64-bit length": b"\x80\4\x8e" + b"\xff" * 8 + b"x.",
    "empty file": b"",
    "not a pickle": b"PK\3\4 something else",
    "far memo index": b"\x80\2}r\xff\xff\xff\xff.",
    "memo read before written": b"\x80\2h\5.",
    "memo overwritten": b"\x80\2}q\0q\0.",
    "memo bomb as key": b"\x80\4})\x94" + b"".join(
        b"h" + bytes([i]) + b"\x86\x94" for i in range(100)  # 2^100 leaves to hash
    ) + b"Ns.",
    "shared payload larger than the file": (
        b"\x80\4}(" + text("p") + b"B" + struct.pack("<I", 4096) + bytes(4096) + b"\x94"
        + b"".join(
            text(str(i)) + an_array(shape=b"M\0\4\x85", payload=b"h\0") for i in range(40)
        ) + b"u."
    ),
    "too many opcodes": b"\x80\4" + b"N0" * 3 + b"N" * (MAX_OPCODES + 1) + b".",
    "too many allowed opcodes": b"\x80\4" + b"N" * (MAX_OPCODES + 1) + b".",
    "deep tuples": b"\x80\4}" + text("a") + b")" + b"\x85" * 100_000 + b"s.",
    "a dict within itself": b"\x80\2}q\0" + text("model") + b"h\0s.",
    "INST": b"(" + text(COMMAND) + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text(COMMAND) + b"o.",
    "OBJ of an allowed global": b"(cnumpy\ndtype\n" + text("f4") + b"o.",
    "NEWOBJ": dumped({"a": OrderedDict.__new__(OrderedDict)}, 2).replace(b"R", b"\x81"),
    "NEWOBJ_EX": whole(b"cnumpy\nndarray\n(K\1t}\x92"),
    "persistent id": b"Pos.system\n.",
    "binary persistent id": b"\x80\2" + text("x") + b"Q.",
    "EXT1": b"\x80\2\x82\1.",
    "EXT2": b"\x80\2\x83\1\0.",
    "EXT4": b"\x80\2\x84\1\0\0\0.",
    "NEXT_BUFFER": b"\x80\5\x97.",
    "STACK_GLOBAL of os.system": whole(
        text("os") + text("system") + b"\x93" + text(COMMAND) + b"\x85R"
    ),
    "STACK_GLOBAL with a computed name": whole(
        b"c_codecs\nencode\n" + text("os") + text("latin1") + b"\x86R" + text("system") + b"\x93"
    ),
    "STACK_GLOBAL with names from the memo": (
        b"\x80\4}" + text("system") + b"\x94" + text("os") + b"\x94h\1h\0\x93s."
    ),
    "STACK_GLOBAL of a list": whole(b"))\x93"),
    "dotted STACK_GLOBAL": whole(text("numpy") + text("ndarray.__class__") + b"\x93"),
    "newline in a name": whole(text("numpy\nos") + text("dtype") + b"\x93"),
    "POP and DUP": b"\x80\2}20.",
    "lists": dumped([ARRAYS["a"]]),
    "a set": dumped({1, 2}, 4),
    "OrderedDict": dumped(OrderedDict(a=ARRAYS["a"])),
    "empty stack": b"\x80\2.",
    "two objects": b"\x80\2}}.",
    "a mark alone": b"\x80\2(.",
    "setitems without a mark": b"\x80\2}u.",
    "setitem of a mark": b"\x80\2}(Ns.",
    "odd items": b"\x80\2}(Nu.",
    "number as key": dumped({1: ARRAYS["a"]}),
    "key twice": b"\x80\2}" + (text("a") + an_array() + b"s") * 2 + b".",
    "no arrays": dumped({}),
    "text for an array": dumped({"a": "os.system"}),
    "nested dict for an array": dumped({"model": {"a": {"b": ARRAYS["a"]}}}),
    "array beside the model": dumped({"model": {"a": ARRAYS["a"]}, "optimizer": ARRAYS["a"]}),
    "array without state": whole(EMPTY),
    "a class for an array": whole(b"cnumpy\nndarray\n"),
    "Caffe2: os.system for a blob": dumped({"conv1_w": Reduces(os.system, COMMAND)}),
    "Caffe2: eval in the blobs": dumped({"blobs": {"conv1_w": Reduces(eval, TOUCH)}, "cfg": ""}),
    "Caffe2: exec for the configuration": dumped(
        {"blobs": {"conv1_w": ARRAYS["a"]}, "cfg": Reduces(exec, TOUCH)}
    ),
    "Caffe2: os.system for the author": dumped(
        {"model": {"conv1_w": ARRAYS["a"]}, "__author__": Reduces(os.system, COMMAND)}
    ),
    "Caffe2: Python 2's eval": whole(
        b"c__builtin__\neval\nU" + bytes([len(TOUCH)]) + TOUCH.encode() + b"\x85R", b"\x80\2"
    ),
    "Caffe2: objects for a blob": dumped(
        {"blobs": {"conv1_w": np.array([os.system], dtype=object)}}
    ),
    "Caffe2: blobs beside a model": dumped(
        {"model": {"conv1_w": ARRAYS["a"]}, "blobs": {"fc1000_w": ARRAYS["a"]}}
    ),
    "Caffe2: blobs are one array": dumped({"blobs": ARRAYS["a"], "cfg": ""}),
    "Caffe2: no blobs": dumped({"blobs": {}, "cfg": ""}),
    "Caffe2: a nested configuration": dumped(
        {"blobs": {"conv1_w": ARRAYS["a"]}, "cfg": {"MODEL": "x"}}
    ),
    "Caffe2: a sum of losses that is a class": dumped(
        {"blobs": {"conv1_w": ARRAYS["a"], "loss": OrderedDict}}
    ),
}


def test_the_corpus_is_large_enough():
    assert len(HOSTILE) >= 90 and sum(name.startswith("Caffe2") for name in HOSTILE) >= 10


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_do_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, HOSTILE[name])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 + len(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["w.pkl"]


def test_some_of_the_hostile_files_do_run_code_under_pickle(tmp_path, monkeypatch):
    # Negative control: the corpus is not merely malformed.
    monkeypatch.chdir(tmp_path)
    for name in (
        "os.system",
        "os.system, protocol 0",
        "os.system, protocol 4",
        "eval",
        "exec at the top",
        "open for writing",
        "nested reduce inside arguments",
        "INST",
        "OBJ",
        "STACK_GLOBAL of os.system",
        "Caffe2: os.system for a blob",
        "Caffe2: exec for the configuration",
        "Caffe2: Python 2's eval",
    ):
        with contextlib.suppress(TypeError):  # np.dtype(None) and the like, after the deed
            pickle.loads(HOSTILE[name])
        assert (tmp_path / TOUCHED).exists(), name
        (tmp_path / TOUCHED).unlink()


def test_the_hand_made_parts_are_good_ones(tmp_path):
    # Negative control: what the hostile files vary is accepted unvaried.
    arrays, _ = read(tmp_path, whole(an_array()))
    assert_same(arrays, {"a": np.zeros(1, np.float32)})


def test_every_one_byte_change_is_read_or_refused(tmp_path):
    content = {"model": {"a": np.float32([1, 2])}, "__author__": "x"}
    for protocol in (2, 5):
        data = pickle.dumps(content, protocol)
        for position in range(len(data)):
            for value in (ord("R"), 0xFF, data[position] ^ 1):
                changed = data[:position] + bytes([value]) + data[position + 1 :]
                try:
                    arrays, _ = read(tmp_path, changed)
                except CheckpointError:
                    continue
                assert all(type(array) is np.ndarray for array in arrays.values())


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_pickled_arrays(tmp_path / "none.pkl")
