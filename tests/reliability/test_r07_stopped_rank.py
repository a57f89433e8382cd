"""R7: SIGSTOP of a rank: the job ends in seconds, and the log names the rank and the step."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pretrain_runs import ENV, TORCHRUN, Ranks, arguments, make_images
from scripts import ROOT

from moco.training import trainer

pytestmark = pytest.mark.faults
MOST_SECONDS = 20.0  # from the signal to the end of the last process


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def words_of(images: Path, folder: Path) -> list[str]:
    return arguments(images, folder, "--collective-timeout", "4", TRAIN__EPOCHS=1000,
                     CHECKPOINT__PERIOD=1000, DATA__NUM_WORKERS=1)  # fmt: skip


def is_named(said: str, rank: int, pid: int) -> bool:
    """Whether one line says which rank stopped, and at which step."""
    pattern = rf"^error: step \d+: rank {1 - rank} lost contact with rank {rank} "
    lines = re.findall(pattern + rf"\(process {pid} is stopped\); .*--resume", said, re.MULTILINE)
    return len(lines) == 1


def is_ended(images: Path, base: Path, rank: int, arms=(), limit: float = MOST_SECONDS) -> bool:
    """Stop a rank in its training; whether all processes end in time, and the other says why."""
    base.mkdir()
    ranks = Ranks(words_of(images, base / "run"), base / "log", 2, arms=arms)
    try:
        ranks.wait_for(base / "run" / "log.jsonl", '"step": 5,')
        os.kill(ranks.pids[rank], signal.SIGSTOP)
        deadline = time.monotonic() + limit
        while None in ranks.codes() and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = ranks.codes()
    finally:
        ranks.kill()
    return codes == [2, 2] and is_named(ranks.output(1 - rank), rank, ranks.pids[rank])


def is_job_ended(images: Path, base: Path) -> bool:
    """The same of rank 1 under torchrun, which prints what the ranks print."""
    base.mkdir()
    run = base / "run"
    with open(base / "log", "w") as log:
        job = subprocess.Popen(
            [*TORCHRUN, str(ROOT / "tools/pretrain.py"), *words_of(images, run)],
            env=ENV, cwd="/", stdout=log, stderr=log,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 90
            while not ((run / "log.jsonl").exists() and '"step": 5,' in
                       (run / "log.jsonl").read_text()):  # fmt: skip
                assert time.monotonic() < deadline and job.poll() is None
                time.sleep(0.02)
            pid = process_of_rank(job.pid, 1)
            os.kill(pid, signal.SIGSTOP)
            started = time.monotonic()
            code = job.wait(60)
            seconds = time.monotonic() - started
        finally:
            job.kill()
    said = (base / "log").read_text()
    gone = not Path(f"/proc/{pid}").exists()
    return code != 0 and gone and seconds < MOST_SECONDS and is_named(said, 1, pid)


def process_of_rank(launcher: int, rank: int) -> int:
    """The child of a launcher that has this rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    found = [int(pid) for pid in children
             if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]  # fmt: skip
    assert len(found) == 1
    return found[0]


def test_a_stopped_rank_ends_the_job_and_is_named(images, tmp_path, observed, long):
    ranks = [0, 1] * (5 if long else 1)
    good = sum(is_ended(images, tmp_path / str(n), rank) for n, rank in enumerate(ranks))
    good += is_job_ended(images, tmp_path / "job")
    observed("R7", good, len(ranks) + 1)


def do_not_look_for_the_lost(rank: int) -> None:
    """A broken guard: the failure of a collective is left as it is."""
    trainer.lost_rank_as_error = lambda where: contextlib.nullcontext()


def test_control_without_the_search_nobody_is_named(images, tmp_path, observed):
    held = is_ended(images, tmp_path / "a", 1, [do_not_look_for_the_lost], limit=10.0)
    observed("R7", int(not held), 1, control=True)
