from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from moco.data.images import find_images
from moco.data.rgb import load_rgb
from moco.errors import DataError


def write_image(path, seed=0, size=(7, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def error_line(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_class_folders_in_the_order_of_torchvision(tmp_path):
    names = ["b/z.png", "b/a.jpg", "b/sub/m.JPEG", "b/c.png", "b-2/x.png"]
    names += ["a/deep/er/1.bmp", "a/2.png"]
    random.Random(0).shuffle(names)
    for name in names:
        write_image(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    source = find_images(tmp_path)
    expected = ImageFolder(tmp_path)
    assert [(source.path(i), source.labels[i]) for i in range(len(source))] == expected.samples
    assert list(source.class_names) == expected.classes == ["a", "b", "b-2"]
    assert len(source) == 7
    assert source.open(0).size == (7, 5)


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.jpg", ".hidden.png"):
        write_image(tmp_path / name)
    write_image(tmp_path / ".thumbnails" / "a.png")
    (tmp_path / "readme.md").write_text("")
    (tmp_path / "notes").mkdir()
    source = find_images(tmp_path)
    assert (source.paths, source.labels, source.class_names) == (("a.jpg", "b.png"), None, ())


@pytest.mark.parametrize("layout", ["flat", "classes"])
def test_train_split_is_used(tmp_path, layout):
    inner = "x.png" if layout == "flat" else "cat/x.png"
    write_image(tmp_path / "train" / inner)
    assert find_images(tmp_path).root == str(tmp_path / "train")
    write_image(tmp_path / "val" / inner)
    source = find_images(tmp_path)
    assert (source.root, source.paths) == (str(tmp_path / "train"), (inner,))


def test_class_named_train_is_a_class(tmp_path):
    for name in ("bus", "train"):
        write_image(tmp_path / name / "x.png")
    source = find_images(tmp_path)
    assert (source.class_names, source.root) == (("bus", "train"), str(tmp_path))


def test_layout_errors(tmp_path):
    missing = tmp_path / "missing"
    assert error_line(find_images, missing).startswith(f"{missing}: does not exist")
    file = tmp_path / "file"
    file.write_text("")
    assert "is not a folder" in error_line(find_images, file)
    empty = tmp_path / "empty"
    (empty / "x").mkdir(parents=True)
    (empty / "x" / "a.gif").write_text("")
    message = error_line(find_images, empty)
    assert "holds no image" in message and ".jpg, .jpeg, .png" in message


def test_mixed_layout_is_refused(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "cat" / "b.png")
    message = error_line(find_images, tmp_path)
    assert "a.png" in message and "'cat'" in message and "flat folder" in message


def test_empty_class_folder_is_named(tmp_path):
    write_image(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    assert "1 of 2 class folders hold no image (dog)" in error_line(find_images, tmp_path)


def test_folder_links_are_followed_but_not_round_in_circles(tmp_path):
    write_image(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    os.symlink(tmp_path / "elsewhere", root / "cat")
    assert find_images(root).paths == ("cat/a.png",)
    for target in (root, root / "cat"):
        os.symlink(target, root / "cat" / "loop")
        assert "remove the link" in error_line(find_images, root)
        (root / "cat" / "loop").unlink()


@pytest.mark.parametrize("layout", ["", "cat"])
def test_a_link_to_itself_and_a_folder_named_as_an_image_are_unreadable_images(tmp_path, layout):
    """Neither makes the whole folder unreadable, and neither is skipped."""
    folder = tmp_path / layout
    write_image(folder / "b.png")
    os.symlink("a.jpg", folder / "a.jpg")
    (folder / "c.jpg").mkdir()
    (folder / "notes").mkdir()
    source = find_images(tmp_path)
    assert [os.path.basename(path) for path in source.paths] == ["a.jpg", "b.png", "c.jpg"]
    assert "a.jpg: cannot be read as an image (Too many levels" in error_line(source.open, 0)
    assert "c.jpg: cannot be read as an image (it is a folder)" in error_line(source.open, 2)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb_as_in_torchvision(tmp_path, mode):
    path = tmp_path / "c" / ("x.tif" if mode == "CMYK" else "x.png")
    write_image(path, mode=mode)
    image = load_rgb(path)
    assert image.mode == "RGB"
    assert image.tobytes() == ImageFolder(tmp_path)[0][0].tobytes()


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert load_rgb(tmp_path / "x.jpg").size == (8, 4)


def test_unreadable_images_give_path_and_reason(tmp_path):
    path = tmp_path / "x.jpg"
    missing = error_line(load_rgb, path)
    assert missing.startswith(f"{path}: cannot be read as an image (No such file")
    path.write_bytes(b"")
    assert "it is empty" in error_line(load_rgb, path)
    path.write_bytes(b"not an image")
    assert "no known image format" in error_line(load_rgb, path)
    write_image(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-600])
    assert "truncated" in error_line(load_rgb, path)
    write_image(tmp_path / "x.png", size=(64, 64))
    data = bytearray((tmp_path / "x.png").read_bytes())
    data[60:80] = bytes(20)
    (tmp_path / "x.png").write_bytes(data)
    assert "x.png: cannot be read" in error_line(load_rgb, tmp_path / "x.png")


def test_source_travels_to_worker_processes(tmp_path):
    write_image(tmp_path / "a.png")
    source = find_images(str(tmp_path))
    assert pickle.loads(pickle.dumps(source)) == source
