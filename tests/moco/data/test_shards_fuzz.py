"""Seeded mutations of index and shards: a DataError of one line, or the images that were packed."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import tarfile

import numpy as np
import pytest
from packs import pack_folder, write_images
from peak_memory import peak_kib

from moco.data.images import find_images
from moco.data.shard_index import INDEX_FILE, NAMES_FILE, SAMPLE, SAMPLES_FILE
from moco.data.shard_scan import index_shards
from moco.data.shards import open_pack
from moco.errors import DataError

NAMES = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)]
# What JSON can hold that a reader may not expect.
ODD_VALUES = [
    None, True, False, -1, 0, 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, -(10**30), 0.5, 1e308,
    float("nan"), float("inf"), "", "0", "x" * 5000, "../x.tar", "\ud800", [], [[]], {}, {"": None},
    [0] * 5000, "a\nb", "\0",
]  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    base = tmp_path_factory.mktemp("fuzz")
    write_images(base / "images", NAMES)
    pack_folder(base / "images", base / "pack", shard_bytes=8000)
    return base / "pack"


@pytest.fixture
def pack(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "pack")
    return tmp_path / "pack"


def nodes(content, where=()):
    """Paths of everything in a JSON content."""
    yield where
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from nodes(value, (*where, key))


def mutated_json(content, rng: random.Random):
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        where = rng.choice([path for path in nodes(content) if path] or [()])
        if not where:
            return rng.choice(ODD_VALUES)
        parent = content
        for key in where[:-1]:
            parent = parent[key]
        action = rng.choice(("replace", "replace", "delete", "nudge"))
        if action == "delete":
            del parent[where[-1]]
        elif action == "nudge" and type(parent[where[-1]]) is int:
            parent[where[-1]] += rng.choice((-512, -1, 1, 512))
        else:
            parent[where[-1]] = copy.deepcopy(rng.choice(ODD_VALUES))
    return content


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 10))):
        at = rng.randrange(len(data)) if data else 0
        action = rng.choice(("bit", "byte", "cut", "insert", "delete", "repeat"))
        if action == "bit" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif action == "byte" and data:
            data[at] = rng.choice((0, 10, 255, 34, 92, 48, 45))
        elif action == "cut":
            del data[at:]
        elif action == "insert":
            data[at:at] = rng.randbytes(rng.choice((1, 8, 52, 512)))
        elif action == "delete":
            del data[at : at + rng.choice((1, 8, 52, 512))]
        else:
            data[at:at] = data[at : at + rng.choice((1, 52, 512))]
    return bytes(data)


def mutated_samples(data: bytes, rng: random.Random) -> bytes:
    samples = np.frombuffer(data, dtype=SAMPLE).copy()
    for _ in range(rng.choice((1, 1, 2))):
        field = rng.choice(("offset", "size", "shard", "label", "crc32", "sha256"))
        row, kind = rng.randrange(len(samples)), samples[field].dtype
        if field == "sha256":
            samples[field][row, rng.randrange(32)] ^= 1
            continue
        limits = np.iinfo(kind)
        nudged = int(samples[field][row]) + rng.choice((-512, -1, 1, 512))
        value = rng.choice((limits.min, limits.max, 0, 1, 512, limits.max - 511, nudged))
        samples[field][row] = min(max(value, limits.min), limits.max)
    return samples.tobytes()


def outcome(folder, originals: list[bytes]) -> str:
    """"refused" or "read"; any other exception, or other bytes, fail the test."""
    try:
        pack = open_pack(folder)
        for index in range(len(pack)):
            assert pack.path(index) and pack.read_bytes(index) in originals
        assert len(pack.paths) == len(pack) and pack.storage_order.shape == (len(pack),)
        assert pack.labels is None or max(pack.labels) < len(pack.class_names)
    except DataError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return "refused"
    return "read"


def run(folder, mutate, number, most_kib=100 << 10) -> dict[str, int]:
    originals = [open_pack(folder).read_bytes(i) for i in range(len(NAMES))]
    counts = {"refused": 0, "read": 0}
    before = peak_kib(anew=True)
    for seed in range(number):
        undo = mutate(random.Random(seed))
        counts[outcome(folder, originals)] += 1
        for path, data in undo.items():
            path.write_bytes(data)
    assert peak_kib() - before < most_kib
    return counts


def test_mutated_contents_of_pack_json(pack):
    path = pack / INDEX_FILE
    original = path.read_bytes()

    def mutate(rng):
        path.write_text(json.dumps(mutated_json(json.loads(original), rng)), encoding="utf-8")
        return {path: original}

    counts = run(pack, mutate, 400)
    assert counts["refused"] > 300  # the rest: class names, and what was made how


def test_mutated_bytes_of_pack_json(pack):
    path = pack / INDEX_FILE
    original = path.read_bytes()

    def mutate(rng):
        path.write_bytes(mutated_bytes(original, rng))
        return {path: original}

    assert run(pack, mutate, 300)["refused"] > 150


@pytest.mark.parametrize("name", [SAMPLES_FILE, NAMES_FILE])
@pytest.mark.parametrize("how", ["bytes", "numbers"])
def test_mutated_records_and_names_whose_hash_is_right(pack, name, how):
    """An attacker writes the hash too, so the numbers themselves must be checked."""
    path, index_path = pack / name, pack / INDEX_FILE
    original, index = path.read_bytes(), index_path.read_bytes()
    change = mutated_samples if how == "numbers" and name == SAMPLES_FILE else mutated_bytes

    def mutate(rng):
        data = change(original, rng)
        content = json.loads(index)
        content["sha256"][name] = hashlib.sha256(data).hexdigest()
        if name == SAMPLES_FILE and rng.random() < 0.5:
            content["num_images"] = len(data) // SAMPLE.itemsize
        path.write_bytes(data)
        index_path.write_text(json.dumps(content))
        return {path: original, index_path: index}

    counts = run(pack, mutate, 250)
    assert counts["refused"] > 50 and (name == SAMPLES_FILE or counts["read"] > 10)


def test_deeply_nested_json_is_refused(pack):
    for text in ("[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000):
        (pack / INDEX_FILE).write_text(text)
        with pytest.raises(DataError, match="pack.json"):
            open_pack(pack)


# Of a tar header: name, size, time, type, link, magic. (offset, bytes)
HEADER_FIELDS = ((0, 100), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8))
HEADER_VALUES = (
    b"../../x.jpg", b"/etc/x.jpg", b"77777777777", b"-0000000001", b"\x80" + b"\xff" * 11, b"",
    b"\xff" * 12, b"5", b"2", b"1", b"L", b"x", b"S", b"g", b"3", b"00000000000",
)  # fmt: skip


def test_mutated_tar_archives_are_indexed_or_refused(pack, tmp_path):
    """`--index-only` reads archives of strangers."""
    shard = sorted(pack.glob("*.tar"))[0]
    original, folder = shard.read_bytes(), tmp_path / "shards"
    with tarfile.open(shard) as archive:
        starts = [member.offset for member in archive]
    folder.mkdir()
    counts = {"refused": 0, "indexed": 0}
    before = peak_kib(anew=True)
    for seed in range(400):
        rng = random.Random(seed)
        data = bytearray(original)
        if rng.random() < 0.5:
            data = bytearray(mutated_bytes(original, rng))
        else:  # a field of a header, with a right checksum
            start = rng.choice(starts)
            at, length = rng.choice(HEADER_FIELDS)
            value = rng.choice(HEADER_VALUES)
            data[start + at : start + at + length] = value[:length].ljust(length, b"\0")
            data[start + 148 : start + 156] = b" " * 8
            total = sum(data[start : start + 512])
            data[start + 148 : start + 156] = b"%06o\0 " % total
        (folder / "a.tar").write_bytes(data)
        try:
            index_shards(folder, 0, skip_unreadable=False)
        except DataError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            counts["refused"] += 1
            assert not (folder / INDEX_FILE).exists()
            continue
        counts["indexed"] += 1
        found = find_images(folder)
        for index in range(len(found)):
            found.open(index)
        for path in folder.glob("*"):
            path.unlink()
    assert peak_kib() - before < 100 << 10
    assert counts["refused"] > 100 and counts["indexed"] > 20
