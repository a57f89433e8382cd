"""Loaders of all kinds hash each image once and give the same batches as without."""

from __future__ import annotations

import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from packs import pack_folder
from PIL import Image

from moco.benchmarks.pictures import natural_jpeg, natural_picture
from moco.data.augment import build_recipe
from moco.data.bad_images import BadImages
from moco.data.decode import decode_plain_jpeg
from moco.data.device_crops import GpuDecoder
from moco.data.first_sight import FirstSight, SeenFlags
from moco.data.image_hash import hash_file
from moco.data.image_rows import EXACT_BYTES, ROW_BYTES
from moco.data.images import find_images
from moco.data.loader import build_pretrain_loader

RECIPE = build_recipe("v2", size=16)
NUM = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Ten images of 48 x 48: six JPEG files, PNG files, one with an alpha channel, and CMYK."""
    root = tmp_path_factory.mktemp("images")
    for number in range(NUM):
        picture = Image.fromarray(natural_picture(number, 48, 48))
        if number < 6:
            (root / f"{number}.jpg").write_bytes(natural_jpeg(number, 48, 48))
        elif number == 6:
            picture.convert("CMYK").save(root / "6.jpg")
        else:
            picture.convert("RGBA" if number == 7 else "RGB").save(root / f"{number}.png")
    return find_images(root)


class Observer:
    def __init__(self, num_images):
        self.flags = SeenFlags(num_images)
        self.seen = []

    def add(self, step, seen):
        self.flags.mark(seen.index)
        self.seen.append((step, seen))

    def rows(self):
        """All rows, by image."""
        rows = np.zeros((len(self.flags), ROW_BYTES), np.uint8)
        for _, seen in self.seen:
            rows[seen.index] = seen.rows
        return rows

    def first_steps(self):
        """image -> the step that named it first"""
        return {i: step for step, seen in reversed(self.seen) for i in seen.index.tolist()}


def batches(source, seen=None, **changes):
    arguments = dict(
        seed=3, global_batch=4, rank=0, world_size=1, first_step=0, last_step=6, num_workers=0,
        pin_memory=False, seen=seen,
    )  # fmt: skip
    return list(build_pretrain_loader(source, RECIPE, **{**arguments, **changes}))


@dataclasses.dataclass
class Flags:
    """As SeenFlags, which goes to other processes only while they start."""

    shared: list


KINDS = {
    "opencv": {},
    "opencv, two workers": {"num_workers": 2},
    "pil": {"backend": "pil"},
    "device": {"backend": "device", "num_workers": 1},
}


def expected(source):
    return np.stack([hash_file(source.path(index)) for index in range(len(source))])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_stay_the_same_and_every_image_is_hashed_once(source, kind):
    observer = Observer(NUM)
    with_hashes = batches(source, observer, **KINDS[kind])
    for batch, other in zip(with_hashes, batches(source, **KINDS[kind]), strict=True):
        assert len(batch) == len(other)
        for tensor, same in zip(batch, other, strict=True):
            assert torch.equal(tensor, same)
    assert (observer.rows() == expected(source)).all()
    shown = [(i, step) for step, batch in enumerate(with_hashes) for i in batch[2].tolist()]
    assert observer.first_steps() == dict(reversed(shown))  # with the step that shows it first
    if "num_workers" not in KINDS[kind]:  # those are ahead: of two epochs they may hash it twice
        assert sum(len(seen.index) for _, seen in observer.seen) == NUM


def test_resident_images_are_seen_when_a_step_shows_them(source, tmp_path):
    for number in range(4):
        Image.fromarray(natural_picture(number, 16, 16)).save(tmp_path / f"{number}.png")
    small = find_images(tmp_path)
    observer = Observer(4)
    shown = batches(small, observer, backend="device", resident=True, global_batch=2, last_step=2)
    assert [seen.index.tolist() for _, seen in observer.seen] == [b[2].tolist() for b in shown]
    assert (observer.rows() == expected(small)).all()


def test_images_decoded_on_the_device_are_hashed_there(source, monkeypatch):
    """With libjpeg in the place of nvJPEG."""

    def decode(self, files):
        images = [decode_plain_jpeg(file.numpy().tobytes()) for file in files]
        return [torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) for image in images]

    monkeypatch.setattr(GpuDecoder, "_decode", decode)
    monkeypatch.setattr(GpuDecoder, "_problem", lambda self: None)
    observer = Observer(NUM)
    batches(source, observer, backend="device", decode="gpu", last_step=6)
    rows, wanted = observer.rows(), expected(source)
    assert (rows[:, :EXACT_BYTES] == wanted[:, :EXACT_BYTES]).all()
    apart = np.unpackbits(rows[:, EXACT_BYTES:] ^ wanted[:, EXACT_BYTES:], axis=1).sum(1)
    assert apart.max() <= 2 and rows[:, EXACT_BYTES:].any(axis=1).all()


@pytest.mark.parametrize("backend", ["opencv", "pil"])
def test_a_pack_gives_the_rows_of_its_folder(source, tmp_path, backend):
    observer = Observer(NUM)
    packed = pack_folder(source.root, tmp_path / "pack", range(NUM - 1, -1, -1))
    batches(packed, observer, backend=backend)
    assert (observer.rows() == expected(source)).all()


def test_an_image_that_cannot_be_decoded_was_not_seen(source, tmp_path):
    broken = tmp_path / "images"
    broken.mkdir()
    for index in range(NUM):
        data = source.read_bytes(index)
        (broken / source.paths[index]).write_bytes(data[:100] if index == 8 else data)
    copy = find_images(broken)
    bad = BadImages(NUM, copy.root, seed=3, max_fraction=0.2, folder=tmp_path / "run", rank=0)
    observer = Observer(NUM)
    batches(copy, observer, bad_images=bad, last_step=8)
    rows = observer.rows()
    assert not rows[8].any() and rows[[i for i in range(NUM) if i != 8]].any(axis=1).all()


def test_what_is_flagged_is_not_hashed_again(source):
    observer = Observer(NUM)
    observer.flags.mark(np.arange(NUM - 1))
    batches(source, observer)
    assert [seen.index.tolist() for _, seen in observer.seen] == [[NUM - 1]]
    assert observer.flags.unseen(np.arange(NUM)).tolist() == [False] * NUM


def test_it_is_its_source_in_everything_else_and_survives_pickle(source):
    first = pickle.loads(pickle.dumps(FirstSight(source, Flags([0] * NUM))))
    assert len(first) == NUM and first.paths == source.paths and first.path(3) == source.path(3)
    assert np.array_equal(np.asarray(first.open(3)), np.asarray(source.open(3)))
    first.note(3, first.open(3))
    assert first.take().index.tolist() == [3] and first.take() is None
    with pytest.raises(AttributeError):
        getattr(first, "nothing_like_it")  # noqa: B009
    assert io.BytesIO(first.read_bytes(0)).read(2) == b"\xff\xd8"
