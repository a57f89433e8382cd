"""R6: SIGTERM wherever it hits: all ranks stop at one step, with a checkpoint, within seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from faults import catch_no_signals, hold, keep_stop_to_itself
from pretrain_runs import ENV, TORCHRUN, WITH_FAULT, Ranks, arguments, final_digest, pretrain

from moco.training import checkpoint as ckpt

pytestmark = pytest.mark.faults
MOST_SECONDS = 10.0  # from the signal to the end of the last process
STOPPED = 128 + signal.SIGTERM

# (who gets the signal, where it is, loader workers). "evaluation 1" would last 60 s if it were not
# cut short; where only rank 1 is told, which waits for rank 0's share of it, it lasts 2 s.
CASES = (
    ("rank 0", "step 6", 0),
    ("rank 1", "step 6", 2),
    ("rank 0", "step 1", 0),
    ("rank 1", "step 1", 0),
    ("rank 0", "evaluation 1", 0),
    ("rank 1", "evaluation 1", 0),
    ("all", "step 6", 2),
    ("all", "evaluation 0", 2),
)
OF_LAUNCHER = (("launcher", "step 1", 1), ("launcher", "evaluation 1", 1))
MORE = (
    ("launcher", "step 6", 2), ("launcher", "evaluation 0", 0), ("all", "step 1", 2),
    *((f"rank {rank}", f"step {step}", 1) for rank in range(2) for step in (2, 4, 8, 11)),
)  # fmt: skip


def words_of(image_folder: Path, folder: Path, workers: int = 0) -> list[str]:
    # With this period no checkpoint is written before the evaluation after epoch 1.
    return arguments(image_folder, folder, "--collective-timeout", "8", "--resume", KNN__PERIOD=1,
                     CHECKPOINT__PERIOD=2, DATA__NUM_WORKERS=workers)  # fmt: skip


@pytest.fixture
def whole(image_folder, tmp_path) -> str:
    words = words_of(image_folder, tmp_path / "whole")
    assert pretrain(words, tmp_path / "whole.log", 2) == [0, 0]
    return final_digest(tmp_path / "whole")


def holding(where: str, folder: str, seconds: float, rank: int) -> None:
    hold(where, folder, seconds)


def alone(rank: int) -> None:
    keep_stop_to_itself()


def uncaught(rank: int) -> None:
    catch_no_signals()


def signalled(case: tuple, words: list[str], notes: Path, arms=()) -> dict:
    """Start the job, send the signal where the case says. Returns: codes, seconds, said."""
    to, where, _ = case
    seconds = 2.0 if case[:2] == ("rank 1", "evaluation 1") else 60.0
    notes.mkdir()
    held = notes / "held.0"
    if to == "launcher":
        return signalled_launcher(where, words, notes)
    ranks = Ranks(words, notes / "log", 2, group=to == "all",
                  arms=[partial(holding, where, str(notes), seconds), *arms])  # fmt: skip
    try:
        ranks.wait_for(held)
        if where.startswith("step"):
            ranks.wait_for(notes / "held.1")
        started = time.monotonic()
        if to == "all":
            os.killpg(ranks.pids[0], signal.SIGTERM)
        else:
            os.kill(ranks.pids[int(to[-1])], signal.SIGTERM)
        codes = ranks.join(MOST_SECONDS * 2)
    finally:
        ranks.kill()
    return {"codes": codes, "seconds": time.monotonic() - started, "said": ranks.output(0)}


def signalled_launcher(where: str, words: list[str], notes: Path) -> dict:
    faults = json.dumps([["hold", where, str(notes)]])
    with open(notes / "log", "w+") as log:
        job = subprocess.Popen([*TORCHRUN, WITH_FAULT, faults, str(notes), *words], env=ENV,
                               cwd="/", stdout=log, stderr=log)  # fmt: skip
        try:
            deadline = time.monotonic() + 90
            wanted = [notes / f"held.{rank}" for rank in range(2 if "step" in where else 1)]
            while not all(path.exists() for path in wanted):
                assert time.monotonic() < deadline and job.poll() is None
                time.sleep(0.02)
            started = time.monotonic()
            job.send_signal(signal.SIGTERM)
            code = job.wait(60)
        finally:
            job.kill()
    said = (notes / "log").read_text()
    return {"codes": [code], "seconds": time.monotonic() - started, "said": said}


def is_held(case: tuple, image_folder: Path, base: Path, whole: str, arms=()) -> bool:
    """Whether all that R6 promises is so."""
    to, where, workers = case
    folder = base / "run"
    words = words_of(image_folder, folder, workers)
    found = signalled(case, words, base / "notes", arms)
    stopped = re.search(r"stopped at step (\d+)/12, checkpoint saved", found["said"])
    if not stopped or found["seconds"] > MOST_SECONDS:
        return False
    # torchrun ends with a code of its own, after all ranks have ended.
    if 0 in found["codes"] or (to != "launcher" and found["codes"] != [STOPPED, STOPPED]):
        return False
    kind, number = where.split()
    # The step in which it came is finished; after an evaluation one more is made.
    expected = int(number) if kind == "step" else int(number) * 4 + 1
    step = int(stopped.group(1))
    path, manifest, _ = ckpt.latest_verified(folder)
    if path is None or manifest["step"] != step or not expected <= step <= expected + 1:
        return False
    assert pretrain(words_of(image_folder, folder), base / "continued", 2) == [0, 0]
    said = (base / "continued.0").read_text()
    return f"at step {step}/12" in said and final_digest(folder) == whole


def count(cases, image_folder, tmp_path, whole) -> tuple[int, list]:
    failed = []
    for number, case in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        if not is_held(case, image_folder, tmp_path / str(number), whole):
            failed.append(case)
    return len(cases) - len(failed), failed


def test_a_signal_to_a_rank_or_to_all_stops_all_with_a_checkpoint(
    image_folder, tmp_path, whole, observed, long
):
    cases = [*CASES, *(case for case in MORE if long and case[0] != "launcher")]
    good, failed = count(cases, image_folder, tmp_path, whole)
    assert not failed
    observed("R6", good, len(cases))


def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint(
    image_folder, tmp_path, whole, observed, long
):
    cases = [*OF_LAUNCHER, *(case for case in MORE if long and case[0] == "launcher")]
    good, failed = count(cases, image_folder, tmp_path, whole)
    assert not failed
    observed("R6", good, len(cases))


@pytest.mark.parametrize("broken", [alone, uncaught])
def test_control_without_the_shared_or_the_caught_signal_it_is_not_so(
    image_folder, tmp_path, whole, broken, observed
):
    held = is_held(("rank 1", "step 6", 0), image_folder, tmp_path, whole, [broken])
    observed("R6", int(not held), 1, control=True)
