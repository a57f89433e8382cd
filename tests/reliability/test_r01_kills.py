"""R1: kill -9 of all processes of a run at seeded points; the same command ends in the same bits.

Eight points lie inside the writing of a checkpoint, the others are seeded calls of Python
functions in the training: inside a step, a batch, an exchange between processes, a log line.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from faults import WRITE_POINTS, Stop, count_calls, forget
from pretrain_runs import arguments, final_digest, make_images, pretrain, stop_and_continue

pytestmark = pytest.mark.faults
PROCESSES = (1, 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Number of processes -> digest, names in the run folder, calls of rank 0 in the training."""
    base, found = tmp_path_factory.mktemp("whole"), {}
    for num in PROCESSES:
        folder, log = base / f"run_{num}", base / f"log_{num}"
        assert pretrain(arguments(images, folder), log, num, arms=[counting]) == [0] * num
        calls = int(re.search(r"(\d+) calls", Path(f"{log}.0").read_text()).group(1))
        found[num] = (final_digest(folder), sorted(os.listdir(folder)), calls)
    return found


def counting(rank: int) -> None:
    count_calls()


def forgetting(part: str, rank: int) -> None:
    forget(part)


def seeded_points(num_points: int, calls: dict[int, int]) -> list[tuple[int, Stop]]:
    """(number of processes, where they die); two of five inside the writing of a checkpoint."""
    rng = random.Random(7)
    points = []
    for number in range(num_points):
        num = PROCESSES[number % 2]
        if number < num_points * 2 // 5:
            where = WRITE_POINTS[number % len(WRITE_POINTS)]
            # The first checkpoint has nothing to prune.
            step = rng.choice((8, 12) if where == "inside prune" else (4, 8, 12))
            points.append((num, Stop(where, step, group=True)))
        else:
            call = rng.randrange(1, calls[num] * 9 // 10)
            points.append((num, Stop("call", call, rank=rng.randrange(num), group=True)))
    return points


def is_same(found: dict, whole: tuple) -> bool:
    """Whether a run that was killed and continued ended as the one that was not."""
    return (found["digest"], found["names"]) == whole[:2]


def test_killed_at_20_seeded_points_the_same_command_ends_in_the_same_bits(
    images, whole, tmp_path, observed, long
):
    points = seeded_points(100 if long else 20, {num: whole[num][2] for num in PROCESSES})
    equal = 0
    for number, (num, stop) in enumerate(points):
        folder = tmp_path / str(number)
        workers = 2 if number % 10 == 9 else 0
        words = arguments(images, folder, "--resume", DATA__NUM_WORKERS=workers)
        found = stop_and_continue(words, folder, num, stop)
        assert found["ended"] == [-9] * num, (num, stop)
        equal += is_same(found, whole[num])
    observed("R1", equal, len(points))


PARTS = ("optimizer", "step", "module.queue", "encoder_k", "encoder_q.conv1.weight",
         "running_mean", "queue_ptr")  # fmt: skip


def test_control_a_resume_that_forgets_any_part_of_the_state_is_noticed(
    images, whole, tmp_path, observed
):
    stop, noticed = Stop("kill -9", 6, group=True), 0
    base = tmp_path / "base"
    assert pretrain(arguments(images, base, "--resume"), tmp_path / "log", 1, stop) == [-9]
    for part in (None, *PARTS):
        folder = shutil.copytree(base, tmp_path / str(part))
        words, arms = arguments(images, folder, "--resume"), [partial(forgetting, part)]
        assert pretrain(words, tmp_path / f"{part}.log", arms=arms if part else []) == [0]
        found = {"digest": final_digest(folder), "names": sorted(os.listdir(folder))}
        noticed += is_same(found, whole[1]) == (part is None)
    observed("R1", noticed, 1 + len(PARTS), control=True)
