"""R13: K against the batch, too few images, a last batch that is not full: refused or counted
before any image is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pretrain_runs import arguments, make_images
from scripts import load_tool

from moco.data.images import ImageSource
from moco.data.labelled import LabelledStream
from moco.data.sampler import EpochStream
from moco.errors import ConfigError
from moco.methods.moco import MoCo
from moco.training import recipe, trainer

pytestmark = pytest.mark.faults
pretrain = load_tool("pretrain")


class Read(BaseException):
    """An image was read; no handler of errors takes it."""


# Name -> number of images, changes of the tiny run (batch 8, K 20), words of the one line.
REFUSED = {
    "K below the batch": (32, {"MOCO__QUEUE_SIZE": 7}, "MOCO.QUEUE_SIZE 7 does not hold the 8"),
    "K below the two views of a step": (
        32, {"METHOD": "moco_symmetric", "MOCO__QUEUE_SIZE": 15}, "does not hold the 16 keys"),
    "K of nothing": (32, {"MOCO__QUEUE_SIZE": 0}, "MOCO.QUEUE_SIZE is 0"),
    "fewer images than a batch": (7, {}, "7 images do not fill one batch of 8"),
    "one image": (1, {}, "1 images do not fill one batch"),
    "no image": (0, {}, "holds no image"),
    "fewer images than a batch, memory bank": (
        7, {"METHOD": "memory_bank", "MEMORY_BANK__NUM_NEGATIVES": 5}, "do not fill one batch"),
    "fewer images than a batch, end-to-end": (
        7, {"METHOD": "end_to_end"}, "7 images do not fill one batch of 8"),
    "batch of nothing": (32, {"TRAIN__BATCH_SIZE": 0}, "TRAIN.BATCH_SIZE is 0"),
    "groups that do not divide it": (32, {"MODEL__BN_SPLITS": 3}, "does not divide the 8 images"),
    "parts that do not divide it": (
        32, {"TRAIN__ACCUMULATION_STEPS": 3}, "does not divide the 8 images"),
}  # fmt: skip
COUNTED = {
    "K equal to the batch": (32, {"MOCO__QUEUE_SIZE": 8}, "the last 1.0 steps"),
    "K no multiple of the batch": (
        32, {"MOCO__QUEUE_SIZE": 20}, "QUEUE_SIZE 20 is no multiple of the batch 8"),
    "K not below the images": (
        20, {"MOCO__QUEUE_SIZE": 24}, "QUEUE_SIZE 24 is not below the 20 images"),
    "a last batch of 1": (33, {}, "4 steps an epoch, 3 epochs, 12 steps; 1 of 33 images do not"),
    "a last batch of 7": (15, {}, "1 steps an epoch, 3 epochs, 3 steps; 7 of 15 images do not"),
    "many left out": (15, {}, "warning: 7 of 15 images are left out of each epoch"),
    "exactly one batch": (8, {}, "1 steps an epoch, 3 epochs, 3 steps\n"),
}  # fmt: skip


@pytest.fixture
def no_reading(monkeypatch):
    """Any read of an image ends the run at once."""

    def read(self, index):
        raise Read

    monkeypatch.setattr(ImageSource, "read_bytes", read)
    monkeypatch.setattr(ImageSource, "open", read)


def outcome(tmp_path: Path, capsys, num_images: int, changes: dict) -> tuple[str, str]:
    """tools/pretrain.py up to its first read. Returns: how it ended, and what it had said."""
    images = tmp_path / "images"
    images.mkdir()
    make_images(images, num_images)
    try:
        pretrain.main(arguments(images, tmp_path / "run", **changes))
        ended = "finished"
    except SystemExit as end:
        ended = f"exit {end.code}"
    except Read:
        ended = "read"
    except Exception as error:
        ended = f"uncaught {type(error).__name__}"
    said = capsys.readouterr()
    return ended, said.err if ended == "exit 2" else said.out


def is_refused(tmp_path, capsys, name: str) -> bool:
    num_images, changes, words = REFUSED[name]
    ended, said = outcome(tmp_path, capsys, num_images, changes)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return ended == "exit 2" and len(lines) == 1 and words in lines[0]


def is_counted(tmp_path, capsys, name: str) -> bool:
    num_images, changes, words = COUNTED[name]
    ended, said = outcome(tmp_path, capsys, num_images, changes)
    return ended == "read" and words in said


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_an_image_is_read(tmp_path, capsys, no_reading, name, observed):
    observed("R13", int(is_refused(tmp_path, capsys, name)), 1)


@pytest.mark.parametrize("name", COUNTED)
def test_counted_before_an_image_is_read(tmp_path, capsys, no_reading, name, observed):
    observed("R13", int(is_counted(tmp_path, capsys, name)), 1)


def no_check_of_the_batch(monkeypatch) -> None:
    for module in (pretrain, trainer):
        monkeypatch.setattr(module, "check_batch", lambda cfg, source, world_size: None)


def no_check_of_the_queue(monkeypatch) -> None:
    monkeypatch.setattr(MoCo, "views_enqueued", 0)


CONTROLS: dict[str, Callable] = {
    "fewer images than a batch": no_check_of_the_batch,
    "parts that do not divide it": no_check_of_the_batch,
    "K below the batch": no_check_of_the_queue,
}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_without_its_check_it_is_not_refused(
    tmp_path, capsys, monkeypatch, no_reading, name, observed
):
    CONTROLS[name](monkeypatch)
    observed("R13", int(not is_refused(tmp_path, capsys, name)), 1, control=True)


@pytest.mark.parametrize("name", COUNTED)
def test_control_without_the_resolved_recipe_nothing_is_counted(
    tmp_path, capsys, monkeypatch, no_reading, name, observed
):
    monkeypatch.setattr(recipe.Recipe, "text", lambda self: "")
    observed("R13", int(not is_counted(tmp_path, capsys, name)), 1, control=True)


@pytest.mark.parametrize("num_images", [8, 15, 33, 40])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_counted_is_what_is_read(num_images, world_size):
    """Full batches only, no image twice in an epoch, and as many left out as was said."""
    steps = num_images // 8
    batches = [[] for _ in range(2 * steps)]
    for rank in range(world_size):
        stream = EpochStream(
            num_images=num_images, global_batch=8, rank=rank, world_size=world_size, seed=0,
            first_step=0, last_step=2 * steps,
        )  # fmt: skip
        for batch, keys in zip(batches, stream, strict=True):
            batch += keys
    assert all(len(batch) == 8 for batch in batches)
    for epoch in (0, 1):
        keys = [key for batch in batches[epoch * steps : (epoch + 1) * steps] for key in batch]
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys}) == num_images - num_images % 8


@pytest.mark.parametrize("num_images, world_size", [(7, 1), (0, 1), (32, 3), (32, 16)])
def test_a_stream_refuses_too(num_images, world_size):
    """What shares out the images trusts no caller."""
    fields = dict(global_batch=8, rank=0, world_size=world_size, seed=0, first_step=0, last_step=1)
    with pytest.raises(ConfigError, match="batch"):
        EpochStream(num_images=num_images, **fields)
    with pytest.raises(ConfigError, match="TRAIN.BATCH_SIZE 8"):
        LabelledStream(num_images=num_images, drop_last=True, **fields)


def test_a_classifiers_last_batch_is_counted():
    """It keeps the batch that is not full; the images of a step are known beforehand."""
    stream = LabelledStream(num_images=33, global_batch=8, rank=0, world_size=1, seed=0)
    assert stream.steps_per_epoch == 5
    assert [stream.num_images_of(step)[1] for step in range(5)] == [8, 8, 8, 8, 1]
