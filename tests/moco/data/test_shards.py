"""Packed images: the same images as the folder's, by number, whatever else lies in the files."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import pickle
import tarfile
import threading
import warnings

import numpy as np
import pytest
from packs import pack_folder, write_images

from moco.data import reading, shards
from moco.data.images import find_images, split_folders
from moco.data.shard_index import SAMPLE, read_index
from moco.data.shards import open_pack
from moco.data.subset import SubsetSource
from moco.errors import DataError

NAMES = [f"{name}/{i}.{suffix}" for name in ("cat", "dog") for i, suffix in
         enumerate(("png", "JPEG", "bmp", "webp", "png"))]  # fmt: skip
ORDER = [7, 2, 9, 0, 4, 1, 8, 5, 3, 6]


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", NAMES)


@pytest.fixture
def pack(folder, tmp_path):
    return pack_folder(folder, tmp_path / "pack", ORDER, shard_bytes=6000)


def error_line(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pack_is_the_folder_it_was_made_of(folder, pack, tmp_path):
    source = find_images(folder)
    packed = find_images(tmp_path / "pack")
    assert len(packed.index.shards) > 2
    assert (packed.paths, packed.labels) == (source.paths, source.labels)
    assert (packed.class_names, len(packed)) == (source.class_names, len(source))
    for index in range(len(source)):
        assert packed.read_bytes(index) == source.read_bytes(index)
        assert packed.open(index).tobytes() == source.open(index).tobytes()
        assert packed.path(index).endswith(f".tar: {source.paths[index]}")
    assert packed.storage_order.tolist() == ORDER
    part = SubsetSource(packed, [3, 1])
    assert part.read_bytes(0) == source.read_bytes(3) and part.labels == (0, 0)


def test_a_flat_folder_has_no_labels(tmp_path):
    write_images(tmp_path / "images", ["b.png", "a.png"])
    packed = pack_folder(tmp_path / "images", tmp_path / "pack")
    assert (packed.paths, packed.labels, packed.class_names) == (("a.png", "b.png"), None, ())


def test_splits_are_found_as_in_folders(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split, NAMES[:6])
        pack_folder(tmp_path / "images" / split, tmp_path / "packed" / split)
    assert split_folders(tmp_path / "packed") == ["train", "val"]
    assert find_images(tmp_path / "packed").root == str(tmp_path / "packed" / "train")
    assert find_images(tmp_path / "packed" / "val").labels is not None


def test_tar_files_without_an_index_say_what_they_need(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    assert "tools/pack_images.py --index-only" in error_line(find_images, tmp_path)


def test_shards_are_plain_tar_files(folder, pack):
    source = find_images(folder)
    found = {}
    for shard in pack.index.shards:
        with tarfile.open(os.path.join(pack.root, shard), "r:") as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
                found[member.name] = archive.extractfile(member).read()
    assert len(found) == 2 * len(source)
    for index, path in enumerate(source.paths):
        key, suffix = f"{index:09d}", path.rpartition(".")[2].lower()
        assert found[f"{key}.{suffix}"] == source.read_bytes(index)
        assert found[f"{key}.cls"] == str(source.labels[index]).encode()


def _bytes_of(pack, index, queue):
    queue.put((len(os.listdir("/proc/self/fd")), pack.read_bytes(index)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_bytes(pack, method):
    expected = pack.read_bytes(3)  # its shard is open here
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_bytes_of, args=(pack, 3, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60)[1] for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [expected, expected]


def test_what_travels_to_workers_is_small(pack):
    pack.read_bytes(0)
    assert pack.paths and pack.labels
    copy = pickle.loads(pickle.dumps(pack))
    assert not {"paths", "labels", "storage_order"} & copy.__dict__.keys()
    assert copy.paths == pack.paths and copy.read_bytes(0) == pack.read_bytes(0)
    read_ahead = pickle.loads(pickle.dumps(pack.reading_ahead(4, 2)))
    assert read_ahead._read_ahead == (4, 2) and read_ahead.read_bytes(0) == pack.read_bytes(0)


def read_by_threads(pack, expected) -> list[int]:
    """The numbers of images that came out wrong."""
    wrong = []

    def read(seed):
        for index in np.random.default_rng(seed).integers(0, len(pack), 200):
            if pack.read_bytes(index) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_threads_share_few_open_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    pack = pack_folder(folder, tmp_path / "small", shard_bytes=1)
    assert len(pack.index.shards) == len(pack)
    expected = [find_images(folder).read_bytes(i) for i in range(len(pack))]
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_by_threads(pack, expected) == []
        assert len(os.listdir("/proc/self/fd")) == before + 2
        del pack
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("damage", ["bit", "swapped"])
def test_a_damaged_image_is_named(pack, damage):
    sample = pack.index.samples[4]
    path = os.path.join(pack.root, pack.index.shards[sample["shard"]])
    with open(path, "r+b") as file:
        file.seek(sample["offset"])
        byte = file.read(1)[0]
        file.seek(sample["offset"])
        file.write(bytes([byte ^ 1]) if damage == "bit" else bytes(sample["size"]))
    message = error_line(find_images(pack.root).read_bytes, 4)
    assert f"{path}: cat/4.png: image 4" in message and "does not have the CRC-32" in message
    others = [pack.read_bytes(index) for index in range(len(pack)) if index != 4]
    assert len(others) == len(pack) - 1


def test_negative_control_without_the_checksum_the_damage_is_read(pack, monkeypatch):
    sample = pack.index.samples[4]
    with open(os.path.join(pack.root, pack.index.shards[sample["shard"]]), "r+b") as file:
        file.seek(sample["offset"])
        file.write(bytes(sample["size"]))

    monkeypatch.setattr(shards.zlib, "crc32", lambda data: sample["crc32"])
    assert pack.read_bytes(4) == bytes(sample["size"])


def test_a_shard_that_is_cut_missing_or_a_link_is_refused(pack, tmp_path):
    path = os.path.join(pack.root, pack.index.shards[1])
    whole = open(path, "rb").read()
    with open(path, "r+b") as file:
        file.truncate(len(whole) - 512)
    message = error_line(open_pack, pack.root)
    assert f"{path}: has {len(whole) - 512} bytes, the index says {len(whole)}" in message
    os.remove(path)
    assert "shard cannot be found" in error_line(open_pack, pack.root)
    first = int(np.flatnonzero(pack.index.samples["shard"] == 1)[0])
    assert "cannot be read (No such file" in error_line(pack.read_bytes, first)
    elsewhere = tmp_path / "elsewhere.tar"
    elsewhere.write_bytes(whole)
    os.symlink(elsewhere, path)
    assert "it is a link" in error_line(pack.read_bytes, first)
    os.remove(path)
    os.mkfifo(path)
    assert "no regular file" in error_line(pack.read_bytes, first)


def test_a_shard_that_shrinks_while_it_is_open_is_named(pack):
    index = int(ORDER[-1])
    pack.read_bytes(index)
    path = os.path.join(pack.root, pack.index.shards[pack.index.samples["shard"][index]])
    os.truncate(path, 600)
    assert "does not have the CRC-32" in error_line(pack.read_bytes, index)


def test_passing_errors_are_tried_again_with_a_new_handle(pack, monkeypatch, capsys):
    monkeypatch.setattr(reading, "_DELAYS", (0.0, 0.0, 0.0))
    expected = pack.read_bytes(0)
    pread, failing = os.pread, [errno.EIO, errno.ESTALE]

    def flaky(*args):
        if failing:
            raise OSError(failing.pop(), "failed on purpose")
        return pread(*args)

    monkeypatch.setattr(os, "pread", flaky)
    before = reading.num_retries()
    misses = pack._open_shard.cache_info().misses
    assert pack.read_bytes(0) == expected
    assert reading.num_retries() == before + 2
    assert pack._open_shard.cache_info().misses == 1 <= misses  # the cache was cleared
    assert capsys.readouterr().err.count("trying again") == 2
    failing[:] = [errno.EIO] * 4
    message = error_line(pack.read_bytes, 0)
    assert "images-000001.tar: cannot be read" in message and "in each of 4 tries" in message


def test_reading_ahead_announces_each_block_once(pack, monkeypatch):
    asked = []
    monkeypatch.setattr(shards, "_READ_AHEAD_STEP", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, length, advice: asked.append(
        (os.fstat(fd).st_ino, at, at + length)
    ))  # fmt: skip
    ahead = pack.reading_ahead(4, 1)
    for index in ORDER[4:8]:
        ahead.read_bytes(index)
    first = list(asked)
    for index in ORDER[4:8]:
        ahead.read_bytes(index)
    assert asked == first and max(stop - at for _, at, stop in asked) <= 100
    covered = {(inode, byte) for inode, at, stop in asked for byte in range(at, stop)}
    for number, index in enumerate(ORDER):
        sample = pack.index.samples[index]
        inode = os.stat(os.path.join(pack.root, pack.index.shards[sample["shard"]])).st_ino
        own = {(inode, byte) for byte in range(sample["offset"], sample["offset"] + sample["size"])}
        assert (own <= covered) == (4 <= number < 8)
    pack.read_bytes(0)
    assert asked == first


def test_the_sha256_is_compared_on_request(pack):
    samples = pack.index.samples.copy()
    samples["sha256"][6, 31] ^= 1
    rewrite_samples(pack, samples)
    other = open_pack(pack.root)
    assert other.read_bytes(6) == pack.read_bytes(6)
    assert "image 6" in error_line(other.check, 6) and "SHA-256" in error_line(other.check, 6)
    for index in (5, 7):
        other.check(index)


def changed(pack, change):
    path = os.path.join(pack.root, "pack.json")
    content = json.loads(open(path).read())
    change(content)
    with open(path, "w") as file:
        json.dump(content, file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="other"), "'format' is not"),
        (lambda c: c.update(version=2), "is of version 2"),
        (lambda c: c.update(version=True), "is of version True"),
        (lambda c: c.update(num_images=11), "it has 560 bytes, allowed is 616"),
        (lambda c: c.update(num_images=-1), "'num_images' is -1"),
        (lambda c: c.update(num_images=1 << 60), "'num_images' is"),
        (lambda c: c.update(num_images="10"), "'num_images' is '10'"),
        (lambda c: c.update(class_names=["cat"]), "label of image 5 is out of range"),
        (lambda c: c.update(class_names=None), "label of image 0 is out of range"),
        (lambda c: c.update(class_names=["cat", "cat"]), "holds a name twice"),
        (lambda c: c.update(class_names=["cat", 3]), "no list of names"),
        (lambda c: c.update(class_names={}), "no list of names"),
        (lambda c: c.update(shards=[]), "no list of shards"),
        (lambda c: c.update(shards=c["shards"][:1]), "shard of image 0 is out of range"),
        (lambda c: c["shards"].append(c["shards"][0]), "holds a name twice"),
        (lambda c: c["shards"][0].update(bytes=512), "'bytes' is 512"),
        (lambda c: c["shards"][0].update(bytes=1024), "offset of image 2 is out of range"),
        (lambda c: c["shards"][0].update(bytes=1 << 63), "'bytes' is"),
        (lambda c: c["shards"][0].update(bytes=1 << 60), "the index says"),
        (lambda c: c["sha256"].update({"samples.bin": "0"}), "samples.bin: its SHA-256 is not"),
        (lambda c: c.pop("sha256"), "its SHA-256 is not"),
        *(
            (lambda c, name=name: c["shards"][0].update(name=name), "no plain name of a .tar")
            for name in (
                "../images-000000.tar", "/etc/passwd.tar", "a/b.tar", "..", ".tar", "", None,
                ["x.tar"], "x.tar\0", "x\n.tar", "-x.tar", ".x.tar", "pipe:cat x.tar",
                "x" * 300 + ".tar", "x.tar ", "http://x.tar", "~.tar", "$(touch x).tar", "x.tar\n",
            )
        ),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_refused(pack, change, said):
    changed(pack, change)
    assert said in error_line(open_pack, pack.root)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset", 0), ("offset", 513), ("offset", 1 << 40), ("offset", (1 << 64) - 512),
        ("size", (1 << 32) - 1), ("size", 1 << 20), ("shard", 99), ("label", -2), ("label", 2),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(pack, field, value):
    samples = pack.index.samples.copy()
    samples[field][6] = value
    rewrite_samples(pack, samples)
    assert f"{field} of image 6 is out of range" in error_line(open_pack, pack.root).replace(
        "size of image 6", f"{field} of image 6"
    )


def rewrite_samples(pack, samples):
    """As an attacker would, with the right hash in pack.json."""
    import hashlib

    assert samples.dtype == SAMPLE
    with open(os.path.join(pack.root, "samples.bin"), "wb") as file:
        file.write(samples.tobytes())
    digest = hashlib.sha256(samples.tobytes()).hexdigest()
    changed(pack, lambda c: c["sha256"].update({"samples.bin": digest}))


@pytest.mark.parametrize("name", ["pack.json", "samples.bin", "names.txt"])
def test_index_files_that_are_no_plain_files_are_refused(pack, tmp_path, name):
    path = os.path.join(pack.root, name)
    content = open(path, "rb").read()
    os.remove(path)
    if name != "pack.json":  # without it a folder is no pack
        assert "No such file" in error_line(open_pack, pack.root)
    (tmp_path / "elsewhere").write_bytes(content)
    os.symlink(tmp_path / "elsewhere", path)
    assert f"{path}: cannot be read (it is a link" in error_line(find_images, pack.root)
    os.remove(path)
    os.mkfifo(path)
    assert "no regular file" in error_line(find_images, pack.root)
    os.remove(path)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: its size must be seen before it is read
    assert "allowed is" in error_line(find_images, pack.root)


def test_the_index_can_be_read_by_hand(pack):
    """As docs/PACKED_DATA.md says."""
    samples = np.fromfile(os.path.join(pack.root, "samples.bin"), dtype=SAMPLE)
    assert (samples == read_index(pack.root).samples).all()
    assert SAMPLE.itemsize == 56
