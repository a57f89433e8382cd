"""R2: kill -9 of a rank under `torchrun --max-restarts 2`: the job ends by itself, as if whole."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from pretrain_runs import (
    ENV,
    TORCHRUN,
    WITH_FAULT,
    arguments,
    final_digest,
    make_images,
    undisturbed,
)

pytestmark = pytest.mark.faults
MOST_SECONDS = 30.0  # from the kill to the end of the first step after it


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    return undisturbed(images, tmp_path_factory.mktemp("whole"), 2)


def job(images: Path, folder: Path, starts: list[list]) -> dict:
    """The job under torchrun, with a fault at each of its first starts.

    Returns: code, said, and of a job that ended well: digest, names, seconds from each kill to the
        first step of the next start.
    """
    notes = folder / "notes"
    notes.mkdir(parents=True)
    words = arguments(images, folder / "run", "--resume", DATA__NUM_WORKERS=1)
    done = subprocess.run(
        [*TORCHRUN, "--max-restarts", "2", WITH_FAULT, json.dumps(starts), str(notes), *words],
        env=ENV, cwd="/", capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    found = {"code": done.returncode, "said": done.stdout + done.stderr}
    if done.returncode == 0:
        seconds = [
            float((notes / f"start_{int(killed.name[7]) + 1}.0").read_text())
            - float(killed.read_text())
            for killed in sorted(notes.glob("killed_*"))
        ]
        found |= {"digest": final_digest(folder / "run"), "seconds": seconds,
                  "names": sorted(os.listdir(folder / "run"))}  # fmt: skip
    return found


def is_same(found: dict, whole: tuple) -> bool:
    return found["code"] == 0 and (found["digest"], found["names"]) == whole


TWICE = [["stop", "kill -9", 6, 1], ["stop", "kill -9", 10, 0]]  # both restarts are used
MORE = [
    [["stop", "kill -9", 6, 0]],
    [["stop", "half written", 8, 0]],
    [["stop", "kill -9", 5, 1], ["stop", "before the manifest", 8, 0]],
]


def test_a_killed_rank_is_restarted_and_the_job_ends_in_the_same_bits(
    images, whole, tmp_path, observed, long
):
    cases, same, killed = [TWICE, *(MORE if long else [])], 0, 0
    for number, starts in enumerate(cases):
        found = job(images, tmp_path / str(number), starts)
        assert found["code"] == 0, found["said"]
        assert len(found["seconds"]) == len(starts), found["said"]
        assert max(found["seconds"]) < MOST_SECONDS, found["seconds"]
        assert found["said"].count("starting afresh") == 1  # at the first start
        assert found["said"].count("at step 4/12") >= 1  # at the second
        killed += len(starts)
        same += len(starts) * is_same(found, whole)
    observed("R2", same, killed)


def test_control_a_restart_that_forgets_the_momentum_is_noticed(images, whole, tmp_path, observed):
    starts = [["stop", "kill -9", 6, 0], ["forget", "optimizer"]]
    found = job(images, tmp_path / "job", starts)
    assert found["code"] == 0, found["said"]
    observed("R2", int(not is_same(found, whole)), 1, control=True)
