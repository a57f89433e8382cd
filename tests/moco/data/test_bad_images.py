"""Unreadable images are replaced by others, always the same ones, up to a share of all."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from moco.config import load_pretrain_config
from moco.data.augment import build_recipe
from moco.data.bad_images import BadImages
from moco.data.images import find_images
from moco.data.loader import TwoViews, build_pretrain_loader
from moco.data.reading import UnreadableImage
from moco.errors import ConfigError, DataError

RECIPE = build_recipe("v2", size=16)
BAD = (3, 11, 17)
NUM = 24


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    for index in range(NUM):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index:02d}.png")
    (root / "03.png").write_bytes(b"")
    (root / "11.png").write_bytes((root / "10.png").read_bytes()[:-300])
    (root / "17.png").write_bytes(b"text")
    return root


@pytest.fixture
def source(folder):
    return find_images(folder)


def policy(source, folder, fraction=0.2, *, seed=0, rank=0):
    return BadImages(
        len(source), source.root, seed=seed, max_fraction=fraction, folder=folder, rank=rank
    )


def loader(source, bad_images, **changes):
    arguments = dict(
        seed=0, global_batch=6, rank=0, world_size=1, first_step=0, last_step=8, num_workers=0,
        pin_memory=False, bad_images=bad_images,
    )  # fmt: skip
    return build_pretrain_loader(source, RECIPE, **{**arguments, **changes})


def same(batches, others) -> bool:
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def listed(folder, rank=0):
    lines = (folder / f"bad_images.rank{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_bad_image_is_replaced_and_listed(source, tmp_path, capfd):
    batches = list(loader(source, policy(source, tmp_path / "run")))
    shown = torch.cat([index for _, _, index in batches]).tolist()
    assert len(shown) == 48 and not set(BAD) & set(shown)
    found = {line["index"]: line["reason"] for line in listed(tmp_path / "run")}
    assert sorted(found) == list(BAD) and found[3] == "it is empty"
    paths = {line["index"]: line["path"] for line in listed(tmp_path / "run")}
    assert paths == {index: source.path(index) for index in BAD}
    assert "truncated" in found[11] and "no known image format" in found[17]
    said = capfd.readouterr().err
    assert said.count("warning: ") == 3 and "3 bad images, 4 of 24 are allowed" in said
    assert "03.png: cannot be read as an image (it is empty)" in said


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_replacement_depends_on_nothing_else(source, tmp_path, num_workers):
    expected = list(loader(source, policy(source, tmp_path / "a")))
    found = list(loader(source, policy(source, tmp_path / "b"), num_workers=num_workers))
    assert same(expected, found)
    ranks = [
        list(loader(source, policy(source, tmp_path / "c", rank=r), rank=r, world_size=2))
        for r in (0, 1)
    ]
    joined = [[torch.cat(t) for t in zip(*r, strict=True)] for r in zip(*ranks, strict=True)]
    assert same(expected, joined)
    resumed = list(loader(source, policy(source, tmp_path / "a"), first_step=5))
    assert same(expected[5:], resumed)
    other = list(loader(source, policy(source, tmp_path / "d", seed=1)))
    assert not same(expected, other)


def test_a_replacement_is_what_the_order_might_have_named(source, tmp_path):
    """Its views are those of its own number in that epoch, and its number is given."""
    plain = TwoViews(source, RECIPE, seed=0)
    replaced = TwoViews(source, RECIPE, seed=0, bad_images=policy(source, tmp_path))
    view_q, view_k, index = replaced[2, 3]
    assert index not in BAD
    expected = plain[2, index]
    assert torch.equal(view_q, expected[0]) and torch.equal(view_k, expected[1])
    assert {replaced[epoch, 3][2] for epoch in range(6)} != {index}  # another in other epochs
    for a, b in zip(plain[2, 5][:2], replaced[2, 5][:2], strict=True):
        assert torch.equal(a, b)


def test_more_than_the_share_stops_the_run(source, tmp_path):
    with pytest.raises(DataError) as caught:
        list(loader(source, policy(source, tmp_path / "run", 0.1)))  # 2 of 24
    message = str(caught.value)
    assert "3 of 24 images are unreadable, DATA.MAX_BAD_FRACTION 0.1 allows 2" in message
    assert "bad_images.rank0.jsonl" in message and "\n" not in message
    assert not isinstance(caught.value, UnreadableImage)


def test_processes_and_runs_count_together(source, tmp_path):
    """No process sees all bad images, but their lists do."""
    first, second = (policy(source, tmp_path, 0.1, rank=r) for r in (0, 1))
    first.read(source.open, 0, 3)
    second.read(source.open, 0, 11)
    assert len(listed(tmp_path, 0)) == len(listed(tmp_path, 1)) == 1
    with pytest.raises(DataError, match="3 of 24 images are unreadable"):
        first.read(source.open, 0, 17)
    again = policy(source, tmp_path, 0.1)  # the continued run
    with pytest.raises(DataError, match="3 of 24"):
        again.read(source.open, 1, 3)
    assert len(listed(tmp_path, 0)) == 2  # listed once
    alone = policy(source, tmp_path / "other", 0.1)  # negative control: without the lists
    assert alone.read(source.open, 1, 3)[1] not in BAD


def test_a_cut_line_of_a_killed_process_is_no_obstacle(source, tmp_path):
    (tmp_path / "bad_images.rank0.jsonl").write_text('{"index": 3, "reason": ""}\n{"ind\n[]\n7\n')
    bad = policy(source, tmp_path, 0.1)
    bad.read(source.open, 0, 11)
    assert bad.known == {3, 11}


def test_without_a_policy_the_first_one_stops(source):
    with pytest.raises(UnreadableImage):
        list(loader(source, None))


def test_a_failing_disk_or_shard_is_never_replaced(source, tmp_path):
    def read(index):
        raise DataError("shard is damaged")

    with pytest.raises(DataError, match="shard is damaged"):
        policy(source, tmp_path, 0.9).read(read, 0, 0)
    assert not list(tmp_path.glob("bad_images*"))


def test_if_nothing_can_be_read_it_ends(tmp_path):
    def read(index):
        raise UnreadableImage("x")

    bad = BadImages(10_000, "images", seed=0, max_fraction=0.9, folder=tmp_path, rank=0)
    with pytest.raises(DataError, match="images: 100 images drawn one after another"):
        bad.read(read, 0, 0)


def test_what_cannot_replace_is_refused():
    for words in (
        ["METHOD", "memory_bank"],
        ["AUGMENT.BACKEND", "device", "AUGMENT.RESIDENT", "True"],
        ["AUGMENT.BACKEND", "device", "AUGMENT.DECODE", "gpu"],
    ):
        load_pretrain_config(None, words)
        with pytest.raises(ConfigError, match="DATA.MAX_BAD_FRACTION is 0.1; allowed: 0 with"):
            load_pretrain_config(None, [*words, "DATA.MAX_BAD_FRACTION", "0.1"])
    for value in ("-0.1", "1.0"):
        with pytest.raises(ConfigError, match="DATA.MAX_BAD_FRACTION"):
            load_pretrain_config(None, ["DATA.MAX_BAD_FRACTION", value])
