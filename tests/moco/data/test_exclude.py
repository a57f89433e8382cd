"""What --exclude names, and that it is found by content in folders, class folders and packs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict

import pytest
from packs import pack_folder
from PIL import Image

from moco.benchmarks.pictures import natural_picture
from moco.data import exclude
from moco.data.exclude import find_excluded, leave_out, without
from moco.data.images import find_images
from moco.data.shards import ShardSource
from moco.errors import DataError

NUM, TEST = 12, (2, 5, 7)  # images, and those that are tested on


def picture(seed):
    return Image.fromarray(natural_picture(seed, 96, 80))


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """JPEGImages of the test images, and splits that name them in the ways people write."""
    root = tmp_path_factory.mktemp("voc") / "MY:VOC"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for seed in range(NUM):
        picture(seed).save(root / "JPEGImages" / f"img {seed}.jpg", quality=90)
    splits = {
        "test": "".join(f"img {seed}\n" for seed in TEST),
        "dos": "\ufeff" + "\r\n".join(f"img {seed}.jpg" for seed in TEST),
        "gone": "img 2\nimg 99\n",
        "empty": "\n",
    }
    for name, text in splits.items():
        path = root / "ImageSets" / "Main" / f"{name}.txt"
        path.write_text(text, encoding="utf-8", newline="")
    return root


@pytest.fixture(scope="module")
def photos(voc, tmp_path_factory):
    """The same photographs in class folders under other names: test image 2 as it is, 5 as another
    format, 7 smaller."""
    root = tmp_path_factory.mktemp("photos")
    for seed in range(NUM):
        path = root / "ab"[seed % 2] / f"photo_{seed:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(voc / "JPEGImages" / f"img {seed}.jpg", path)
    picture(5).save(root / "b" / "photo_05.jpg", format="PNG")
    picture(7).resize((48, 40), Image.Resampling.LANCZOS).save(root / "b" / "photo_07.jpg")
    return root


def paths(source):
    return [os.path.basename(path) for path in source.paths]


KEPT = [f"photo_{seed:02d}.jpg" for seed in range(NUM) if seed not in TEST]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("near_copies", [True, False])
def test_test_images_are_found_by_content(voc, photos, tmp_path, packed, near_copies):
    source = pack_folder(photos, tmp_path / "pack") if packed else find_images(photos)
    found = leave_out(source, [find_excluded(f"{voc}:test")], near_copies=near_copies)
    left = {os.path.basename(image["path"]): image["match"] for image in found.images}
    near = {"photo_05.jpg": "near", "photo_07.jpg": "near"} if near_copies else {}
    assert left == {"photo_02.jpg": "exact", **near}
    assert found.images[0]["like"].endswith("img 2.jpg")
    rest = without(source, found.images)
    assert type(rest) is type(source) and len(rest) == NUM - len(left)
    names = dict(zip(source.paths, range(NUM), strict=True))
    for index, path in enumerate(rest.paths):  # numbered anew: bytes and labels go along
        assert rest.read_bytes(index) == source.read_bytes(names[path])
        assert rest.labels[index] == source.labels[names[path]]
        assert rest.path(index) == source.path(names[path])
    total = f"{len(rest)} of 12 images used, {len(left)} left out by --exclude {voc}:test "
    assert f"{total}(1 exact, {len(near)} near)" in found.lines(NUM)
    if near_copies:
        assert sorted(paths(rest)) == KEPT


def test_a_pack_without_them_reads_in_blocks(voc, photos, tmp_path):
    source = pack_folder(photos, tmp_path / "pack")
    rest = without(source, leave_out(source, [find_excluded(f"{voc}:test")]).images)
    assert sorted(rest.storage_order.tolist()) == list(range(len(rest)))
    ahead = rest.reading_ahead(4, 2)
    assert isinstance(ahead, ShardSource)
    assert [ahead.read_bytes(i) for i in range(9)] == [rest.read_bytes(i) for i in range(9)]


def test_only_files_of_equal_size_are_read_where_bytes_are_compared(voc, photos, monkeypatch):
    source, read = find_images(photos), []
    original = type(source).read_bytes
    monkeypatch.setattr(
        type(source), "read_bytes", lambda s, i: read.append(s.path(i)) or original(s, i)
    )
    leave_out(source, [find_excluded(f"{voc}:test")], near_copies=False)
    assert {os.path.basename(path) for path in read} == {
        "photo_02.jpg", *(f"img {seed}.jpg" for seed in TEST)
    }  # fmt: skip


def write_coco(voc, path, prefix=""):
    images = [{"id": seed, "file_name": f"{prefix}img {seed}.jpg"} for seed in TEST]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    return path


def named(what):
    return sorted(os.path.basename(path) for path in find_excluded(str(what)).source.paths)


def test_the_ways_to_name_them(voc, tmp_path):
    wanted = sorted(f"img {seed}.jpg" for seed in TEST)
    assert named(f"{voc}:dos") == wanted
    folder = tmp_path / "some" / "below"
    folder.mkdir(parents=True)
    for name in wanted:
        shutil.copy(voc / "JPEGImages" / name, folder)
    assert named(tmp_path / "some") == wanted
    assert named(write_coco(voc, tmp_path / "a.json", "some/below/")) == wanted
    assert named(f"{write_coco(voc, tmp_path / 'b.json')}:{folder}") == wanted
    (tmp_path / "annotations").mkdir()
    shutil.copytree(folder, tmp_path / "val2017")
    assert named(write_coco(voc, tmp_path / "annotations" / "instances_val2017.json")) == wanted
    listed = tmp_path / "list.txt"
    listed.write_text(f"some/below/{wanted[0]}\n{folder / wanted[1]}\n\n  val2017/{wanted[2]}\n")
    assert named(listed) == wanted
    pack_folder(voc / "JPEGImages", tmp_path / "pack")
    assert len(find_excluded(str(tmp_path / "pack")).source) == NUM


def test_what_names_nothing_is_one_line(voc, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "list.txt").write_text("img 1.jpg\n")
    coco = write_coco(voc, tmp_path / "coco.json")
    cases = {
        "nowhere": "names nothing that exists; allowed: VOC_ROOT:SPLIT",
        f"{voc}:val": "val.txt is missing; splits there: dos, empty, gone, test",
        f"{voc}:gone": "1 of its images are missing (no image in",
        f"{voc}:empty": "holds no image",
        str(tmp_path / "none"): "holds no image",
        str(tmp_path / "bad.json"): "is not a file in COCO's format",
        str(tmp_path / "list.txt"): "1 of its images are missing (no file",
        str(coco): "its images are in none of",
        f"{coco}:{tmp_path}": f"3 of its images are missing (not in {tmp_path}",
    }
    for what, wanted in cases.items():
        with pytest.raises(DataError) as caught:
            find_excluded(what)
        message = str(caught.value)
        assert message.startswith("--exclude ") and wanted in message, message
        assert "\n" not in message


def test_several_exclusions_are_counted_apart(voc, photos, tmp_path):
    source = find_images(photos)
    shutil.copy(photos / "a" / "photo_00.jpg", tmp_path / "x.jpg")
    found = leave_out(source, [find_excluded(f"{voc}:test"), find_excluded(str(tmp_path))])
    assert [(c["num_named"], c["num_exact"], c["num_near"]) for c in found.counts] == [
        (3, 1, 2), (1, 1, 0)
    ]  # fmt: skip
    lines = found.lines(NUM)
    assert lines[0] == f"--exclude {voc}:test names 3 images: 3 images left out (1 exact, 2 near)"
    assert lines[2].startswith("8 of 12 images used, 4 left out by --exclude")
    assert any("near copy: b/photo_05.jpg of" in line for line in lines)
    with pytest.raises(DataError, match="leaves none of its 12 images"):
        without(source, leave_out(source, [find_excluded(str(photos))]).images)


def test_an_earlier_result_is_taken_only_where_nothing_changed(voc, photos, tmp_path, monkeypatch):
    images = shutil.copytree(photos, tmp_path / "images")
    known = tmp_path / exclude.RECORD_FILE
    exclusions = [find_excluded(f"{voc}:test")]
    found = leave_out(find_images(images), exclusions, known=known)
    known.write_text(json.dumps(asdict(found)))
    looked = []
    rows = exclude._rows
    monkeypatch.setattr(exclude, "_rows", lambda s, **o: looked.append(s.root) or rows(s, **o))
    again = leave_out(find_images(images), exclusions, known=known)
    assert again == found and looked == []
    shutil.copy(images / "a" / "photo_00.jpg", images / "a" / "photo_04.jpg")
    assert leave_out(find_images(images), exclusions, known=known) != found and looked
    known.write_text("{")
    leave_out(find_images(images), exclusions, known=known)


def test_unreadable_images_of_the_source_are_not_looked_at(voc, photos, tmp_path):
    """They end the run, or are replaced, when they are trained on."""
    images = shutil.copytree(photos, tmp_path / "images")
    (images / "a" / "broken.jpg").write_bytes(b"no image")
    (images / "a" / "gone.jpg").mkdir()
    found = leave_out(find_images(images), [find_excluded(f"{voc}:test")])
    assert len(found.images) == 3
