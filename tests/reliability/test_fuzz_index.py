"""Fuzz of the index of packed images and of the JSON manifests of checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from fuzz import ODD, REFUSED, explore, is_noticed, mutated, read_or_refuse, st, trees
from packs import pack_folder, write_images

from moco.data import shard_index, shards
from moco.data.shard_index import INDEX_FILE, NAMES_FILE, SAMPLES_FILE
from moco.data.shards import open_pack
from moco.training import checkpoint as ckpt

pytestmark = pytest.mark.faults
NAMES = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("fuzz")
    write_images(base / "images", NAMES)
    pack_folder(base / "images", base / "pack", shard_bytes=4000)
    return base / "pack"


@pytest.fixture
def pack(packed, tmp_path) -> Path:
    shutil.copytree(packed, tmp_path / "pack")
    return tmp_path / "pack"


@st.composite
def changed_tree(draw, tree: dict):
    """`tree` with one to three of its values replaced, or removed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node, keys = tree, []
        while isinstance(node, dict | list) and node and (not keys or draw(st.booleans())):
            options = sorted(node) if isinstance(node, dict) else range(len(node))
            keys.append((node, draw(st.sampled_from(list(options)))))
            node = node[keys[-1][1]]
        if not keys:
            return draw(ODD)
        parent, key = keys[-1]
        if draw(st.integers(0, 3)):
            parent[key] = draw(ODD | trees(most=3) | st.integers())
        elif isinstance(parent, dict):
            del parent[key]
    return tree


def pack_check(pack: Path):
    """What is read are the packed images, or the index is refused."""
    originals = {hashlib.sha256(open_pack(pack).read_bytes(i)).digest() for i in range(len(NAMES))}

    def check(*_) -> None:
        source = read_or_refuse(lambda: open_pack(pack))
        if source is REFUSED:
            return
        assert len(source.paths) == len(source) and all(source.paths)
        assert source.labels is None or max(source.labels) < len(source.class_names)
        for index in range(len(source)):
            data = read_or_refuse(lambda i=index: source.read_bytes(i))
            assert data is REFUSED or hashlib.sha256(data).digest() in originals

    return check


def test_pack_json(pack, observed, long):
    content, read = json.loads((pack / INDEX_FILE).read_bytes()), pack_check(pack)
    text = (pack / INDEX_FILE).read_bytes()

    def check(changed) -> None:
        data = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (pack / INDEX_FILE).write_bytes(data)
        read()

    changes = changed_tree(content) | mutated(text) | trees() | st.binary(max_size=60)
    count = explore(check, changes, examples=10_000 if long else 700)
    observed("fuzz", count, count)


def records_check(pack: Path):
    read, index = pack_check(pack), json.loads((pack / INDEX_FILE).read_bytes())
    originals = {name: (pack / name).read_bytes() for name in (SAMPLES_FILE, NAMES_FILE)}

    def check(name: str, data: bytes, extra: int) -> None:
        """As an attacker would: the hash is right."""
        for other, original in originals.items():
            (pack / other).write_bytes(original)
        (pack / name).write_bytes(data)
        hashes = {**index["sha256"], name: hashlib.sha256(data).hexdigest()}
        changed = {**index, "sha256": hashes, "num_images": index["num_images"] + extra}
        (pack / INDEX_FILE).write_text(json.dumps(changed))
        read()

    strategies = [
        st.tuples(st.just(name), mutated(original)) for name, original in originals.items()
    ]
    return (lambda drawn, extra: check(*drawn, extra)), st.one_of(strategies)


def test_records_and_names(pack, observed, long):
    check, strategy = records_check(pack)
    extra = st.sampled_from([0, 0, 0, -1, 1])
    count = explore(check, strategy, extra, examples=10_000 if long else 700)
    observed("fuzz", count, count)


def test_control_without_the_checks_of_numbers(pack, monkeypatch, observed):
    check, strategy = records_check(pack)
    monkeypatch.setattr(shard_index, "_check_samples", lambda *args: None)
    monkeypatch.setattr(shards.zlib, "crc32", lambda data: AnyNumber())
    found = is_noticed(check, strategy, st.just(0), examples=700)
    observed("fuzz", int(found), 1, control=True)


class AnyNumber:
    """Equal to all: a checksum that is never compared."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None


def manifest_check(folder: Path, file: Path):
    truth = {"bytes": file.stat().st_size, "sha256": ckpt.sha256_of(file)}

    def check(content) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        ckpt.manifest_path(file).write_bytes(data)
        answer = read_or_refuse(lambda: ckpt.verify_manifest(file))
        if answer is not REFUSED:
            assert {name: answer[name] for name in truth} == truth
        step = read_or_refuse(lambda: ckpt.step_in_manifest(file))
        assert step is None or isinstance(step, int)
        path, manifest, refused = read_or_refuse(lambda: ckpt.latest_verified(folder))
        assert (path == file) == (answer is not REFUSED and step is not None)
        assert (path is None) == (manifest is None) == bool(refused)

    return check, truth


@pytest.fixture
def checkpoint_file(tmp_path) -> Path:
    file = tmp_path / "run" / "checkpoint_0001.pth.tar"
    ckpt.save_checkpoint(file, {"epoch": 1}, step=4, config_digest="x")
    return file


def test_manifests(checkpoint_file, observed, long):
    check, truth = manifest_check(checkpoint_file.parent, checkpoint_file)
    text = ckpt.manifest_path(checkpoint_file).read_bytes()
    content = json.loads(text)
    check(content)
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff", b"", b"NaN"])
    changes = changed_tree(content) | mutated(text) | trees() | deep
    count = explore(check, changes, examples=10_000 if long else 700)
    observed("fuzz", count, count)


def test_control_a_manifest_whose_hash_is_not_compared(checkpoint_file, monkeypatch, observed):
    check, truth = manifest_check(checkpoint_file.parent, checkpoint_file)
    wrong = AnyNumber()
    monkeypatch.setattr(ckpt, "sha256_of", lambda path: wrong)
    content = {**truth, "step": 4}
    found = is_noticed(check, changed_tree(content), examples=300)
    observed("fuzz", int(found), 1, control=True)
