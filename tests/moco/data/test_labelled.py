"""Labelled batches: the epoch's order cut for any number of processes, pixels by (seed, epoch,
index) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moco.data.images import find_images
from moco.data.labelled import (
    LabelledStream,
    LabelledViews,
    build_labelled_loader,
    classification_recipe,
)
from moco.data.sampler import epoch_order
from moco.data.whole_images import build_whole_loader
from moco.errors import ConfigError, DataError

RECIPE = classification_recipe(16, (0.08, 1.0), 0.5)


def stream(rank=0, world_size=1, *, num=11, batch=4, first=0, last=6, **options):
    return LabelledStream(
        num_images=num, global_batch=batch, rank=rank, world_size=world_size, seed=7,
        first_step=first, last_step=last, **options,
    )  # fmt: skip


def test_an_epoch_is_every_image_once_the_last_batch_included():
    steps = list(stream())
    assert stream().steps_per_epoch == 3 and [len(s) for s in steps] == [4, 4, 3] * 2
    for epoch in (0, 1):
        keys = sum(steps[3 * epoch : 3 * epoch + 3], [])
        assert [index for _, index in keys] == epoch_order(11, 7, epoch).tolist()
        assert {e for e, _ in keys} == {epoch}


def test_drop_last_leaves_it_out():
    dropping = stream(drop_last=True, last=4)
    assert dropping.steps_per_epoch == 2 and [len(s) for s in dropping] == [4] * 4
    assert list(dropping)[:2] == list(stream())[:2]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_cut_the_same_batches(world_size):
    whole = list(stream())
    parts = [stream(rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        counted = []
        for part in parts:
            own, total = part.num_images_of(step)
            keys = list(part)[step]
            assert total == len(batch) and len(keys) == max(own, 1)
            counted += keys[:own]
        assert counted == batch


def test_a_process_without_images_reads_one_that_does_not_count():
    parts = [stream(rank, 4, num=9, batch=8, last=2) for rank in range(4)]
    assert [part.num_images_of(1) for part in parts] == [(0, 1), (0, 1), (0, 1), (1, 1)]
    assert all(list(part)[1] == list(parts[3])[1] for part in parts)


def test_starting_in_the_middle_gives_the_tail():
    assert list(stream(first=4)) == list(stream())[4:]
    assert len(stream(first=4)) == 2


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 3, "world_size": 2},
                                     {"batch": 12, "drop_last": True}])  # fmt: skip
def test_batches_that_do_not_fit_are_refused(options):
    with pytest.raises(ConfigError, match="TRAIN.BATCH_SIZE"):
        stream(**options)


def test_a_batch_may_exceed_the_images_where_the_last_is_kept():
    assert stream(batch=64).steps_per_epoch == 1 and stream(batch=64).num_images_of(3) == (11, 11)


def loaded(source, num_workers=0, **options):
    loader = build_labelled_loader(
        source, RECIPE, stream(num=len(source), batch=8, last=5, **options),
        num_workers=num_workers, pin_memory=False,
    )  # fmt: skip
    return list(loader)


def test_views_depend_on_seed_epoch_and_index_alone(image_folder):
    source = find_images(image_folder)
    batches = loaded(source)
    assert batches[0][0].shape == (8, 3, 16, 16) and batches[0][0].dtype == torch.uint8
    for views, labels, indices in batches:
        assert [source.labels[i] for i in indices] == labels.tolist()
        assert len(views) == len(labels)
    for one, other in zip(batches, loaded(source, num_workers=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    views = LabelledViews(source, RECIPE, seed=7)
    index = int(batches[0][2][3])
    assert torch.equal(views[0, index][0], batches[0][0][3])
    assert not torch.equal(views[1, index][0], batches[0][0][3])
    assert not torch.equal(LabelledViews(source, RECIPE, 8)[0, index][0], batches[0][0][3])


def test_the_recipe_is_crop_and_flip_alone(image_folder):
    """Every pixel value of a view without resizing occurs in its image."""
    recipe = classification_recipe(24, (1.0, 1.0), 0.5)
    source = find_images(image_folder)
    views = LabelledViews(source, recipe, seed=0)
    flipped = 0
    for index in range(8):
        image = torch.from_numpy(np.array(source.open(index))).permute(2, 0, 1)
        view = views[0, index][0]
        is_flipped = torch.equal(view, image.flip(2))
        assert is_flipped or torch.equal(view, image)
        flipped += is_flipped
    assert 0 < flipped < 8


def test_the_fast_backend_gives_nearly_the_pixels(image_folder):
    source = find_images(image_folder)
    pil, fast = (LabelledViews(source, RECIPE, 7, backend) for backend in ("pil", "opencv"))
    keys = [(0, index) for index in range(8)]
    difference = (pil.batch(keys)[0].float() - fast.batch(keys)[0].float()).abs()
    assert difference.mean() < 1 and difference.max() < 16


def test_unlabelled_images_are_refused(image_folder):
    with pytest.raises(DataError, match="flat folder"):
        LabelledViews(find_images(image_folder / "train" / "a"), RECIPE, 0)


def test_whole_images_are_squeezed_into_a_square(tmp_path):
    from PIL import Image

    wide = Image.new("RGB", (96, 48), (200, 0, 0))
    wide.paste((0, 0, 200), (48, 0, 96, 48))
    wide.save(tmp_path / "0.png")
    loader = build_whole_loader(find_images(tmp_path), 28, 4, 0)
    ((image, index, _),) = loader
    assert image.shape == (1, 3, 28, 28) and index.tolist() == [0]
    # Both halves are there: nothing was cropped.
    assert image[0, 0, :, :12].float().mean() > 190 and image[0, 2, :, 16:].float().mean() > 190
