"""R11: two jobs on one output folder; a lock that a dead job left."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from functools import partial
from pathlib import Path

import pytest
from faults import Stop
from pretrain_runs import Ranks, arguments, final_digest, make_images, pretrain
from processes import SERVER

from moco.errors import CheckpointError
from moco.training import run_lock, trainer
from moco.training.run_lock import LOCK_FILE, RunLock

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def digests(images, tmp_path_factory):
    """Number of processes -> digest of the run that was alone."""
    base, found = tmp_path_factory.mktemp("whole"), {}
    for num in (1, 2):
        words = arguments(images, base / f"run_{num}")
        assert pretrain(words, base / "log", num) == [0] * num
        found[num] = final_digest(base / f"run_{num}")
    return found


def wait_in_step_6(until: Path, rank: int) -> None:
    """Armed in a job: it stays in its sixth step until a file is there."""
    train_step = trainer.train_step

    def waiting(*args, **kwargs):
        deadline = time.monotonic() + 60
        while kwargs["step"] == 5 and not until.exists() and time.monotonic() < deadline:
            until.with_suffix(".waits").touch()
            time.sleep(0.01)
        return train_step(*args, **kwargs)

    trainer.train_step = waiting


def without_lock(rank: int) -> None:
    run_lock.RunLock.acquire = lambda self: None


def second_is_refused(images, base: Path, nums: tuple[int, int], digest: str, arms=()) -> bool:
    """Whether the second job refuses by host and process, writes nothing, and the first goes on.

    Args:
        nums: processes of the first and of the second job.
        arms: of the second job.
    """
    base.mkdir()
    go, words = base / "go", arguments(images, base / "run", "--resume")
    first = Ranks(words, base / "first", nums[0], arms=[partial(wait_in_step_6, go)])
    try:
        first.wait_for(go.with_suffix(".waits"))
        before = {path.name: path.read_bytes() for path in (base / "run").iterdir()}
        codes = pretrain(words, base / "second", nums[1], arms=arms)
        after = {path.name: path.read_bytes() for path in (base / "run").iterdir()}
        go.touch()
        ended = first.join()
    finally:
        first.kill()
    said = Path(f"{base / 'second'}.0").read_text().splitlines()[-1]
    holder = f"process {first.pids[0]} on {socket.gethostname()}"
    refused = said.startswith(f"error: {base / 'run'}: is in use by {holder};")
    good = codes == [2] * nums[1] and refused and before == after
    return good and ended == [0] * nums[0] and final_digest(base / "run") == digest


def test_a_second_job_is_refused_by_host_and_process(images, digests, tmp_path, observed):
    pairs = [(1, 1), (2, 1), (2, 2)]
    found = [
        second_is_refused(images, tmp_path / f"{n}", nums, digests[nums[0]])
        for n, nums in enumerate(pairs)
    ]
    observed("R11", sum(found), len(pairs))


def test_control_without_the_lock_the_second_job_writes_too(images, digests, tmp_path, observed):
    good = second_is_refused(images, tmp_path / "base", (1, 1), digests[1], [without_lock])
    observed("R11", int(not good), 1, control=True)


# What the file of a job that is gone may hold; the process of the second is alive.
STALE = {
    "a dead process": json.dumps({"host": "elsewhere", "pid": 4_194_303}),
    "a living process of the same number": json.dumps({"host": "", "pid": 1}),
    "nothing": "",
    "half a line": '{"host": "x", "pi',
}


def is_taken_over(images, folder: Path, digest: str, content: str | None, arms=()) -> bool:
    """Whether the command goes on, though a dead job's lock is there, to the same digest.

    Args:
        content: of the lock file; None: whatever a job killed in its sixth step left.
    """
    words, log = arguments(images, folder, "--resume"), folder.with_suffix(".log")
    if content is None:
        assert pretrain(words, log, 1, Stop("kill -9", 6)) == [-9]
    else:
        folder.mkdir()
        (folder / LOCK_FILE).write_text(content)
    assert (folder / LOCK_FILE).exists()
    codes = pretrain(words, log, arms=arms)
    return codes == [0] and final_digest(folder) == digest


def test_a_stale_lock_is_taken_over(images, digests, tmp_path, observed):
    found = [
        is_taken_over(images, tmp_path / f"{n}", digests[1], content)
        for n, content in enumerate([None, *STALE.values()])
    ]
    observed("R11", sum(found), len(found))


def lock_by_existence(rank: int) -> None:
    """A broken guard: what most jobs do, a file that is there is a lock."""

    def acquire(self) -> None:
        if self.path.exists():
            raise CheckpointError(f"{self.path}: is there")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    run_lock.RunLock.acquire = acquire


def test_control_a_lock_that_is_a_file_stays_when_its_job_is_killed(
    images, digests, tmp_path, observed
):
    good = is_taken_over(images, tmp_path / "run", digests[1], None, [lock_by_existence])
    observed("R11", int(not good), 1, control=True)


def _compete(folder: str, number: int, num: int, arm) -> None:
    """Wait for the others, then take the lock, note that, and hold it until all have tried."""
    arm(0)
    lock, own = RunLock(folder, lambda line: None), Path(folder, f"{number}")
    own.with_suffix(".ready").touch()
    _wait_for(folder, "*.ready", num)
    try:
        lock.acquire()
        own.with_suffix(".won").touch()
    except CheckpointError as error:
        assert re.search(r"is in use by (process \d+ on|another job, which)", str(error))
        own.with_suffix(".lost").touch()
    own.with_suffix(".tried").touch()
    _wait_for(folder, "*.tried", num)
    os._exit(0)


def _wait_for(folder: str, pattern: str, num: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(Path(folder).glob(pattern))) < num and time.monotonic() < deadline:
        time.sleep(0.001)


def _nothing(rank: int) -> None:
    pass


def one_wins(folder: Path, num: int, arm=_nothing) -> bool:
    folder.mkdir()
    jobs = [SERVER.Process(target=_compete, args=(str(folder), n, num, arm)) for n in range(num)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(90)
    results = [len(list(folder.glob(f"*.{end}"))) for end in ("won", "lost")]
    return results == [1, num - 1]


def test_of_jobs_that_start_at_once_one_gets_the_folder(tmp_path, observed, long):
    rounds = 40 if long else 8
    found = [one_wins(tmp_path / f"{n}", 3) for n in range(rounds)]
    observed("R11", sum(found), rounds)


def test_control_without_the_lock_all_get_it(tmp_path, observed):
    observed("R11", int(not one_wins(tmp_path / "x", 3, without_lock)), 1, control=True)
