"""R21: files that would run code, fill the memory or leave their folder. All are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch_files import in_archive, rezipped, saved

from detection.data.data_check import raise_for_problems
from detection.data.voc import DatasetSpec, load_records
from detection.weights_file import read_weights_file
from moco.config import load_pretrain_config
from moco.data.shard_scan import index_shards
from moco.errors import MocoError
from moco.training import checkpoint as ckpt
from moco.training.checkpoint import read_torch_file
from moco.training.layouts import read_backbone, read_weights

pytestmark = pytest.mark.faults
MARKER = "touched"
MOST_SECONDS, MOST_BYTES = 1.0, 200 << 20


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


SHELL = Calls(os.system, f"touch {MARKER}")
PYTHON = Calls(eval, f"open({MARKER!r}, 'w').close()")
GLOBAL = b"cos\nsystem\n(X" + struct.pack("<I", 13) + b"touch touched" + b"tR."


def hiding_its_methods() -> OrderedDict:
    state = OrderedDict(PLAIN)
    state.get = "x"
    return state


PLAIN = {"a": torch.zeros(2)}
TORCH_FILES = {
    "os.system": lambda: saved({"a": SHELL}),
    "eval": lambda: saved({"a": PYTHON}),
    "eval beside the tensors": lambda: saved({"state_dict": PLAIN, "arch": PYTHON}),
    "os.system, legacy format": lambda: saved({"a": SHELL}, _use_new_zipfile_serialization=False),
    "eval, legacy format": lambda: saved({"a": PYTHON}, _use_new_zipfile_serialization=False),
    "a bare pickle": lambda: pickle.dumps(SHELL),
    "a bare pickle, protocol 0": lambda: pickle.dumps(SHELL, 0),
    "GLOBAL by hand": lambda: in_archive(b"\x80\x02" + GLOBAL),
    "INST": lambda: in_archive(b"(X\x0d\0\0\0touch touched" + b"ios\nsystem\n."),
    "STACK_GLOBAL": lambda: in_archive(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R."),
    "BUILD on a function": lambda: in_archive(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__)sb."
    ),
    "a module": lambda: saved(torch.nn.Linear(2, 2)),
    "getattr": lambda: saved({"a": Calls(getattr, Calls(__import__, "os"), "system")}),
    "torch.load as a global": lambda: saved({"a": Calls(torch.load, "x")}),
    "torch.hub.load": lambda: saved({"a": Calls(torch.hub.load, "x", "y")}),
    "compressed: 300 MB in 300 kB": lambda: rezipped(
        saved({"a": torch.zeros(75_000_000)}), zipfile.ZIP_DEFLATED
    ),
    "a storage cut short": lambda: rezipped(saved({"a": torch.zeros(1000)}), storage=b"\0" * 8),
    "no data.pkl": lambda: rezipped(saved(PLAIN), pkl=b""),
    "truncated archive": lambda: saved({"a": torch.zeros(1000)})[:-100],
    "4 bytes that claim 16 TB": lambda: saved({"a": torch.zeros(1).expand(1 << 42)}),
    "a dict whose methods are hidden": lambda: saved({"state_dict": hiding_its_methods()}),
    "endless pickle": lambda: in_archive(b"\x80\x02" + b"(" * 200_000),
    "deep tuples": lambda: in_archive(b"\x80\x02)" + b"\x85" * 200_000 + b"."),
    "zero bytes": lambda: b"",
    "text": lambda: b"#!/bin/sh\ntouch touched\n",
}
PICKLES = {
    "os.system": lambda: pickle.dumps({"a": SHELL}),
    "eval, protocol 0": lambda: pickle.dumps({"a": PYTHON}, 0),
    "GLOBAL by hand": lambda: b"\x80\x02" + GLOBAL,
    "deep tuples": lambda: b"\x80\x02)" + b"\x85" * 500_000 + b".",
}
BOMB = "\n".join(
    [f"a0: &a0 [{', '.join('x' * 10)}]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
)
YAMLS = {
    "python/object": lambda: b"SEED: !!python/object/apply:os.system ['touch touched']",
    "python/name": lambda: b"SEED: !!python/name:os.system",
    "python/module": lambda: b"SEED: !!python/module:os",
    "alias bomb": BOMB.encode,
    "self-reference": lambda: b"a: &a [*a]",
    "deep": lambda: b"[" * 100_000,
    "a base outside": lambda: b"_BASE_: /etc/passwd",
    "too large": lambda: b"SEED: " + b"1" * (2 << 20),
}
ENTITIES = b'<!DOCTYPE a [<!ENTITY x0 "xxxxxxxxxx">' + b"".join(
    f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">'.encode() for i in range(1, 12)
)
XMLS = {
    "entity bomb": lambda: ENTITIES + b"]><annotation>&x11;</annotation>",
    "external entity": lambda: b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    b"<annotation>&x;</annotation>",
    "external DTD": lambda: b'<!DOCTYPE a SYSTEM "http://localhost:1/x.dtd"><annotation/>',
    "quadratic blow-up": lambda: b'<!DOCTYPE a [<!ENTITY x "' + b"x" * 100_000 + b'">]>'
    b"<annotation>" + b"&x;" * 10_000 + b"</annotation>",
}


def safetensors_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFETENSORS = {
    "a header of 2^63 bytes": lambda: safetensors_file(b"{}", length=1 << 63),
    "a header of 90 MB, not there": lambda: safetensors_file(b"{}", length=90 << 20),
    "a header longer than the file": lambda: safetensors_file(b"{}", length=3),
    "no JSON": lambda: safetensors_file(b"{" * 100),
    "deep JSON": lambda: safetensors_file(b'{"a":' * 100_000),
    "no UTF-8": lambda: safetensors_file(b'{"\xff": 1}'),
    "a list": lambda: safetensors_file([1]),
    "beyond the data": lambda: safetensors_file({"conv1.weight": entry([4], 0, 16)}, b"0" * 8),
    "overlapping": lambda: safetensors_file(
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12
    ),
    "a gap": lambda: safetensors_file({"a": entry([1], 4, 8)}, b"0" * 8),
    "backwards": lambda: safetensors_file({"a": entry([1], 8, 4)}, b"0" * 8),
    "a shape of 2^62": lambda: safetensors_file({"a": entry([1 << 31, 1 << 31], 0, 8)}, b"0" * 8),
    "a shape that overflows": lambda: safetensors_file({"a": entry([1 << 63, 2], 0, 0)}),
    "a negative shape": lambda: safetensors_file({"a": entry([-1], 0, 4)}, b"0" * 4),
    "an unknown type": lambda: safetensors_file({"a": entry([1], 0, 4, "X9")}, b"0" * 4),
    "a key twice": lambda: safetensors_file(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"0" * 8
    ),
    "metadata of objects": lambda: safetensors_file({"__metadata__": {"a": {"b": 1}}}),
    "bytes after the data": lambda: safetensors_file({"a": entry([1], 0, 4)}, b"0" * 400),
    "zero bytes": lambda: b"",
    "a pickle": lambda: pickle.dumps(SHELL),
}  # fmt: skip


def tar(*members: tuple[str, dict], data: bytes = b"x" * 9) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return out.getvalue()


def patched(data: bytes, at: int, value: bytes) -> bytes:
    """The first header with other bytes at `at`, and its right checksum."""
    data = bytearray(data)
    data[at : at + len(value)] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


IMAGE = (("a/x.jpg", {}),)
TARS = {
    "a name that leaves the folder": lambda: tar(("../../x.jpg", {})),
    "an absolute name": lambda: tar(("/etc/x.jpg", {})),
    "a link": lambda: tar(("x.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})),
    "a hard link": lambda: tar(("x.jpg", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})),
    "a device": lambda: tar(("x.jpg", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5})),
    "a pipe": lambda: tar(("x.jpg", {"type": tarfile.FIFOTYPE})),
    "a size of 2^60": lambda: patched(tar(*IMAGE), 124, b"\x80" + b"\0" * 3 + b"\x10" + b"\0" * 7),
    "a negative size": lambda: patched(tar(*IMAGE), 124, b"\xff" * 12),
    "a size of 8 GB": lambda: patched(tar(*IMAGE), 124, b"77777777777\0"),
    "a long name of 8 GB": lambda: patched(
        patched(tar(*IMAGE), 124, b"77777777777\0"), 156, b"L"
    ),
    "an extended header of 8 GB": lambda: patched(
        patched(tar(*IMAGE), 124, b"77777777777\0"), 156, b"x"
    ),
    "sparse": lambda: patched(tar(*IMAGE), 156, b"S"),
    "no image": lambda: tar(*IMAGE),
    "cut": lambda: tar(*IMAGE, data=b"x" * 2000)[:1500],
    "zero bytes": lambda: b"",
    "no tar": lambda: b"#!/bin/sh\ntouch touched\n" * 100,
    "compressed": lambda: gzip.compress(tar(*IMAGE, data=b"\0" * (64 << 20))),
    "a checksum that is wrong": lambda: tar(*IMAGE).replace(b"a/x.jpg", b"b/x.jpg"),
}


def read_tar(path: Path) -> None:
    (path.parent / "shards").mkdir()
    path.rename(path.parent / "shards" / "a.tar")
    index_shards(path.parent / "shards", 0, skip_unreadable=False)


def read_voc(path: Path) -> None:
    root = path.parent / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a")
    path.rename(root / "Annotations/a.xml")
    _, report = load_records(DatasetSpec("toy", str(root), "train", ("cat",), 2007))
    raise_for_problems(report)


def read_backbone_of(path: Path) -> None:
    read_backbone(read_weights(path), str(path))


READERS = {  # kind -> (file name, reader, corpus)
    "checkpoint": ("w.pth", read_weights_file, TORCH_FILES),
    "weights": ("w.pkl", read_weights_file, PICKLES),
    "configuration": ("c.yaml", lambda path: load_pretrain_config(str(path)), YAMLS),
    "annotation": ("a.xml", read_voc, XMLS),
    "safetensors": ("w.safetensors", read_backbone_of, SAFETENSORS),
    "shard": ("a.tar", read_tar, TARS),
}
CASES = [(kind, name) for kind, (_, _, corpus) in READERS.items() for name in corpus]


def in_child(read, path: Path, folder: Path) -> tuple[str, float, int]:
    """Read in a forked process. Returns: what it raised, seconds, bytes of memory it added."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.stdout = sys.stderr = io.StringIO()
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            read(path)
            outcome = "read"
        except MocoError as error:
            outcome = "refused" if "\n" not in str(error) else "refused in several lines"
        except BaseException as error:
            outcome = f"uncaught {type(error).__name__}"
        seconds = time.monotonic() - started
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os.write(send, f"{outcome}|{seconds}|{added}".encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    outcome, seconds, added = said.split("|") if said else ("died", "0", "0")
    return outcome, float(seconds), int(added)


@pytest.mark.parametrize("kind, name", CASES, ids=lambda value: value)
def test_a_hostile_file_is_refused_quickly_and_does_nothing(kind, name, tmp_path, observed):
    file_name, read, corpus = READERS[kind]
    path = tmp_path / file_name
    path.write_bytes(corpus[name]())
    outcome, seconds, added = in_child(read, path, tmp_path)
    assert outcome == "refused", outcome
    assert not (tmp_path / MARKER).exists()
    assert added < MOST_BYTES, f"{added >> 20} MiB"
    assert seconds < 20 * MOST_SECONDS  # a hang; a loaded machine is no failure
    observed("R21", 1, 1)


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 35


def test_control_an_unsafe_reader_does_run_the_files_code(tmp_path, observed):
    ran = 0
    for name in ("os.system", "eval", "os.system, legacy format"):
        (tmp_path / "w.pth").write_bytes(TORCH_FILES[name]())
        in_child(lambda path: torch.load(path, weights_only=False), tmp_path / "w.pth", tmp_path)
        ran += (tmp_path / MARKER).exists()
        (tmp_path / MARKER).unlink(missing_ok=True)
    observed("R21", int(ran == 3), 1, control=True)


def test_control_without_its_guard_a_compressed_archive_fills_the_memory(
    tmp_path, monkeypatch, observed
):
    (tmp_path / "w.pth").write_bytes(TORCH_FILES["compressed: 300 MB in 300 kB"]())
    monkeypatch.setattr(ckpt, "refuse_compressed", lambda path: None)
    outcome, _, added = in_child(read_torch_file, tmp_path / "w.pth", tmp_path)
    observed("R21", int(outcome == "read" and added > MOST_BYTES), 1, control=True)
