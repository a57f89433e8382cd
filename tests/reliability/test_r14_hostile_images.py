"""R14: hostile images among good ones. All are decoded, or listed and replaced; none is a crash."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hostile_images import (
    DECODED,
    GREY16,
    ODD_FILES,
    REFUSED,
    grey16_pgm,
    interlaced_png,
    odd_file,
    saved,
)
from PIL import Image

from moco import seeding
from moco.data import rgb
from moco.data.augment import build_recipe
from moco.data.bad_images import BadImages
from moco.data.images import find_images
from moco.data.loader import build_pretrain_loader
from moco.errors import DataError
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer

pytestmark = pytest.mark.faults
BATCH, NUM_GOOD = 8, 39
SIXTEEN_BITS = {
    "16-bit PNG": saved(Image.fromarray(GREY16), "PNG"),
    "16-bit TIFF": saved(Image.fromarray(GREY16), "TIFF"),
    "16-bit PGM": grey16_pgm(),
}
RIGHT = {**DECODED, **SIXTEEN_BITS, "interlaced PNG": interlaced_png()[0]}
NUM_KINDS = len(RIGHT) + len(REFUSED) + len(ODD_FILES)
SMALL = Image.fromarray(np.full((20, 24, 3), 99, dtype=np.uint8))


def make_folder(root: Path, monkeypatch) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """All hostile images and some good ones, every name ending in .jpg, in a flat folder.

    Returns: name -> kind of those that are to be decoded, and name -> (kind, words of the reason)
        of those that are not.
    """
    root.mkdir()
    good, bad = {}, {}
    for number in range(NUM_GOOD):
        SMALL.save(root / f"good{number:02d}.jpg")
    for number, (kind, data) in enumerate(RIGHT.items()):
        good[f"right{number:02d}.jpg"] = kind
        (root / f"right{number:02d}.jpg").write_bytes(data)
    for number, (kind, (data, reason)) in enumerate(REFUSED.items()):
        bad[f"wrong{number:02d}.jpg"] = kind, reason
        (root / f"wrong{number:02d}.jpg").write_bytes(data)
    for number, kind in enumerate(ODD_FILES):
        path = root / f"odd{number:02d}.jpg"
        bad[path.name] = kind, odd_file(path, kind, monkeypatch)
        if kind == "missing":
            path.write_bytes(b"")  # there when the folder is listed, gone afterwards
    return good, bad


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    good, bad = make_folder(tmp_path / "images", monkeypatch)
    source = find_images(tmp_path / "images")
    assert len(source) == NUM_GOOD + NUM_KINDS and len(source) % BATCH == 0
    (tmp_path / f"images/odd{ODD_FILES.index('missing'):02d}.jpg").unlink()
    return source, good, bad


def policy(source, folder: Path, fraction: float = 0.5) -> BadImages:
    return BadImages(
        len(source), source.root, seed=0, max_fraction=fraction, folder=folder, rank=0
    )


def one_epoch(source, bad_images, num_workers: int = 0, backend: str = "opencv") -> list:
    steps = len(source) // BATCH
    return list(
        build_pretrain_loader(
            source, build_recipe("v2", size=16), seed=0, global_batch=BATCH, rank=0, world_size=1,
            first_step=0, last_step=steps, num_workers=num_workers, pin_memory=False,
            backend=backend, bad_images=bad_images,
        )  # fmt: skip
    )


def num_right(hostile, out: Path, **options) -> int:
    """How many kinds came out as they must: shown with their pixels, or listed and not shown."""
    source, good, bad = hostile
    try:
        batches = one_epoch(source, policy(source, out), **options)
    except Exception:  # the observation: a crash, or the end of the run
        return 0
    lines = map(json.loads, (out / "bad_images.rank0.jsonl").read_text().splitlines())
    listed: dict[str, list[str]] = {}
    for line in lines:
        listed.setdefault(line["path"], []).append(line["reason"])
    shown = set(torch.cat([batch[2] for batch in batches]).tolist())
    right = 0
    for index, name in enumerate(source.paths):
        reasons = listed.get(source.path(index), [])
        if name in bad:
            words = bad[name][1]
            # What its message says before the reason is no reason.
            found = len(reasons) == 1 and (words in reasons[0] or words == "cannot be read as an "
                                           "image" and reasons[0] != "")  # fmt: skip
            right += found and index not in shown
        elif name in good:
            right += not reasons and index in shown and has_its_pixels(source, index, good[name])
    return right


def has_its_pixels(source, index: int, kind: str) -> bool:
    """PIL's `convert("RGB")`, orientation not applied; the high byte of 16 bits."""
    found = np.asarray(source.open(index))
    if kind in SIXTEEN_BITS:
        return bool((found == (GREY16 >> 8)[..., None]).all())
    with Image.open(io.BytesIO(RIGHT[kind])) as expected:
        return bool(np.array_equal(found, np.asarray(expected.convert("RGB"))))


@pytest.mark.parametrize("backend", ["opencv", "pil"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_kind_is_decoded_or_listed(hostile, tmp_path, backend, num_workers, observed):
    assert NUM_KINDS >= 22
    found = num_right(hostile, tmp_path / "run", backend=backend, num_workers=num_workers)
    observed("R14", found, NUM_KINDS)


def same(batches: list, others: list) -> bool:
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def is_deterministic(hostile, tmp_path: Path) -> bool:
    """The same batches again, and from two workers."""
    source = hostile[0]
    runs = [one_epoch(source, policy(source, tmp_path / str(n)), n) for n in (0, 2)]
    runs.append(one_epoch(source, policy(source, tmp_path / "again")))
    return all(same(runs[0], run) for run in runs[1:])


def test_replacements_are_the_same_ones_always(hostile, tmp_path, observed):
    observed("R14", int(is_deterministic(hostile, tmp_path)), 1)


def ends_at_the_share(hostile, tmp_path: Path) -> bool:
    """A training run ends as soon as too many are bad, and not before."""
    source, _, bad = hostile
    outcomes = {}
    for name, fraction in (("few", 0.1), ("enough", 0.5)):
        assert (fraction * len(source) >= len(bad)) == (name == "enough")
        cfg = tiny.config(
            TRAIN__EPOCHS=1, KNN__PERIOD=0, DATA__MAX_BAD_FRACTION=fraction, DATA__NUM_WORKERS=1
        )
        trainer = Trainer(cfg, source, tmp_path / name, tiny.alone(), say=lambda line: None)
        try:
            outcomes[name] = trainer.train()
        except DataError as error:
            outcomes[name] = str(error)
    limit = int(0.1 * len(source))
    words = f"{limit + 1} of {len(source)} images are unreadable, DATA.MAX_BAD_FRACTION 0.1 allows"
    content = ckpt.read_torch_file(tmp_path / "enough" / "checkpoint_0000.pth.tar")
    return (
        outcomes["enough"] == 0
        and content["extra"]["step"] == len(source) // BATCH
        and words in str(outcomes["few"])
        and "\n" not in str(outcomes["few"])
    )


def test_more_than_the_share_stops_the_run(hostile, tmp_path, observed):
    observed("R14", int(ends_at_the_share(hostile, tmp_path)), 1)


def not_replaced(monkeypatch) -> int:
    monkeypatch.setattr(BadImages, "read", lambda self, read, epoch, i: (read(i), i))
    return 0  # the run ends at the first one


def clipped(monkeypatch) -> int:
    monkeypatch.setattr(rgb, "_SIXTEEN_BITS", ())
    monkeypatch.setattr(rgb, "_SCALED_TO_SIXTEEN_BITS", ())
    return NUM_KINDS - len(SIXTEEN_BITS)


def listed_without_reason(monkeypatch) -> int:
    append = BadImages._append
    monkeypatch.setattr(
        BadImages, "_append", lambda self, record: append(self, {**record, "reason": ""})
    )
    return len(RIGHT)


@pytest.mark.parametrize("remove_guard", [not_replaced, clipped, listed_without_reason])
def test_control_without_a_guard_kinds_are_wrong(
    hostile, tmp_path, monkeypatch, remove_guard, observed
):
    still_right = remove_guard(monkeypatch)
    found = num_right(hostile, tmp_path / "run")
    observed("R14", int(found == still_right < NUM_KINDS), 1, control=True)


def test_control_replacements_drawn_anew_differ(hostile, tmp_path, monkeypatch, observed):
    draw = seeding.python_random

    def drawn_anew(seed, purpose, *indices):
        return random.Random() if purpose == "replacement" else draw(seed, purpose, *indices)

    monkeypatch.setattr(seeding, "python_random", drawn_anew)
    observed("R14", int(not is_deterministic(hostile, tmp_path)), 1, control=True)


def test_control_without_the_limit_nothing_stops(hostile, tmp_path, monkeypatch, observed):
    init = BadImages.__init__

    def unlimited(self, *args, **options):
        init(self, *args, **options)
        self.limit = self.num_images

    monkeypatch.setattr(BadImages, "__init__", unlimited)
    observed("R14", int(not ends_at_the_share(hostile, tmp_path)), 1, control=True)
