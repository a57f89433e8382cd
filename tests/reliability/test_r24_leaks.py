"""R24: test images in the pretraining set, as they are, renamed, re-encoded, resized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from pretrain_runs import arguments
from scripts import load_tool

from detection import leaks
from detection.convert import convert_checkpoint
from moco.benchmarks.pictures import natural_picture
from moco.data import exclude, image_hash, image_rows
from moco.errors import CheckpointError
from moco.training import checkpoint as ckpt
from moco.training.image_record import ImageRecord

pytestmark = pytest.mark.faults
NETWORK = {"MODEL__ARCH": "resnet50", "MODEL__STEM": "imagenet", "TRAIN__EPOCHS": 1}
# Test images: how picture n of the pretraining set comes to be one of them.
LEAKED = {
    "exact": {
        0: lambda path, out: shutil.copy(path, out),
        1: lambda path, out: shutil.copy(path, out),
    },
    "near": {
        2: lambda path, out: Image.open(path).save(out, quality=50),
        3: lambda path, out: Image.open(path).save(out, format="PNG"),
        4: lambda path, out: half(path).save(out, quality=90),
        5: lambda path, out: half(path).save(out, format="WEBP"),
    },
}
CLEAN = (100, 101, 102, 103)  # pictures that nobody trained on
NUM_LEAKED, NUM_TEST = 6, 10


def half(path: Path) -> Image.Image:
    return Image.open(path).reduce(2)


def draw(seed: int, path: Path) -> None:
    Image.fromarray(natural_picture(seed, 120, 90)).save(path, quality=92)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """photos/ with 24 pictures and VOC/ with 10 test images, 6 of which are among those."""
    folder = tmp_path_factory.mktemp("leaks")
    photos, images = folder / "photos", folder / "VOC" / "JPEGImages"
    photos.mkdir()
    images.mkdir(parents=True)
    for seed in range(24):
        draw(seed, photos / f"{seed:02d}.jpg")
    for kind in LEAKED.values():
        for seed, make in kind.items():
            make(photos / f"{seed:02d}.jpg", images / f"t{seed}.jpg")
    for seed in CLEAN:
        draw(seed, images / f"t{seed}.jpg")
    lists = folder / "VOC" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "test.txt").write_text("".join(f"{p.stem}\n" for p in sorted(images.iterdir())))
    return folder


def pretrain(base: Path, run: Path, *flags: str) -> None:
    with pytest.raises(SystemExit) as end:
        load_tool("pretrain").main(arguments(base / "photos", run, *flags, **NETWORK))
    assert end.value.code == 0


@pytest.fixture(scope="module")
def weights(base):
    """Converted weights of a run on photos/."""
    pretrain(base, base / "run")
    convert_checkpoint(base / "run", base / "moco.pth")
    return base / "moco.pth"


def records(base: Path) -> list[dict]:
    return [{"file_name": str(p)} for p in sorted((base / "VOC" / "JPEGImages").iterdir())]


def num_right(base: Path, rows: np.ndarray, max_distance: int = image_rows.MAX_DISTANCE) -> int:
    """How many of the ten test images are called what they are."""
    wanted = {f"t{seed}.jpg": kind for kind, made in LEAKED.items() for seed in made}
    names = [Path(r["file_name"]) for r in records(base)]
    found = image_rows.match(np.stack([image_hash.hash_file(n) for n in names]), rows, max_distance)
    kinds = {image_rows.EXACT: "exact", image_rows.NEAR: "near"}
    return sum(
        kinds.get(int(kind)) == wanted.get(name.name)
        for name, kind in zip(names, found.kind, strict=True)
    )


def test_every_leaked_test_image_is_counted_and_no_other(base, weights, observed):
    rows = leaks.find_record(weights).rows
    assert len(rows) == 24  # three batches, all of the pictures
    observed("R24", num_right(base, rows), NUM_TEST)
    found = leaks.check_leak(str(weights), records(base))
    assert (found["num_exact"], found["num_near"], found["known"]) == (2, 4, "all")
    assert found["words"] == (
        "6 of 10 test images were in the pretraining set of these weights (2 exact, 4 near copies: "
        "t0.jpg, t1.jpg, t2.jpg, ...)"
    )
    assert leaks.line_of(found) == f"warning: {found['words']}"
    observed("R24", 1, 1)


def test_control_without_the_comparison_or_with_a_loose_one_it_is_wrong(base, observed):
    rows = np.stack([image_hash.hash_file(p) for p in sorted((base / "photos").iterdir())])
    broken = [
        num_right(base, rows[:0]),  # nothing recorded
        num_right(base, rows, max_distance=-1),  # no near copies
        num_right(base, rows, max_distance=70),  # any picture is a copy
    ]
    assert broken == [4, 6, 6]
    observed("R24", sum(count < NUM_TEST for count in broken), 3, control=True)


def test_excluded_test_images_are_not_trained_on(base, observed, capsys):
    run, out = base / "excluded", base / "excluded.pth"
    pretrain(base, run, "--exclude", f"{base}/VOC:test")
    said = capsys.readouterr().out
    what = f"{base}/VOC:test"
    assert f"18 of 24 images used, 6 left out by --exclude {what} (2 exact, 4 near)" in said
    manifest = ckpt.verify_manifest(next(run.glob("*.pth.tar")))
    assert manifest["excluded"] == [
        {"exclude": f"{base}/VOC:test", "num_named": 10, "num_exact": 2, "num_near": 4}
    ]
    listed = json.loads((run / exclude.RECORD_FILE).read_text())["images"]
    assert [image["path"] for image in listed] == [f"{seed:02d}.jpg" for seed in range(6)]
    convert_checkpoint(run, out)
    found = leaks.check_leak(str(out), records(base))
    assert found["words"] == (
        "none of 10 test images was in the pretraining set of these weights (16 images)"
    )
    assert leaks.line_of(found) == f"test images: {found['words']}"
    observed("R24", NUM_LEAKED, NUM_LEAKED)
    # The list is part of the run's identity; the same command finds nothing left to do.
    pretrain(base, run, "--resume", "--exclude", f"{base}/VOC:test")
    with pytest.raises(SystemExit) as end:
        load_tool("pretrain").main(arguments(base / "photos", run, "--resume", **NETWORK))
    assert end.value.code == 2 and "another set of images" in capsys.readouterr().err


def test_control_without_exclude_they_are_trained_on(base, weights, observed):
    found = leaks.check_leak(str(weights), records(base))
    observed("R24", int(found["num_exact"] + found["num_near"] > 0), 1, control=True)


def test_a_run_stopped_in_its_first_epoch_says_what_it_has_shown(base, tmp_path, observed):
    run = tiny.trainer(base / "photos", tmp_path, [], **NETWORK)
    assert run.train([tiny.StopAfter(1)]) == 143
    convert_checkpoint(tmp_path, tmp_path / "part.pth")
    part = leaks.find_record(tmp_path / "part.pth")
    convert_checkpoint(base / "run", tmp_path / "whole.pth")
    whole = {row.tobytes() for row in leaks.find_record(tmp_path / "whole.pth").rows}
    assert len(part.rows) == 16 and {row.tobytes() for row in part.rows} < whole
    observed("R24", 1, 1)


def test_what_is_not_known_is_said_to_be_unknown(base, weights, tmp_path, observed):
    def words(path) -> str:
        found = leaks.check_leak(str(path), records(base))
        assert found["known"] == "no" and found["num_exact"] is None
        assert leaks.line_of(found).startswith("test images: unknown whether test images were in")
        return found["words"]

    def copy(name: str, *suffixes: str) -> Path:
        for suffix in ("", *suffixes):
            shutil.copy(f"{weights}{suffix}", tmp_path / f"{name}{suffix}")
        return tmp_path / name

    report, rows = ".conversion.json", ".images.safetensors"
    alone = words(copy("alone.pth"))
    assert "has no report of a conversion beside it (alone.pth.conversion.json)" in alone
    other = copy("other.pth", report, rows)
    torch.save({"model": {}}, other)
    assert "other.pth.conversion.json is of other weights than other.pth" in words(other)
    shutil.copy(weights, tmp_path / "moco.pth")
    shutil.copy(f"{weights}{report}", tmp_path / f"moco.pth{report}")
    assert "which moco.pth.conversion.json names, is missing" in words(tmp_path / "moco.pth")
    foreign = tmp_path / "theirs.pth.tar"
    content = ckpt.read_torch_file(next((base / "run").glob("*.pth.tar")))
    torch.save({k: content[k] for k in ("epoch", "arch", "state_dict")}, foreign)
    convert_checkpoint(foreign, tmp_path / "theirs.pth")
    assert "it is not a checkpoint of tools/pretrain.py" in words(tmp_path / "theirs.pth")
    (tmp_path / f"moco.pth{rows}").write_bytes(Path(f"{weights}{rows}").read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one in moco.pth.conversion"):
        words(tmp_path / "moco.pth")
    assert leaks.check_leak("", records(base)) is None
    observed("R24", 6, 6)


def test_a_part_that_is_known_is_called_a_part(base, weights, monkeypatch, observed):
    rows = leaks.find_record(weights).rows
    for known, wanted in (
        (rows, "at least "),
        (rows[:0], "none of 10 test images is known to have been in the pretraining set"),
    ):
        record = ImageRecord(known, "the first 4 steps were not recorded")
        monkeypatch.setattr(leaks, "find_record", lambda path, record=record: record)
        words = leaks.check_leak(str(weights), records(base))["words"]
        assert words.startswith(wanted) and words.endswith(record.lacks)
    observed("R24", 2, 2)
