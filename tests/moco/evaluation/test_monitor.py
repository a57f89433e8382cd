"""The kNN monitor watches only: whatever is wrong with its images, pretraining goes on."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch

from moco.data.images import find_images
from moco.evaluation.monitor import build_knn_monitor
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer


def monitor(images, said, **changes):
    cfg = tiny.config(TRAIN__EPOCHS=2, **changes)
    source = find_images(images)
    return build_knn_monitor(cfg, str(images), source, torch.device("cpu"), said.append), cfg


def flat(images):
    for class_folder in list((images / "test").iterdir()):
        for file in class_folder.iterdir():
            file.rename(images / "test" / f"{class_folder.name}_{file.name}")
        class_folder.rmdir()


def other_classes(images):
    (images / "test" / "a").rename(images / "test" / "c")


def one_class_less(images):
    shutil.rmtree(images / "test" / "a")


def no_image(images):
    shutil.rmtree(images / "test")
    (images / "test").mkdir()


def an_empty_class(images):
    (images / "test" / "c").mkdir()


def two_layouts(images):
    shutil.copy(images / "test" / "a" / "00.png", images / "test" / "00.png")


def a_link_to_itself(images):
    (images / "test" / "a" / "loop").symlink_to(images / "test" / "a")


def a_damaged_pack(images):
    (images / "test" / "pack.json").write_text("{")


def flat_training_images(images):
    for class_folder in list((images / "train").iterdir()):
        for file in class_folder.iterdir():
            file.rename(images / "train" / f"{class_folder.name}_{file.name}")
        class_folder.rmdir()


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (flat, "test is a flat folder of images, without labels"),
        (other_classes, "kNN monitor off: missing in test: a; only in test: c"),
        (one_class_less, "kNN monitor off: missing in test: a"),
        (no_image, "test: holds no image"),
        (an_empty_class, "1 of 3 class folders hold no image (c)"),
        (two_layouts, "beside the image folder 'a'"),
        (a_link_to_itself, "a link leads back to a folder above it"),
        (a_damaged_pack, "pack.json: no JSON"),
        (flat_training_images, "train is a flat folder of images, without labels"),
        (lambda images: shutil.rmtree(images / "test"), "images has no folder val or test"),
    ],
)
def test_it_is_off_with_its_reason(image_folder, spoil, reason):
    spoil(image_folder)
    said = []
    evaluate, _ = monitor(image_folder, said)
    assert evaluate is None
    assert len(said) == 1 and said[0].startswith("kNN monitor off: ") and reason in said[0]


def test_classes_without_splits(image_folder):
    said = []
    (image_folder / "train" / "test").mkdir()
    shutil.copy(image_folder / "test" / "a" / "00.png", image_folder / "train" / "test")
    evaluate, _ = monitor(image_folder / "train", said)
    assert evaluate is None and "holds classes, not train/ beside test/" in said[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_unreadable_image_turns_it_off_while_training(image_folder, tmp_path, split):
    """Of the training images, too: DATA.MAX_BAD_FRACTION replaces it, the monitor reads it."""
    (image_folder / split / "b" / "03.png").write_bytes(b"no image")
    said = []
    evaluate, cfg = monitor(image_folder, said, DATA__MAX_BAD_FRACTION=0.1)
    trainer = Trainer(
        cfg, find_images(image_folder), tmp_path / "run", tiny.alone(), say=said.append
    )
    encoder = trainer.method.transfer_encoder()
    modes = [module.training for module in encoder.modules()]
    assert trainer.train([], evaluate) == 0
    assert [module.training for module in encoder.modules()] == modes
    off = [line for line in said if line.startswith("kNN monitor off from now on: ")]
    assert len(off) == 1 and "03.png" in off[0] and "no known image format" in off[0]
    assert ckpt.latest_verified(tmp_path / "run")[1]["step"] == 8


def test_one_test_image_and_one_class_are_enough(image_folder):
    for split, keep in (("train", 16), ("test", 1)):
        shutil.rmtree(image_folder / split / "b")
        for file in sorted((image_folder / split / "a").iterdir())[keep:]:
            file.unlink()
    said = []
    evaluate, cfg = monitor(image_folder, said)
    trainer = Trainer(cfg, find_images(image_folder), image_folder / "run", tiny.alone())
    assert evaluate(trainer.method.transfer_encoder()) == {"knn_top1": 100.0}
    assert said == []
