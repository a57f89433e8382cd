"""R10: a run continued with another number of processes or of loader workers.

Its run of two processes without workers is stopped after an epoch of three.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from elastic_runs import CHANGES, continued, joined, make_base, same
from pretrain_runs import final_digest
from processes import in_processes
from torch.utils.data import get_worker_info

from moco.data import loader
from moco.data.images import find_images
from moco.data.two_views import TwoViews
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError, ConfigError
from moco.training import trainer
from moco.training.identity import RunIdentity
from moco.training.trainer import Trainer

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more than there are cores
]
WORKERS = (0, 1, 2, 4)
# Processes that continue -> what the refusal says of them; None: it goes on.
NUMBERS = {
    1: "was made with 2 processes, now there are 1; .*add --elastic",
    2: None,
    3: "TRAIN.BATCH_SIZE 8 .* cannot be shared by 3 processes",
    4: "was made with 2 processes, now there are 4; .*add --elastic",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("numbers"))


@pytest.fixture(scope="module")
def expected(base):
    """What the run's own two processes do without workers."""
    return continued(2, base, base / "images")


def _start(rank, num, images, folder, arm) -> str:
    """What the start without --elastic is refused with; empty where it goes on."""
    if arm is not None:
        arm()
    process = ProcessInfo(rank, num, rank, torch.device("cpu"))
    try:
        run = Trainer(
            tiny.config(**CHANGES), find_images(images), folder, process,
            resume=True, say=lambda line: None,
        )  # fmt: skip
    except (CheckpointError, ConfigError) as error:
        return str(error)
    assert run.first_step == 4
    return ""


def is_as_documented(base: Path, folder: Path, num: int, arm=None) -> bool:
    """Whether all processes are refused alike, and nothing is written; or all go on."""
    folder.mkdir()
    for path in (base / "whole").glob("checkpoint_0000.*"):
        shutil.copy(path, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = in_processes(_start, base, num, base / "images", folder, arm, num=num)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    pattern = NUMBERS[num]
    if pattern is None:
        return said == [""] * num
    refused = all(text == said[0] and "\n" not in text for text in said)
    return refused and bool(re.search(pattern, said[0])) and before == after


def test_another_number_of_processes_is_refused_without_the_flag(base, tmp_path, observed):
    found = [is_as_documented(base, tmp_path / str(num), num) for num in NUMBERS]
    observed("R10", sum(found), len(NUMBERS))


def compare_nothing() -> None:
    RunIdentity.check = lambda *args, **options: []


def test_control_without_the_comparison_another_number_is_taken(base, tmp_path, observed):
    found = [is_as_documented(base, tmp_path / str(num), num, compare_nothing) for num in (1, 4)]
    observed("R10", found.count(False), 2, control=True)


def test_elastic_every_number_of_processes_sees_the_same_batches(base, expected, observed):
    batches = joined(expected)
    assert len(batches) == 8 and batches[0][1].shape == (8, 2, 3, 16, 16)
    found = [same(joined(continued(num, base, base / "images")), batches) for num in (1, 4)]
    observed("R10", sum(found), 2)


@pytest.fixture(scope="module")
def whole(base):
    """A run of one process without workers, stopped after 5 of 12 steps; its other 7."""
    own, stop = base / "one", tiny.StopAfter(4)
    run = tiny.trainer(base / "images", own / "stopped", [], CHECKPOINT__KEEP_LAST=3)
    assert run.train([stop]) == 143
    return own, recorded(base / "images", shutil.copytree(own / "stopped", own / "whole"), 0)


def recorded(images: Path, folder: Path, workers: int) -> tuple:
    """Continue to the end. Returns: batches (index, pixels of both views), the final digest."""
    batches, train_step = [], trainer.train_step

    def recording(model, method, optimizer, batch, **kwargs):
        batches.append((batch[2].clone(), torch.stack(batch[:2], 1)))
        return train_step(model, method, optimizer, batch, **kwargs)

    trainer.train_step = recording
    try:
        assert tiny.trainer(images, folder, [], DATA__NUM_WORKERS=workers).train() == 0
    finally:
        trainer.train_step = train_step
    return batches, final_digest(folder)


def is_identical(base: Path, whole, folder: Path, workers: int) -> bool:
    """Whether all batches and the weights at the end are those without workers, bit for bit."""
    own, (wanted, wanted_digest) = whole
    batches, digest = recorded(base / "images", shutil.copytree(own / "stopped", folder), workers)
    return len(batches) == 7 and same(batches, wanted) and digest == wanted_digest


def test_batches_and_weights_are_identical_for_every_number_of_workers(
    base, whole, tmp_path, observed
):
    found = [is_identical(base, whole, tmp_path / f"{n}", n) for n in WORKERS]
    observed("R10", sum(found), len(WORKERS))


class DrawsOfWorkers(TwoViews):
    """A broken guard: as with generators that each worker seeds by its own number."""

    def batch(self, keys):
        worker = get_worker_info()
        own, self.seed = self.seed, self.seed + (worker.id + 1 if worker else 0)
        try:
            return super().batch(keys)
        finally:
            self.seed = own


def test_control_draws_of_a_workers_own_are_noticed(base, whole, tmp_path, monkeypatch, observed):
    monkeypatch.setattr(loader, "TwoViews", DrawsOfWorkers)
    found = [is_identical(base, whole, tmp_path / f"{n}", n) for n in WORKERS]
    assert found[0]
    observed("R10", found[1:].count(False), len(WORKERS) - 1, control=True)
