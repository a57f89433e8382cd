"""Fuzz of what reads weights: pickles, torch files, safetensors headers, names of tensors."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from foreign_files import moco, narrow_resnet, small_vit, vissl
from fuzz import ODD, REFUSED, explore, is_noticed, mutated, read_or_refuse, st, trees
from torch_files import rezipped, saved

from detection import safe_pickle
from detection.caffe2_names import from_caffe2
from detection.convert import convert_state
from detection.safe_pickle import read_pickled_arrays
from detection.weights_file import read_weights_file
from moco.evaluation.weights import pretrained_from
from moco.training import layouts_network
from moco.training.checkpoint import read_torch_file
from moco.training.layouts import read_backbone, read_weights

pytestmark = pytest.mark.faults
ARRAYS = {"model": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int64([1, 2])},
          "__author__": "x", "n": 3}  # fmt: skip
# Opcodes with arguments, as a hostile file may string them together.
OPCODES = st.sampled_from(
    [b"(", b")", b"}", b"]", b"t", b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"\x89", b"0", b"1",
     b"2", b"R", b"b", b"s", b"u", b"o", b"e", b"\x93", b"\x94", b"h\0", b"h\x05", b"q\0",
     b"j\xff\xff\xff\x7f", b"K\x01", b"K\x03", b"J\xff\xff\xff\xff", b"M\x00\x04",
     b"G" + b"\x7f" * 8, b"q\x01",
     b"\x8a\x01\x05", b"\x8b\xff\xff\xff\x7f", b"U\x02f4", b"X\x02\0\0\0f4", b"\x8c\x02f4",
     b"\x8c\x01<", b"\x8c\x01b", b"C\x08" + b"x" * 8, b"B\x08\0\0\0" + b"x" * 8, b"\x8c\x01C",
     b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"cnumpy\nndarray\n",
     b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cos\nsystem\n",
     b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.numeric\n_frombuffer\n",
     b"c_codecs\nencode\n", b"\x95" + b"\xff" * 8, b"\x80\x02", b"."]
)  # fmt: skip


def path_and_file(tmp_path, name: str):
    path = tmp_path / name

    def write(data: bytes):
        path.write_bytes(data)
        return path

    return path, write


def pickle_check(tmp_path):
    _, write = path_and_file(tmp_path, "w.pkl")

    def check(data: bytes) -> None:
        answer = read_or_refuse(lambda: read_pickled_arrays(write(data)))
        if answer is REFUSED:
            return
        arrays, fields = answer
        assert arrays and all(a.dtype.kind in "fiu" for a in arrays.values())
        assert sum(array.nbytes for array in arrays.values()) <= 2 * len(data)
        assert all(type(v) in (str, bool, int, float, type(None)) for v in fields.values())

    return check


PICKLED = [pickle.dumps(ARRAYS, protocol) for protocol in (2, 3, 4, 5)]


def test_pickles(tmp_path, observed, long):
    check = pickle_check(tmp_path)
    for data in PICKLED:
        check(data)
    programs = st.lists(OPCODES, max_size=25).map(lambda ops: b"\x80\x02" + b"".join(ops) + b".")
    count = explore(check, programs | st.binary(max_size=80), examples=20_000 if long else 600)
    whole = st.sampled_from(PICKLED).flatmap(mutated)
    count += explore(check, whole, examples=20_000 if long else 600)
    observed("fuzz", count, count)


def test_control_pickle_load_raises_whatever_it_likes(tmp_path, monkeypatch, observed):
    """Without the gates: the standard library's reader, on files that run nothing."""
    def unsafe(path):
        with open(path, "rb") as file:
            content = pickle.load(file)
        return content["model"], {"__author__": content["__author__"]}

    monkeypatch.setitem(globals(), "read_pickled_arrays", unsafe)
    cut = st.integers(0, len(PICKLED[1]) - 1).map(lambda at: PICKLED[1][:at])
    found = is_noticed(pickle_check(tmp_path), cut, examples=50)
    assert safe_pickle.read_pickled_arrays is not unsafe
    observed("fuzz", int(found), 1, control=True)


def is_plain(content: object, depth: int = 0) -> bool:
    if isinstance(content, dict):
        return all(is_plain(v, depth + 1) for v in content.values())
    if isinstance(content, list | tuple | set):
        return all(is_plain(v, depth + 1) for v in content)
    plain = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
    return torch.is_tensor(content) or isinstance(content, plain) or depth > 50


def test_torch_files(tmp_path, observed, long):
    path, write = path_and_file(tmp_path, "w.pth")
    content = {"epoch": 1, "state_dict": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}}
    data, legacy = saved(content), saved(content, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        program = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))

    def check(changed: bytes) -> None:
        answer = read_or_refuse(lambda: read_torch_file(write(changed)))
        if answer is not REFUSED:
            assert is_plain(answer)
        read_or_refuse(lambda: read_weights_file(path))
        read_or_refuse(lambda: read_weights(path))

    check(data)
    check(legacy)
    inside = mutated(program).map(lambda changed: rezipped(data, pkl=changed))
    count = explore(check, inside, examples=8000 if long else 500)
    count += explore(check, mutated(data) | mutated(legacy), examples=8000 if long else 500)
    observed("fuzz", count, count)


def test_safetensors_headers(tmp_path, observed, long):
    _, write = path_and_file(tmp_path, "w.safetensors")
    sizes = st.integers(-1, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 1.5, None, "4"])
    entry = st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "x"]),
         "shape": st.lists(sizes, max_size=4), "data_offsets": st.lists(sizes, max_size=3)}
    )  # fmt: skip
    names = st.sampled_from(["conv1.weight", "a", "__metadata__", "", "\0", "state_dict"])
    headers = st.dictionaries(names, entry | trees(most=4), max_size=3)

    def check(header, payload: bytes, offset: int) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = max(0, len(text) + offset)
        answer = read_or_refuse(
            lambda: read_weights(write(struct.pack("<Q", length) + text + payload))
        )
        if answer is not REFUSED:
            assert is_plain(answer)
            held = sum(t.numel() * t.element_size() for t in answer["state_dict"].values())
            assert held <= len(payload)
            read_or_refuse(lambda: read_backbone(answer, "f"))

    offsets = st.sampled_from([0] * 12 + [-1, 1, 8, 2**62])
    count = explore(check, headers | st.binary(max_size=40), st.binary(max_size=40), offsets,
                    examples=10_000 if long else 800)  # fmt: skip
    observed("fuzz", count, count)


QUERY, KEY = narrow_resnet(seed=1), narrow_resnet(seed=2)
BASES = [QUERY, moco(QUERY, KEY)["state_dict"], small_vit(seed=1), vissl(QUERY, KEY)]
PIECES = st.sampled_from(
    ["module.", "encoder_q.", "encoder_k.", "backbone.", "layer1.", "layer4.", "0.", "1.", "9.",
     "99999.", "9" * 5000 + ".", "\u0663.", "conv1.", "bn1.", "weight", "running_var", "queue",
     "cls_token", "pos_embed", "blocks.", "fc.", "num_batches_tracked", "\n", "\x1b", "", "heads"]
)  # fmt: skip
NAMES = st.lists(PIECES, max_size=7).map("".join)
TENSORS = st.sampled_from(
    [torch.zeros(2), torch.zeros(()), torch.zeros(0), torch.zeros(3, 3, 3, 3), torch.ones(1, 5, 24),
     torch.ones(8, dtype=torch.int64), torch.ones(8, dtype=torch.complex64), "x", None, 3, [1], {}]
)  # fmt: skip


class Content(dict):
    """A file's content that a failure shows by its changes, not by all its numbers."""

    changes: tuple = ()

    def __repr__(self) -> str:
        return f"Content{self.changes}"


@st.composite
def contents(draw):
    """A known file with names added, removed or replaced, and odd values of what lies beside."""
    number = draw(st.integers(0, len(BASES) - 1))
    base = BASES[number]
    content = dict(base)
    for _ in range(draw(st.integers(0, 3))):
        old = draw(st.sampled_from(list(content)))
        action = draw(st.sampled_from(["remove", "replace", "add", "rename"]))
        if action in ("remove", "rename") and len(content) > 1:
            value = content.pop(old)
            if action == "rename":
                content[draw(NAMES)] = value
        elif action == "replace":
            content[old] = draw(TENSORS)
        else:
            content[draw(NAMES)] = draw(TENSORS)
    if draw(st.booleans()):
        content = {"state_dict": content}
        keys = st.sampled_from(["arch", "num_heads", "meta", "extra", "epoch", "student", "teacher",
                                "classy_state_dict", "loss", "model"])  # fmt: skip
        content |= draw(st.dictionaries(keys, ODD | trees(most=4), max_size=3))
    changed = Content(content)
    inner = content["state_dict"] if content.get("state_dict") is not None else content
    changed.changes = (
        number,
        sorted(base.keys() - inner.keys()),
        {n: v for n, v in inner.items() if n not in base or base[n] is not v},
        {n: v for n, v in content.items() if n != "state_dict" and inner is not content},
    )
    return changed


def names_check(content) -> None:
    """Every tensor of a known network, each from one name: or refused."""
    for encoder in ("query", "key"):
        found = read_or_refuse(lambda e=encoder: read_backbone(content, "f", encoder=e))
        if found is not REFUSED:
            shapes = found.network.tensor_shapes()
            given = {name: tuple(t.shape) for name, t in found.state.items()}
            absent = shapes.keys() - given.keys()
            assert all(given[name] == shapes[name] for name in given)
            assert all(name.endswith("num_batches_tracked") for name in absent)
            assert len(set(found.names.values())) == len(found.names) == len(given)
    read_or_refuse(lambda: pretrained_from(content, "f", "0"))
    read_or_refuse(lambda: convert_state(content, "f"))


def test_names_and_what_lies_beside(observed, long):
    count = explore(names_check, contents(), examples=10_000 if long else 250)
    observed("fuzz", count, count)


def test_control_without_their_coverage_names_are_lost(monkeypatch, observed):
    monkeypatch.setattr(layouts_network, "_check_coverage", lambda *args: None)
    observed("fuzz", int(is_noticed(names_check, contents(), examples=400)), 1, control=True)


def test_caffe2_names(observed, long):
    pieces = st.sampled_from(["conv1", "res2_", "res5_", "0_", "9999_", "branch2a", "branch1", "_w",
                              "_b", "_bn_s", "_bn_riv", "res_conv1", "cls_score", "bbox_pred",
                              "mask_fcn_logits", "pred", "fc1000", "_momentum", "\n"])  # fmt: skip
    tensors = st.sampled_from([torch.zeros(2, 3), torch.zeros(5), torch.zeros(()), torch.zeros(0)])
    states = st.dictionaries(st.lists(pieces, max_size=5).map("".join), tensors, max_size=6)

    def check(state) -> None:
        answer = read_or_refuse(lambda: from_caffe2(state, "f"))
        if answer is not REFUSED:
            renamed, dropped = answer
            assert len(renamed) + sum(map(len, dropped.values())) == len(state)

    count = explore(check, states, examples=10_000 if long else 800)
    observed("fuzz", count, count)
