"""tools/pack_images.py --index-only: tar shards of others, some of them hostile."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from packs import refused, run, write_images
from PIL import Image
from torchvision.datasets import ImageFolder

from moco.data.images import find_images
from moco.data.shard_index import INDEX_FILE

NAMES = [f"{name}/{i}.{suffix}" for name in ("cat", "dog") for i in range(6)
         for suffix in ("png", "jpg")]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", NAMES)


def write_shard(path: Path, members, **options) -> None:
    """A tar file as other tools write it: GNU or PAX, with times and owners."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(data), 1700000000.123456, "someone"
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def files(images):
    return [(path, (images / path).read_bytes()) for path in sorted(NAMES)]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_of_others_are_indexed(files, tmp_path, form):
    folder = tmp_path / "shards"
    folder.mkdir()
    long = "x" * 90
    for number in range(2):
        members = []
        for i, (path, data) in enumerate(files[number::2]):
            key, suffix = f"sub/{long}/{i:05d}", path.rpartition(".")[2]
            members += [(f"{key}.json", b"{}"), (f"{key}.{suffix}", data)]
            members.append((f"{key}.cls", b"%d\n" % (i % 3)))
        write_shard(folder / f"s-{number}.tar", members, format=form)
    assert run("--index-only", folder) == 0
    found = find_images(folder)
    assert len(found) == 24 and found.class_names == ("0", "1", "2")
    assert found.labels == tuple(i % 3 for _ in range(2) for i in range(12))
    expected = [data for number in range(2) for _, data in files[number::2]]
    assert [found.read_bytes(i) for i in range(24)] == expected
    suffix = files[0][0].rpartition(".")[2]
    assert found.paths[0] == f"s-0.tar/sub/{long}/00000.{suffix}"
    assert found.storage_order.tolist() == list(range(24))


def test_the_same_index_for_a_pack_that_lost_its_own(images, tmp_path):
    assert run(images, tmp_path / "out", "--in-order", "--shard-size-mb", "0.02") == 0
    before = find_images(tmp_path / "out")
    (tmp_path / "out" / INDEX_FILE).unlink()
    assert run("--index-only", tmp_path / "out", workers=2) == 0
    after = find_images(tmp_path / "out")
    assert (after.index.samples == before.index.samples).all()
    assert after.index.shards == before.index.shards


def test_an_index_is_not_made_twice(files, tmp_path, capsys):
    write_shard(tmp_path / "a.tar", [("0.jpg", files[0][1])])
    assert run("--index-only", tmp_path) == 0
    capsys.readouterr()
    assert "has an index" in refused(capsys, "--index-only", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no .tar file" in refused(capsys, "--index-only", tmp_path / "empty")


IMAGE = io.BytesIO()
Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(IMAGE, "PNG")
PNG = IMAGE.getvalue()


def archive(members, **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(data)
            member.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def pax(**records) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.size, member.pax_headers = len(PNG), records
        tar.addfile(member, io.BytesIO(PNG))
    return buffer.getvalue()


def long_names(number: int) -> bytes:
    """Headers that each announce the name of the next, thousands deep."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    return (header.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")) * number


FILE = tarfile.REGTYPE
HOSTILE = {
    "a link out": (archive([("0.png", tarfile.SYMTYPE, b"")]), "no regular file"),
    "a hard link": (archive([("0.png", tarfile.LNKTYPE, b"")]), "no regular file"),
    "a device": (archive([("0.png", tarfile.CHRTYPE, b"")]), "no regular file"),
    "a pipe": (archive([("0.png", tarfile.FIFOTYPE, b"")]), "no regular file"),
    "a name that leads out": (archive([("../0.png", FILE, PNG)]), "stays in its folder"),
    "an absolute name": (archive([("/tmp/0.png", FILE, PNG)]), "stays in its folder"),
    "a name of two lines": (archive([("a\nb.png", FILE, PNG)]), "stays in its folder"),
    "no suffix": (archive([("image", FILE, PNG)]), "hold no readable image"),
    "no key": (archive([(".png", FILE, PNG)]), "hold no readable image"),
    "two images": (archive([("0.png", FILE, PNG), ("0.jpg", FILE, PNG)]), "has 2 images"),
    "no image": (archive([("0.txt", FILE, b"x")]), "hold no readable image"),
    "a member twice": (archive([("0.png", FILE, PNG), ("0.png", FILE, PNG)]), "comes twice"),
    "a label of bytes": (
        archive([("0.png", FILE, PNG), ("0.cls", FILE, b"\xff\xfe")]), "a line of text"),
    "a label of two lines": (
        archive([("0.png", FILE, PNG), ("0.cls", FILE, b"a\nb")]), "a line of text"),
    "an empty label": (archive([("0.png", FILE, PNG), ("0.cls", FILE, b" ")]), "holds b''"),
    "a long label": (
        archive([("0.png", FILE, PNG), ("0.cls", FILE, b"a" * 257)]), "up to 256 bytes"),
    "a fraction as label": (
        archive([("0.png", FILE, PNG), ("0.cls", FILE, b"1.5")]), "holds b'1.5'"),
    "a negative label": (archive([("0.png", FILE, PNG), ("0.cls", FILE, b"-1")]), "holds b'-1'"),
    "a huge label": (
        archive([("0.png", FILE, PNG), ("0.cls", FILE, b"9" * 30)]), "allowed is 0 to"),
    "a label of many digits": (
        archive([("0.png", FILE, PNG), ("0.cls", FILE, b"9" * 5000)]), "allowed is 0 to"),
    "labels for some": (
        archive([("0.png", FILE, PNG), ("0.cls", FILE, b"1"), ("1.png", FILE, PNG)]),
        "1 of 2 samples have no .cls"),
    "a pickle that calls a shell": (
        archive([("0.pkl", FILE, b"cos\nsystem\n(S'touch touched'\ntR.")]),
        "hold no readable image"),
    "an unreadable image": (archive([("0.png", FILE, PNG[:40])]), "cannot be read as an image"),
    "a gzip archive": (archive([("0.png", FILE, PNG)]).join((b"\x1f\x8b\x08", b"")), "tar archive"),
    "a cut archive": (archive([("0.png", FILE, PNG)])[:550], "do not fit"),
    "text": (b"hello" * 1000, "tar archive"),
    "an empty file": (b"", "tar archive"),
    "zeros": (bytes(10240), "hold no readable image"),
    "a size by PAX": (pax(size=str(1 << 60)), "do not fit"),
    "a negative size by PAX": (pax(size="-1024"), "a.tar"),
    "a sparse file by PAX": (pax(**{"GNU.sparse.size": "99999999999", "GNU.sparse.numblocks": "1",
                                    "GNU.sparse.offset": "0"}), "a.tar"),
    "names within names": (long_names(5000), "tar archive"),
    "damage in the middle": (
        archive([("0.png", FILE, PNG)])[:1024] + b"\xff" * 512 + archive([("1.png", FILE, PNG)]),
        "no member's header at 1024"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    data, reason = HOSTILE[kind]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(data)
    assert reason in refused(capsys, "--index-only", tmp_path / "shards")
    assert [p.name for p in tmp_path.rglob("*")] == ["shards", "a.tar"]


def test_labels_of_text_are_class_names(tmp_path):
    """Over shards, in each of which other classes come first."""
    for shard, texts in (("a", ("zebra", "7")), ("b", ("golden retriever\n", "zebra", "né"))):
        members = []
        for number, text in enumerate(texts):
            members += [(f"{number}.png", FILE, PNG), (f"{number}.cls", FILE, text.encode())]
        (tmp_path / f"{shard}.tar").write_bytes(archive(members))
    assert run("--index-only", tmp_path) == 0
    found = find_images(tmp_path)
    assert found.class_names == ("7", "golden retriever", "né", "zebra")
    assert found.labels == (3, 0, 1, 3, 2)


def test_labels_that_are_all_numbers_stay_numbers(tmp_path):
    members = []
    for number, text in enumerate(("3", "001", "3")):
        members += [(f"{number}.png", FILE, PNG), (f"{number}.cls", FILE, text.encode())]
    (tmp_path / "a.tar").write_bytes(archive(members))
    assert run("--index-only", tmp_path) == 0
    assert find_images(tmp_path).class_names == ("0", "1", "2", "3")
    assert find_images(tmp_path).labels == (3, 1, 3)


BESIDE = [
    ("README", FILE, b"made by us"), ("LICENSE.txt", FILE, b"free"), (".hidden", FILE, b""),
    ("__meta__/x.json", FILE, b"{}"), ("sub/__meta__", FILE, b""),
    ("0.json", FILE, b"{}"), ("0.png", FILE, PNG), ("0.txt", FILE, b"a cat"),
    ("1.json", FILE, b"{}"), ("2.png", FILE, PNG),
]  # fmt: skip


def test_other_members_are_left_unread_and_counted(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(archive(BESIDE))
    assert run("--index-only", tmp_path) == 0
    assert find_images(tmp_path).paths == ("a.tar/0.png", "a.tar/2.png")
    said = capsys.readouterr().out
    assert "left unread: 4 members without key and suffix" in said and "a.tar/README" in said
    assert "left unread: 2 keys without an image (first: a.tar/LICENSE.txt)" in said
    assert "left unread: 2 other members beside an image" in said


def test_the_same_images_as_webdataset_finds(tmp_path):
    wds = pytest.importorskip("webdataset")
    (tmp_path / "a.tar").write_bytes(archive(BESIDE))
    assert run("--index-only", tmp_path) == 0
    samples = wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    theirs = [f"a.tar/{s['__key__']}.png" for s in samples if "png" in s]
    assert tuple(theirs) == find_images(tmp_path).paths


def test_unreadable_images_of_others_can_be_skipped(tmp_path, capsys):
    data = archive([("0.png", FILE, PNG), ("1.png", FILE, PNG[:40]), ("2.png", FILE, PNG)])
    (tmp_path / "a.tar").write_bytes(data)
    assert run("--index-only", tmp_path, "--skip-unreadable") == 0
    assert find_images(tmp_path).paths == ("a.tar/0.png", "a.tar/2.png")
    line = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert line["name"] == "a.tar/1.png" and "cannot be read" in line["reason"]


def test_shards_that_are_no_plain_files_are_refused(tmp_path, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    (tmp_path / "a.tar").write_bytes(archive([("0.png", FILE, PNG)]))
    os.symlink(tmp_path / "a.tar", folder / "a.tar")
    assert "it is a link" in refused(capsys, "--index-only", folder)
    os.remove(folder / "a.tar")
    os.mkfifo(folder / "a.tar")
    assert "no regular file" in refused(capsys, "--index-only", folder)
    os.rename(folder / "a.tar", folder / "a b;c.tar")
    assert "no plain name" in refused(capsys, "--index-only", folder)


def test_shards_that_webdataset_wrote_are_indexed(images, tmp_path):
    wds = pytest.importorskip("webdataset")
    folder = ImageFolder(images)
    (tmp_path / "shards").mkdir()
    pattern = str(tmp_path / "shards" / "part-%04d.tar")
    with wds.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
        for index, (path, label) in enumerate(folder.samples):
            suffix = path.rpartition(".")[2]
            content = {suffix: Path(path).read_bytes(), "cls": label, "json": {"path": path}}
            writer.write({"__key__": f"{index:06d}", **content})
    assert run("--index-only", tmp_path / "shards") == 0
    found, source = find_images(tmp_path / "shards"), find_images(images)
    assert len(found.index.shards) == 3 and found.labels == source.labels
    assert [found.read_bytes(i) == source.read_bytes(i) for i in range(24)] == [True] * 24
