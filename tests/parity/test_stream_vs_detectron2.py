"""The replayed training stream against Detectron2's loaders and their worker processes, bitwise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, build_detection_train_loader  # noqa: E402
from detectron2.utils.env import seed_all_rng  # noqa: E402
from parity import record_stream  # noqa: E402
from parity.record_stream import CASES, StreamCase  # noqa: E402

from detection.config import load_detection_config  # noqa: E402
from detection.data.detectron2_stream import Detectron2Stream  # noqa: E402

pytestmark = [
    pytest.mark.detectron2,
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
NUM_BATCHES = 12


@pytest.mark.parametrize("name", CASES)
def test_draws_and_generators_are_equal(name):
    ours, theirs = record_stream.embedded(CASES[name]), record_stream.detectron2(CASES[name])
    assert ours.draws() == theirs.draws()
    assert torch.equal(ours.torch_state, theirs.torch_state)
    assert all(map(np.array_equal, ours.numpy_state, theirs.numpy_state))


@pytest.mark.parametrize(
    "changes",
    [{"seed": 8}, {"num_workers": 3}, {"num_workers": 0}, {"grouped": False}, {"rank": 1}],
    ids=str,
)
def test_another_setting_is_another_stream(changes):
    """Negative control."""
    case = CASES["rank 0 of 2"]
    theirs = record_stream.detectron2(case)
    assert record_stream.embedded(case).draws() == theirs.draws()
    assert record_stream.embedded(case, changes).training != theirs.training


@pytest.fixture(scope="module")
def image_records(tmp_path_factory):
    """The records with image files of noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    records = record_stream.records()
    for record in records:
        record["file_name"] = str(folder / record["file_name"])
        pixels = rng.integers(0, 256, (record["height"], record["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(record["file_name"])
    DatasetCatalog.register("image_records", lambda: records)
    yield records
    DatasetCatalog.remove("image_records")


def different_samples(ours: list[dict], theirs: list[dict]) -> list[str]:
    """What differs between two samples, of all in two batches."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        pairs = {
            "image": (a["image"], b["image"]),
            "boxes": (a["gt_boxes"], b["instances"].gt_boxes.tensor),
            "classes": (a["gt_classes"], b["instances"].gt_classes),
        }
        found += [name for name, (x, y) in pairs.items() if not torch.equal(x, y)]
        found += [key for key in ("image_id", "height", "width") if a[key] != b[key]]
    return found


# (NUM_WORKERS, processes that load our images)
@pytest.mark.parametrize("num_workers, num_processes", [(0, 0), (0, 2), (2, 0), (2, 2), (3, 1)])
def test_loaded_samples_are_equal(image_records, num_workers, num_processes):
    case = StreamCase(num_workers, 2, settings={"INPUT.FORMAT": "RGB"})
    cfg = get_cfg()
    cfg.merge_from_list([*case.pairs(), "DATASETS.TRAIN", ("image_records",)])
    seed_all_rng(case.seed)
    theirs = list(itertools.islice(build_detection_train_loader(cfg), NUM_BATCHES))

    stream = Detectron2Stream(
        image_records,
        load_detection_config(None, case.pairs()),
        seed=case.seed,
        rank=0,
        world_size=1,
    )
    stream.seed_torch()
    loader = stream.load(stream.training_draws(0), num_processes=num_processes)
    ours = list(itertools.islice(loader, NUM_BATCHES))
    loader.close()
    assert [different_samples(*pair) for pair in zip(ours, theirs, strict=True)] == (
        [[]] * NUM_BATCHES
    )
    assert different_samples(ours[0], theirs[1])  # control
