"""The replay of Detectron2's stream against what was recorded from Detectron2 itself.

`tests/parity/record_stream.py` records; `tests/parity/test_stream_vs_detectron2.py` compares live.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from parity.record_stream import (
    CASES,
    GOLDEN,
    NUM_BATCHES,
    StreamCase,
    embedded,
    records,
)
from PIL import Image

from detection.config import load_detection_config
from detection.data.detectron2_stream import (
    Detectron2Stream,
    in_turn,
    rank_order,
    worker_part,
    worker_randoms,
)
from moco.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", CASES)
def test_recorded_stream_is_replayed(golden, name):
    assert embedded(CASES[name]).draws() == golden[name]


def test_every_recorded_case_is_known(golden):
    assert golden.keys() - {"versions"} == CASES.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"num_workers": 1},
        {"num_workers": 0},
        {"num_workers": 3},
        {"share": 3},
        {"grouped": False},
        {"rank": 1, "world_size": 2},
        {"settings": {"INPUT.RANDOM_FLIP": "none"}},
        {"settings": {"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}},
    ],
    ids=str,
)
def test_another_setting_is_another_stream(golden, changes):
    """Negative control."""
    assert embedded(CASES["two workers"], changes).training != golden["two workers"]["training"]


def test_draws_of_precise_bn_follow_those_of_training_without_workers(golden):
    """Its order starts anew; its sizes and flips go on where the main process's numpy is."""
    fresh, used = golden["two workers"]["precise_bn"], golden["no workers"]["precise_bn"]
    images = [[[sample[0] for sample in batch] for batch in run] for run in (fresh, used)]
    assert images[0] == images[1] and fresh != used


@pytest.mark.parametrize("name", ["no workers", "three workers", "not grouped, three workers"])
@pytest.mark.parametrize("start", [1, 6, NUM_BATCHES])
def test_start_in_the_middle(golden, name, start):
    resumed = embedded(CASES[name], start=start)
    assert resumed.training == golden[name]["training"][start:]
    assert resumed.precise_bn == golden[name]["precise_bn"]


def make_stream(own_records, case=CASES["no workers"]) -> Detectron2Stream:
    cfg = load_detection_config(None, case.pairs())
    stream = Detectron2Stream(
        own_records, cfg, seed=case.seed, rank=case.rank, world_size=case.world_size
    )
    stream.seed_torch()
    return stream


def test_torch_is_drawn_from_once_for_each_loader_and_numpy_never():
    """Numpy's global generator belongs to others."""
    before = np.random.get_state(legacy=True)
    stream = make_stream(records())
    list(stream.training_draws(0))
    list(stream.precise_bn_draws())
    state = torch.get_rng_state()
    stream.seed_torch()
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(np.array_equal, before, np.random.get_state(legacy=True)))


@pytest.mark.parametrize("num_processes", [0, 2])
def test_a_loader_that_works_ahead_takes_no_draw_of_precise_bn(golden, tmp_path, num_processes):
    own_records = records()
    for record in own_records:
        record["file_name"] = str(tmp_path / record["file_name"])
        Image.new("RGB", (record["width"], record["height"])).save(record["file_name"])
    stream = make_stream(own_records)
    loader = stream.load(stream.training_draws(0), num_processes=num_processes)
    loaded = [[list(s["image"].shape[1:]) for s in batch] for batch in loader]
    loader.close()
    expected = golden["no workers"]
    assert loaded == [[sample[1:3] for sample in batch] for batch in expected["training"]]
    batches = itertools.chain.from_iterable(expected["precise_bn"])
    flips = [draw.flip for batch in stream.precise_bn_draws() for draw in batch]
    assert flips == [sample[3] for sample in batches]


def test_parts_by_hand():
    order = list(enumerate("abcdefghij"))
    parts = [list(worker_part(iter(order), worker, 2, 3)) for worker in range(2)]
    assert ["".join(name for _, name in part) for part in parts] == ["abcghi", "defj"]
    assert "".join(in_turn([iter("ace"), iter("bdf")])) == "abcdef"
    whole = list(itertools.islice(rank_order(5, 3, 0, 1), 10))
    assert sorted(index for _, index in whole[:5]) == list(range(5))
    ranks = [list(itertools.islice(rank_order(5, 3, rank, 2), 5)) for rank in range(2)]
    assert [index for pair in zip(*ranks, strict=True) for _, index in pair] == [
        index for _, index in whole
    ]


def test_seeds_of_workers_stay_in_numpys_range():
    base_seed = 2**63 - 2
    first, second = worker_randoms(base_seed, 2)
    assert first.randint(1000) == np.random.RandomState(2**31 - 2).randint(1000)
    assert second.randint(1000) == np.random.RandomState(2**31 - 1 + 1).randint(1000)


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(ConfigError, match="multiple of 2"):
        make_stream(records(), StreamCase(0, 1, settings={"SOLVER.IMS_PER_BATCH": 3}, world_size=2))
    with pytest.raises(DataError, match="13 images, 0 boxes read: no image is trained on; left"):
        make_stream([{**record, "annotations": []} for record in records()])
    stream = ["DATALOADER.STREAM", "detectron2"]
    with pytest.raises(ConfigError, match="SEED is -1; allowed: 0 to .*the SEED of the run"):
        load_detection_config(None, stream)
    with pytest.raises(ConfigError, match="STREAM is 'd2'.* allowed: 'stateless', 'detectron2'"):
        load_detection_config(None, ["DATALOADER.STREAM", "d2"])
    assert load_detection_config(None, [*stream, "SEED", "0"]).DATALOADER.STREAM == "detectron2"
