"""tools/pack_images.py: whole or not at all, the same bytes each time, readable by other tools."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packs import pack_tool, refused, run, write_images
from PIL import Image

from moco.data import shard_writer
from moco.data.images import find_images
from moco.data.rgb import Decoding
from moco.data.shard_index import INDEX_FILE
from moco.errors import DataError

ROOT = Path(__file__).parents[2]
NAMES = [f"{name}/{i}.{suffix}" for name in ("cat", "dog") for i in range(6)
         for suffix in ("png", "jpg")]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", NAMES, size=(40, 30))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [f"{p.relative_to(folder)}:{hashlib.sha256(p.read_bytes()).hexdigest()}" for p in files]
    return "\n".join(parts)


def same_images(source, other) -> bool:
    return (source.paths, source.labels, source.class_names) == (
        other.paths, other.labels, other.class_names
    ) and all(source.read_bytes(i) == other.read_bytes(i) for i in range(len(source)))  # fmt: skip


def test_a_pack_has_the_folders_images_and_is_made_alike_each_time(images, tmp_path, capsys):
    assert run(images, tmp_path / "a", "--shard-size-mb", "0.02") == 0
    said = capsys.readouterr().out
    assert re.search(r"a: 24 images in \d+ shards, 0\.1 MiB", said)
    assert same_images(find_images(images), find_images(tmp_path / "a"))
    for path in images.rglob("*.png"):
        os.utime(path, (0, 0))
    assert run(images, tmp_path / "b", "--shard-size-mb", "0.02", workers=2) == 0
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    shards = list((tmp_path / "a").glob("*.tar"))
    assert len(shards) > 3 and max(shard.stat().st_size for shard in shards) <= 0.02 * 2**20
    assert run(images, tmp_path / "c", "--in-order", "--shard-size-mb", "0.02") == 0
    assert digest(tmp_path / "a") != digest(tmp_path / "c")
    ordered, shuffled = (find_images(tmp_path / name) for name in ("c", "a"))
    assert same_images(ordered, shuffled)
    assert ordered.storage_order.tolist() == list(range(24))
    assert shuffled.storage_order.tolist() != list(range(24))


def test_splits_stay_apart(tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split, [f"{split}-{name}" for name in NAMES[:4]])
    write_images(tmp_path / "images" / "test", ["x.png"])  # ImageNet's is flat
    assert run(tmp_path / "images", tmp_path / "packed") == 0
    for split in ("train", "val", "test"):
        source = find_images(tmp_path / "images" / split)
        assert same_images(source, find_images(tmp_path / "packed" / split))
    assert same_images(find_images(tmp_path / "images"), find_images(tmp_path / "packed"))
    assert capsys.readouterr().out.count("images in 1 shards") == 3


def test_resizing_scales_only_what_is_larger(images, tmp_path):
    write_images(images, ["cat/small.png"], size=(16, 12))
    Image.new("RGBA", (90, 30), "red").save(images / "dog" / "wide.png")
    assert run(images, tmp_path / "packed", "--resize", 20, "--quality", "90") == 0
    packed, source = find_images(tmp_path / "packed"), find_images(images)
    assert packed.paths == source.paths and packed.labels == source.labels
    for index, path in enumerate(source.paths):
        image = packed.open(index)
        if path == "cat/small.png":
            assert packed.read_bytes(index) == source.read_bytes(index)
            continue
        assert image.size == ((60, 20) if path == "dog/wide.png" else (27, 20))
        expected = source.open(index).resize(image.size, Image.Resampling.LANCZOS)
        expected_file = io.BytesIO()
        expected.save(expected_file, "JPEG", quality=90)
        assert packed.read_bytes(index) == expected_file.getvalue()
    content = json.loads((tmp_path / "packed" / INDEX_FILE).read_text())
    assert content["made"]["resize"] == 20 and content["made"]["quality"] == 90


def test_nothing_is_overwritten_or_packed_into_itself(images, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert "exists; nothing is overwritten" in refused(capsys, images, tmp_path / "there")
    assert "is inside" in refused(capsys, images, images / "packed")
    (tmp_path / "out.partial").mkdir()
    assert "another packing is at work" in refused(capsys, images, tmp_path / "out")
    assert run(images, tmp_path / "once") == 0
    capsys.readouterr()
    assert "is packed already" in refused(capsys, tmp_path / "once", tmp_path / "twice")
    assert "is packed already" in refused(capsys, tmp_path / "once" / "", tmp_path / "twice")
    assert "does not exist" in refused(capsys, tmp_path / "missing", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "once", "out.partial", "there"]
    for flag, value in (("--resize", 0), ("--quality", 101), ("--shard-size-mb", 0)):
        assert f"{flag} {value}" in refused(capsys, images, tmp_path / "x", flag, value).replace(
            "0.0:", "0:"
        )


@pytest.mark.parametrize("when", ["shard", "index", "verify"])
def test_a_failure_leaves_nothing_behind(images, tmp_path, capsys, monkeypatch, when):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "file"))

    if when == "shard":
        monkeypatch.setattr(shard_writer._ShardWriter, "_finish", full)
    elif when == "index":
        monkeypatch.setattr(shard_writer, "write_index", full)
    else:
        monkeypatch.setattr(pack_tool, "verify", lambda *_: (_ for _ in ()).throw(DataError("x")))
    message = refused(capsys, images, tmp_path / "out")
    assert when == "verify" or "cannot be written (No space left on device)" in message
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


KILLED = """
import os, signal, sys
from moco.data import shard_writer
written = []
real = shard_writer._ShardWriter._finish
def finish(self):
    real(self)
    written.append(self.name)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
shard_writer._ShardWriter._finish = finish
sys.path.insert(0, os.path.join(sys.argv[1], "tools"))
import pack_images
pack_images.main([*sys.argv[2:], "--shard-size-mb", "0.02", "--workers", "0"])
"""


def test_a_killed_packing_is_never_taken_for_a_whole_one(images, tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, ROOT, images, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.partial").iterdir())) == 3
    with pytest.raises(DataError):
        find_images(tmp_path / "out.partial")
    assert "remove it if none runs" in refused(capsys, images, tmp_path / "out")


def test_unreadable_images_are_named_or_skipped_and_listed(images, tmp_path, capsys):
    (images / "cat" / "1.jpg").write_bytes(b"text")
    (images / "dog" / "0.png").write_bytes(b"")
    assert "1.jpg: cannot be read" in refused(capsys, images, tmp_path / "out", "--in-order")
    assert not (tmp_path / "out").exists()
    assert run(images, tmp_path / "out", "--skip-unreadable") == 0
    said = capsys.readouterr().out
    assert "22 images" in said and "skipped 2 unreadable images" in said
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["cat/1.jpg", "dog/0.png"]
    packed, source = find_images(tmp_path / "out"), find_images(images)
    left = [i for i, p in enumerate(source.paths) if p not in ("cat/1.jpg", "dog/0.png")]
    assert packed.paths == tuple(source.paths[i] for i in left)
    assert packed.labels == tuple(source.labels[i] for i in left)
    assert [packed.read_bytes(n) == source.read_bytes(i) for n, i in enumerate(left)] == [True] * 22
    for path in images.rglob("*.*g"):
        path.write_bytes(b"")
    message = refused(capsys, images, tmp_path / "none", "--skip-unreadable")
    assert "none of its 24 images can be read" in message


def test_a_failing_disk_is_not_skipped(images, tmp_path, capsys, monkeypatch):
    def broken(self, index):
        raise DataError("the disk fails")

    monkeypatch.setattr("moco.data.images.ImageSource.read_bytes", broken)
    assert "the disk fails" in refused(capsys, images, tmp_path / "out", "--skip-unreadable")


def test_names_that_cannot_be_listed_are_refused(tmp_path, capsys):
    write_images(tmp_path / "images", ["a.png"])
    os.rename(tmp_path / "images" / "a.png", tmp_path / "images" / "a\nb.png")
    assert "line feed" in refused(capsys, tmp_path / "images", tmp_path / "out")
    write_images(tmp_path / "bytes", ["a.png"])
    os.rename(tmp_path / "bytes" / "a.png", os.fsencode(tmp_path / "bytes") + b"/\xff.png")
    assert "broken UTF-8" in refused(capsys, tmp_path / "bytes", tmp_path / "out")


def test_a_line_a_minute_without_a_terminal(images, tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 100_000, 7))
    monkeypatch.setattr(pack_tool.time, "monotonic", lambda: float(next(clock)))
    assert run(images, tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "packing" in line]
    assert len(lines) == 2 and re.search(r"packing .*images: 9/24 images, \d+/s, \d+ min left",
                                         lines[0])  # fmt: skip


def test_a_copy_is_verified(tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split, NAMES)
    assert run(tmp_path / "images", tmp_path / "out") == 0
    assert run("--verify", tmp_path / "out") == 0
    assert run("--verify", tmp_path / "out" / "val") == 0
    assert capsys.readouterr().out.count("24 images, each with the SHA-256 of the index") == 3
    shard = tmp_path / "out" / "val" / "images-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 4
    shard.write_bytes(data)
    assert "the shard is damaged" in refused(capsys, "--verify", tmp_path / "out")
    assert "is no pack" in refused(capsys, "--verify", tmp_path / "images")
    assert "is no pack" in refused(capsys, "--verify", tmp_path / "images" / "train")


def test_command_line(images, tmp_path):
    """As a user runs it, with worker processes."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/pack_images.py", images, tmp_path / "out", "--workers", "2"],
        capture_output=True, text=True, timeout=180, cwd="/",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "24 images in 1 shards" in done.stdout
    wrong = [], [images], [images, "x", "--index-only", "y"], ["--verify", "x", "--index-only", "y"]
    for words in wrong:
        done = subprocess.run(
            [sys.executable, ROOT / "tools/pack_images.py", *words], capture_output=True, text=True
        )
        assert done.returncode == 2 and "pack_images.py: error:" in done.stderr


def test_webdataset_reads_our_shards(images, tmp_path):
    wds = pytest.importorskip("webdataset")
    assert run(images, tmp_path / "out", "--shard-size-mb", "0.02") == 0
    source = find_images(images)
    shards = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    seen = {}
    for sample in wds.WebDataset(shards, shardshuffle=False):
        suffix = "png" if "png" in sample else "jpg"
        seen[int(sample["__key__"])] = (sample[suffix], int(sample["cls"]))
    expected = [(source.read_bytes(i), source.labels[i]) for i in range(len(source))]
    assert [seen[i] for i in range(len(source))] == expected
    decoded = wds.WebDataset(shards[:1], shardshuffle=False).decode("pil")
    image, label = next(iter(decoded.to_tuple("png;jpg", "cls")))
    assert image.size == (40, 30) and label in (0, 1)


def test_16_bits_are_kept_or_scaled_by_a_range_where_images_are_resized(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    twelve = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(twelve).save(tmp_path / "images/x.png")
    (tmp_path / "images/notes.txt").write_text("x")
    assert run(tmp_path / "images", tmp_path / "kept") == 0
    assert "is in the index; left out: 1 x .txt file\n" in capsys.readouterr().out
    kept = find_images(tmp_path / "kept", Decoding((0, 4095)))
    assert (np.asarray(kept.open(0))[..., 0] == twelve >> 4).all()
    words = ("--resize", 32, "--quality", 100)
    assert run(tmp_path / "images", tmp_path / "a", *words) == 0
    assert run(tmp_path / "images", tmp_path / "b", *words, "--sixteen-bit-range", 0, 4095) == 0
    dark, scaled = (np.asarray(find_images(tmp_path / name).open(0)) for name in ("a", "b"))
    assert dark.max() < 20 and scaled.max() > 240  # the first is the control
    capsys.readouterr()
    for given, message in (
        (("--sixteen-bit-range", 0, 4095), "without --resize files keep their 16 bits"),
        ((*words, "--sixteen-bit-range", 9, 9), "allowed is 0 <= BLACK < WHITE <= 65535"),
        (("--max-image-pixels", 4095), "raise --max-image-pixels, now 4095"),
    ):
        assert refused(capsys, tmp_path / "images", tmp_path / "c", *given).count(message) == 1
