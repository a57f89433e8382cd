"""The training stream: exact resume, no influence of workers or ranks, Detectron2's grouping."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from detection.config import get_defaults
from detection.data.loader import (
    Augmentation,
    eval_loader,
    global_batches,
    image_order,
    load_test_sample,
    load_train_sample,
    train_loader,
)
from detection.data.sample_loader import WORKERS_KEY
from moco.errors import ConfigError, DataError, dead_worker_as_data_error

NUM_IMAGES = 7


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    out = []
    for k in range(NUM_IMAGES):
        width, height = (37, 23) if k % 2 else (21, 33)
        path = folder / f"{k}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        annotations = [
            {"category_id": k, "bbox": [1.0, 2.0, 9.0 + n, 12.0], "bbox_mode": 0, "difficult": 0}
            for n in range(1 + k % 3)
        ]
        out.append(
            {
                "file_name": str(path),
                "image_id": str(k),
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    return out


def make_cfg(**changes):
    cfg = get_defaults()
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (24, 28, 32), 60
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 30, 40
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def take(records, cfg, number, *, start=0, rank=0, world_size=1, num_workers=0, seed=5):
    loader = train_loader(
        records,
        cfg,
        seed=seed,
        start_iteration=start,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )
    try:
        return list(itertools.islice(loader, number))
    finally:
        loader.close()


def same(batches, others) -> bool:
    samples, other_samples = (list(itertools.chain(*b)) for b in (batches, others))
    if len(samples) != len(other_samples):
        return False
    for a, b in zip(samples, other_samples, strict=True):
        tensors = ("image", "gt_boxes", "gt_classes")
        if a["image_id"] != b["image_id"] or not all(torch.equal(a[t], b[t]) for t in tensors):
            return False
    return True


def test_form_of_a_sample(records):
    (batch,) = take(records, make_cfg(), 1)
    assert len(batch) == 4
    for sample in batch:
        record = records[int(sample["image_id"])]
        assert sample["image"].dtype == torch.uint8 and sample["image"].shape[0] == 3
        assert (sample["height"], sample["width"]) == (record["height"], record["width"])
        assert sample["file_name"] == record["file_name"]
        num_boxes = len(record["annotations"])
        assert sample["gt_boxes"].shape == (num_boxes, 4)
        assert sample["gt_boxes"].dtype == torch.float32
        assert sample["gt_classes"].tolist() == [int(sample["image_id"])] * num_boxes
        assert sample["gt_classes"].dtype == torch.int64
        assert min(sample["image"].shape[1:]) in (24, 28, 32)


def test_order_is_a_row_of_permutations():
    draws = list(itertools.islice(image_order(NUM_IMAGES, seed=1), 3 * NUM_IMAGES))
    assert [position for position, _ in draws] == list(range(3 * NUM_IMAGES))
    passes = [[i for _, i in draws[k : k + NUM_IMAGES]] for k in (0, 7, 14)]
    assert all(sorted(p) == list(range(NUM_IMAGES)) for p in passes)
    assert passes[0] != passes[1]
    other = list(itertools.islice(image_order(NUM_IMAGES, seed=2), 3 * NUM_IMAGES))
    assert other != draws


def test_grouping_by_hand():
    wide = [True, False, True, False, False]
    stream = list(enumerate([0, 1, 3, 2, 4, 0]))
    assert list(global_batches(stream, wide, 2)) == [[(1, 1), (2, 3)], [(0, 0), (3, 2)]]
    # Image 4 waits for a partner; without grouping the stream is cut as it comes.
    plain = list(global_batches(stream, None, 2))
    assert plain == [[(0, 0), (1, 1)], [(2, 3), (3, 2)], [(4, 4), (5, 0)]]


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_have_one_shape_when_grouped(records, grouped):
    batches = take(records, make_cfg(DATALOADER__ASPECT_RATIO_GROUPING=grouped), 6)
    uniform = [len({s["width"] > s["height"] for s in batch}) == 1 for batch in batches]
    assert all(uniform) == grouped


@pytest.mark.parametrize("start", [1, 4, 9])
def test_start_iteration_is_exact_resume(records, start):
    whole = take(records, make_cfg(), 12)
    assert same(take(records, make_cfg(), 12 - start, start=start), whole[start:])
    assert not same(take(records, make_cfg(), 12 - start, start=start - 1), whole[start:])
    assert not same(take(records, make_cfg(), 12, seed=6), whole)


def test_skipping_reads_no_image(records, monkeypatch):
    import detection.data.loader as module

    read = []
    real = module.read_image
    monkeypatch.setattr(module, "read_image", lambda *a: read.append(a) or real(*a))
    take(records, make_cfg(), 1, start=5000)
    assert len(read) == 4


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(records, num_workers):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with_workers = take(records, make_cfg(), 5, num_workers=num_workers, start=2)
    assert same(with_workers, take(records, make_cfg(), 5, start=2))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not drawn from


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batches(records, world_size):
    shares = [
        take(records, make_cfg(), 5, rank=r, world_size=world_size) for r in range(world_size)
    ]
    joined = [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    whole = take(records, make_cfg(), 5)
    assert same(joined, whole)
    assert not same([joined[0][::-1], *joined[1:]], whole)  # control


def test_draws_are_spread_and_flips_follow_the_key(records):
    augmentation = Augmentation.from_config(make_cfg())
    draws = [augmentation.draw(0, position) for position in range(600)]
    counts = [sum(edge == e for edge, _ in draws) for e in (24, 28, 32)]
    assert min(counts) > 150
    assert 240 < sum(flip for _, flip in draws) < 360
    off = Augmentation.from_config(make_cfg(INPUT__RANDOM_FLIP="none"))
    assert not any(off.draw(0, position)[1] for position in range(50))
    ranged = Augmentation((24, 26), "range", 45, "none", "BGR")
    assert {ranged.draw(0, position)[0] for position in range(100)} == {24, 25, 26}


def test_flip_moves_pixels_and_boxes(records):
    plain = Augmentation((23,), "choice", 100, "none", "RGB")
    flipping = Augmentation((23,), "choice", 100, "horizontal", "RGB")
    position = next(p for p in range(50) if flipping.draw(0, p)[1])
    before = load_train_sample(records[1], plain, 0, position)
    after = load_train_sample(records[1], flipping, 0, position)
    assert torch.equal(after["image"], before["image"].flip(2))
    assert before["gt_boxes"][0].tolist() == [1, 2, 9, 12]  # 37 x 23 is left as it is
    assert after["gt_boxes"][0].tolist() == [37 - 9, 2, 37 - 1, 12]


def test_channel_order(records):
    bgr = take(records, make_cfg(INPUT__FORMAT="BGR"), 1)[0][0]["image"]
    rgb = take(records, make_cfg(INPUT__FORMAT="RGB"), 1)[0][0]["image"]
    assert torch.equal(bgr, rgb.flip(0)) and not torch.equal(bgr, rgb)


def test_images_without_boxes_are_filtered_and_counted(records):
    empty = [{**record, "annotations": []} for record in records[:3]]
    arguments = dict(seed=0, start_iteration=0, rank=0, world_size=1, num_workers=0)
    loader = train_loader([*empty, *records[3:]], make_cfg(), **arguments)
    assert loader.num_filtered == 3
    seen = {s["image_id"] for batch in itertools.islice(loader, 6) for s in batch}
    assert seen == {"3", "4", "5", "6"}
    with pytest.raises(DataError, match="3 images, 0 boxes read: no image is trained on; left"):
        train_loader(empty, make_cfg(), **arguments)
    kept = take(empty, make_cfg(DATALOADER__FILTER_EMPTY_ANNOTATIONS=False), 1)
    assert kept[0][0]["gt_boxes"].shape == (0, 4)


def test_wrong_settings_are_config_errors(records):
    with pytest.raises(ConfigError, match="multiple of 3"):
        take(records, make_cfg(), 1, world_size=3)
    for key, value in (
        ("INPUT__RANDOM_FLIP", "vertical"),
        ("INPUT__MIN_SIZE_TRAIN_SAMPLING", "all"),
        ("INPUT__MIN_SIZE_TRAIN", ()),
        ("INPUT__FORMAT", "YUV-BT.601"),
    ):
        with pytest.raises(ConfigError, match=key.replace("__", ".")):
            take(records, make_cfg(**{key: value}), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_one_line(records, tmp_path, num_workers):
    path = tmp_path / "damaged.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    damaged = [{**record, "file_name": str(path)} for record in records]
    with pytest.raises(DataError, match="damaged.png: this image cannot be read") as caught:
        take(damaged, make_cfg(), 1, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_an_image_that_changed_size_is_refused(records):
    changed = [{**record, "height": 9} for record in records]
    with pytest.raises(DataError, match="its record says .* x 9"):
        take(changed, make_cfg(), 1)


def loader_with_worker(records):
    """(loader, its one worker process), after the first batch."""
    before = multiprocessing.active_children()
    loader = train_loader(
        records, make_cfg(), seed=0, start_iteration=0, rank=0, world_size=1, num_workers=1
    )
    next(loader)
    (worker,) = (w for w in multiprocessing.active_children() if w not in before)
    return loader, worker


@pytest.mark.parametrize("way", ["close", "del", "cycle"])
def test_workers_end_with_their_loader(records, way):
    """Workers ignore SIGTERM, so they must end in order, out of a garbage cycle too."""
    loader, worker = loader_with_worker(records)
    os.kill(worker.pid, signal.SIGTERM)
    next(loader)  # it goes on
    begin = time.monotonic()
    if way == "close":
        loader.close()
        assert list(loader) == []
    elif way == "del":
        del loader
    else:
        loader.itself = loader
        del loader
        gc.collect()
    assert not worker.is_alive()
    assert time.monotonic() - begin < 4  # torch waits 5 s before it gives up on a worker


def test_a_dead_worker_is_one_line(records):
    loader, worker = loader_with_worker(records)
    message = "a worker process died .*NUM_WORKERS 0"
    with pytest.raises(DataError, match=message) as caught, dead_worker_as_data_error(WORKERS_KEY):
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(9):
            next(loader)
    assert "\n" not in str(caught.value)
    loader.close()


def test_a_death_reported_again_while_workers_end_is_not_an_error(records, monkeypatch):
    """torch's signal handler may speak after next() has met the broken pipe."""
    loader, worker = loader_with_worker(records)
    end = loader._batches._shutdown_workers

    def reports(message):
        def shut_down():
            end()
            raise RuntimeError(message)

        return shut_down

    monkeypatch.setattr(loader._batches, "_shutdown_workers", reports("DataLoader worker (pid 1)"))
    loader.close()
    assert not worker.is_alive()
    loader, worker = loader_with_worker(records)
    end = loader._batches._shutdown_workers
    monkeypatch.setattr(loader._batches, "_shutdown_workers", reports("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        loader.close()


def test_workers_end_with_the_program(records):
    """A program that still holds its loader must end all the same."""
    code = (
        "import sys, json, itertools; sys.path[:0] = json.loads(sys.argv[2])\n"
        "from detection.config import get_defaults\n"
        "from detection.data.loader import train_loader\n"
        "cfg = get_defaults(); cfg.SOLVER.IMS_PER_BATCH = 2; cfg.INPUT.MIN_SIZE_TRAIN = (24,)\n"
        "loader = train_loader(json.loads(sys.argv[1]), cfg, seed=0, start_iteration=0, rank=0,\n"
        "                      world_size=1, num_workers=1)\n"
        "next(loader); print('read')\n"
    )
    command = [sys.executable, "-c", code, json.dumps(records), json.dumps(sys.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_samples(records, num_workers):
    with_workers = eval_loader(records, make_cfg(), num_workers=num_workers)
    samples = [sample for (sample,) in with_workers]
    assert [s["image_id"] for s in samples] == [r["image_id"] for r in records]
    for sample, record in zip(samples, records, strict=True):
        assert torch.equal(sample["image"], load_test_sample(record, make_cfg())["image"])
    assert [tuple(s["image"].shape) for s in samples[:2]] == [(3, 40, 25), (3, 25, 40)]
    assert set(samples[0]) == {"image", "height", "width", "image_id", "file_name"}
    whole = load_test_sample(records[0], make_cfg(INPUT__MIN_SIZE_TEST=0))
    assert whole["image"].shape == (3, 33, 21)
    missing = [*records[:1], {**records[1], "file_name": "none.jpg"}]
    samples = eval_loader(missing, make_cfg(), num_workers=num_workers)
    next(samples)
    with pytest.raises(DataError, match="none.jpg"):
        next(samples)
    samples.close()
    assert list(eval_loader([], make_cfg(), num_workers=num_workers)) == []


@pytest.mark.detectron2
def test_samples_equal_detectron2s_mapper(records):
    data = pytest.importorskip("detectron2.data")
    transforms = pytest.importorskip("detectron2.data.transforms")
    augmentation = Augmentation.from_config(make_cfg())
    for position, record in enumerate(records):
        short_edge, flip = augmentation.draw(0, position)
        steps = [transforms.ResizeShortestEdge((short_edge,), augmentation.max_size, "choice")]
        steps.append(transforms.RandomFlip(prob=1.0 if flip else 0.0))
        theirs = data.DatasetMapper(is_train=True, augmentations=steps, image_format="BGR")(record)
        ours = load_train_sample(record, augmentation, 0, position)
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["gt_boxes"], theirs["instances"].gt_boxes.tensor)
        assert torch.equal(ours["gt_classes"], theirs["instances"].gt_classes)
        other = load_train_sample(record, augmentation, 1, position + 1)
        if augmentation.draw(1, position + 1) != (short_edge, flip):  # control
            assert not torch.equal(other["image"], theirs["image"])
