"""The kNN monitor: what it uses of a large data set, computes with, and leaves alone."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
import torch.nn as nn

from moco.data.images import find_images
from moco.errors import ConfigError
from moco.evaluation import monitor as module
from moco.evaluation.monitor import build_knn_monitor
from moco.kernels.choose import use_kernels_
from moco.kernels.compiler import computes
from moco.methods import build_method
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer


def build(images, said, **changes):
    source = find_images(images)
    return build_knn_monitor(tiny.config(**changes), str(images), source, tiny.alone(), said.append)


def encoder_of(cfg):
    torch.manual_seed(0)
    return build_method(cfg, 32).transfer_encoder()


def test_all_images_of_a_small_data_set(image_folder):
    said = []
    monitor = build(image_folder, said)
    assert monitor(encoder_of(tiny.config())).keys() == {"knn_top1"}
    assert said == [
        "kNN monitor: all 32 training images and all 8 test images, shared by 1 process(es), every "
        "1 epoch(s); their encoding computes about 31.2% of what an epoch's training does"
    ]


def test_a_share_of_each_class_of_a_large_one(image_folder):
    said = []
    monitor = build(image_folder, said, KNN__MAX_IMAGES=8)
    assert sorted(monitor.train.labels) == [0] * 4 + [1] * 4 and len(monitor.test) == 8
    assert monitor(encoder_of(tiny.config()))["knn_images"] == 8
    assert "8 of 32 training images and all 8 test images (KNN.MAX_IMAGES 8)" in said[0]
    assert monitor.train.paths == build(image_folder, [], KNN__MAX_IMAGES=8).train.paths
    assert len(build(image_folder, [], KNN__MAX_IMAGES=0).train) == 32


def test_a_stop_ends_it_between_batches(image_folder):
    asked = []

    def stop():
        asked.append(True)
        return len(asked) > 3

    monitor, encoder = build(image_folder, [], KNN__BATCH_SIZE=4), encoder_of(tiny.config())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert monitor(encoder, stop) is None and len(asked) < 8
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert encoder.training


def test_it_computes_by_the_kernels_that_train(image_folder):
    cfg = tiny.config(TRAIN__CHANNELS_LAST=True, TRAIN__COMPILE="kernels")
    encoder = encoder_of(cfg).to(memory_format=torch.channels_last)
    try:
        use_kernels_(encoder)
    except ConfigError as error:
        pytest.skip(str(error))
    monitor = build(
        image_folder, [], TRAIN__CHANNELS_LAST=True, TRAIN__COMPILE="kernels", KNN__PERIOD=1
    )
    used, norms = [], [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    reader = monitor._reader

    def watched(encode):
        def encode_and_look(images):
            used.append(all(computes(norm) for norm in norms))
            return encode(images)

        return reader(encode_and_look)

    monitor._reader = watched
    assert monitor(encoder)["knn_top1"] >= 0
    assert used and all(used)
    encoder.eval()
    with torch.no_grad():
        assert not any(computes(norm) for norm in norms)  # afterwards as before


def test_the_buffers_are_rank_0s_and_come_back(monkeypatch):
    norm = nn.BatchNorm2d(2)

    def from_main(network):
        network.running_mean.fill_(7)

    monkeypatch.setattr(module, "broadcast_buffers", from_main)
    with module._buffers_of_main(norm):
        assert norm.running_mean.tolist() == [7, 7]
    assert norm.running_mean.tolist() == [0, 0]


def monitor(images, said, **changes):
    cfg = tiny.config(TRAIN__EPOCHS=2, **changes)
    source = find_images(images)
    return build_knn_monitor(cfg, str(images), source, tiny.alone(), said.append), cfg


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
    assert len(said) == 1  # what it compares
