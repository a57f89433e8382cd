"""R21: files that would run code, fill the memory or leave their folder. All are refused."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from detection.data.data_check import raise_for_problems
from detection.data.voc import DatasetSpec, load_records
from detection.weights_file import read_weights_file
from moco.config import load_pretrain_config
from moco.errors import MocoError
from moco.training import checkpoint as ckpt
from moco.training.checkpoint import read_torch_file

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


def read_voc(path: Path) -> None:
    root = path.parent / "voc"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a")
    path.rename(root / "Annotations/a.xml")
    _, report = load_records(DatasetSpec("toy", str(root), "train", ("cat",), 2007))
    raise_for_problems(report)


READERS = {  # kind -> (file name, reader, corpus)
    "checkpoint": ("w.pth", read_weights_file, TORCH_FILES),
    "weights": ("w.pkl", read_weights_file, PICKLES),
    "configuration": ("c.yaml", lambda path: load_pretrain_config(str(path)), YAMLS),
    "annotation": ("a.xml", read_voc, XMLS),
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
