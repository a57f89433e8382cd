from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import moco
from moco.data.augment import build_recipe
from moco.data.images import find_images
from moco.data.loader import TwoViews, build_eval_loader, build_pretrain_loader
from moco.errors import ConfigError, DataError

RECIPE = build_recipe("v2", size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(9):
        path = root / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (24 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def source(folder):
    return find_images(folder)


def pretrain_loader(source, **changes):
    arguments = dict(
        seed=3,
        global_batch=4,
        rank=0,
        world_size=1,
        first_step=0,
        last_step=5,
        num_workers=0,
        pin_memory=False,
    )
    return build_pretrain_loader(source, RECIPE, **{**arguments, **changes})


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for tensor, other_tensor in zip(batch, other, strict=True):
            assert torch.equal(tensor, other_tensor)


@pytest.fixture(scope="module")
def batches(source):
    return list(pretrain_loader(source))


def test_batch_form(source, batches):
    assert len(batches) == len(pretrain_loader(source)) == 5
    for view_q, view_k, index in batches:
        for view in (view_q, view_k):
            assert view.shape == (4, 3, 16, 16)
            assert view.dtype == torch.uint8 and view.is_contiguous()
        assert index.dtype == torch.int64 and index.shape == (4,)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_no_pixel(source, batches, num_workers):
    assert_same(batches, pretrain_loader(source, num_workers=num_workers))


def test_resumed_loader_gives_the_tail(source, batches):
    assert_same(batches[3:], pretrain_loader(source, first_step=3))


def test_ranks_share_the_global_batch(source, batches):
    parts = [list(pretrain_loader(source, rank=r, world_size=2)) for r in (0, 1)]

    def join(parts):
        for ranks in zip(*parts, strict=True):
            yield [torch.cat(tensors) for tensors in zip(*ranks, strict=True)]

    assert_same(batches, join(parts))
    with pytest.raises(AssertionError):
        assert_same(batches, join(parts[::-1]))


def test_each_view_has_its_own_recipe(source):
    other = build_recipe("v3_second", size=16)
    view_q, view_k, _ = TwoViews(source, (RECIPE, other), seed=3)[0, 4]
    same_q, _, _ = TwoViews(source, RECIPE, seed=3)[0, 4]
    _, other_k, _ = TwoViews(source, other, seed=3)[0, 4]
    assert torch.equal(view_q, same_q) and torch.equal(view_k, other_k)
    assert not torch.equal(view_k, TwoViews(source, RECIPE, seed=3)[0, 4][1])


def test_pixels_depend_on_epoch_view_seed_and_index(source):
    dataset = TwoViews(source, RECIPE, seed=3)
    view_q, view_k, index = dataset[0, 4]
    again = dataset[0, 4]
    assert torch.equal(view_q, again[0]) and torch.equal(view_k, again[1]) and index == 4
    assert not torch.equal(view_q, view_k)
    for other in (dataset[1, 4], dataset[0, 5], TwoViews(source, RECIPE, seed=4)[0, 4]):
        assert not torch.equal(view_q, other[0]) and not torch.equal(view_k, other[1])


def test_global_generators_are_left_alone(source):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(pretrain_loader(source, last_step=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_a_batch_that_does_not_fit_is_refused_before_any_image_is_read(source, monkeypatch):
    monkeypatch.setattr(type(source), "open", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(ConfigError, match="global batch 12 with 9 images"):
        pretrain_loader(source, global_batch=12)
    with pytest.raises(ConfigError, match="workers is -1"):
        pretrain_loader(source, num_workers=-1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_one_line(source, folder, tmp_path, num_workers):
    for path in source.paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((folder / path).read_bytes())
    broken = tmp_path / source.paths[2]
    broken.write_bytes(b"damaged")
    damaged = find_images(tmp_path)
    for loader in (
        pretrain_loader(damaged, num_workers=num_workers, last_step=20),
        build_eval_loader(damaged, 16, 4, num_workers),
    ):
        with pytest.raises(DataError) as caught:
            list(loader)
        message = str(caught.value)
        assert message.startswith(f"{broken}: cannot be read") and "\n" not in message


def test_plain_dataloader_would_not_give_one_line(source, tmp_path):
    """Negative control: what the wrapper is for."""
    (tmp_path / "x.png").write_bytes(b"damaged")
    dataset = TwoViews(find_images(tmp_path), RECIPE, seed=0)
    with pytest.raises(DataError) as caught:
        list(DataLoader(dataset, batch_sampler=[[(0, 0)]], num_workers=1))
    assert "Traceback" in str(caught.value)


def test_eval_loader_gives_every_image_once_in_order(source):
    batches = list(build_eval_loader(source, 16, 4, 0))
    assert [len(labels) for _, labels, _ in batches] == [4, 4, 1]
    images, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert indices.tolist() == list(range(9))
    assert labels.tolist() == list(source.labels) and labels.dtype == torch.int64
    theirs = transforms.Compose(
        [transforms.Resize(18), transforms.CenterCrop(16), transforms.PILToTensor()]
    )
    assert torch.equal(images, torch.stack([theirs(source.open(i)) for i in range(9)]))
    unscaled = next(iter(build_eval_loader(source, 16, 9, 0, resize=16)))[0]
    assert not torch.equal(unscaled, images)


def test_loaders_can_be_sent_to_a_worker_that_is_not_forked(source):
    for loader in (build_eval_loader(source, 16, 4, 0), pretrain_loader(source)):
        sent = pickle.loads(pickle.dumps(loader.dataset))
        keys = next(iter(loader.batch_sampler))
        assert_same([sent.__getitems__(keys)], [next(iter(loader))])


def test_eval_loader_errors(source, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="needs class folders"):
        build_eval_loader(find_images(tmp_path), 16, 4, 0)
    with pytest.raises(ConfigError, match="resize 8"):
        build_eval_loader(source, 16, 4, 0, resize=8)
    with pytest.raises(ConfigError, match="batch size is 0"):
        build_eval_loader(source, 16, 0, 0)


SIGNAL_SCRIPT = """
import multiprocessing, os, signal, subprocess, sys
from moco.data.augment import build_recipe
from moco.data.images import find_images
from moco.data.loader import build_pretrain_loader

iterator = iter(build_pretrain_loader(
    find_images(sys.argv[1]), build_recipe("v2", size=16), seed=0, global_batch=4, rank=0,
    world_size=1, first_step=0, last_step=100, num_workers=2, pin_memory=False))
next(iterator)
pids = [str(process.pid) for process in multiprocessing.active_children()]
assert len(pids) == 2
for name in ("-INT", "-TERM"):  # from another process, as Ctrl-C and a scheduler send them
    subprocess.run(["kill", name, *pids], check=True)
for _ in range(20):
    next(iterator)
assert len(multiprocessing.active_children()) == 2
print("served")
# The iterator is alive at exit, as after an uncaught exception: its workers must still end.
"""


def test_workers_outlive_signals_to_the_group_and_end_with_the_main_process(folder):
    root = Path(moco.__file__).parents[1]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr
    assert time.monotonic() - started < 60
