"""tools/pretrain.py in processes of their own, ended at a chosen point and started again."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import tiny
from faults import Stop, arm
from PIL import Image
from processes import SERVER
from scripts import ROOT, load_tool

from moco import distributed
from moco.training import checkpoint as ckpt

# --standalone finds a free port by itself.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--monitor-interval", "0.1"]  # fmt: skip
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
WITH_FAULT = str(ROOT / "tests/pretrain_with_fault.py")
CONFIG = str(ROOT / "configs/pretrain/moco_v2_200ep.yaml")
LAST = "checkpoint_0002.pth.tar"


def make_images(folder: Path, num: int = 32) -> Path:
    """A flat folder of noise images of 24 pixels."""
    rng = np.random.default_rng(0)
    for i in range(num):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def arguments(images, folder, *flags: str, variant: str = "moco", **changes: object) -> list[str]:
    """Words of the tiny run of a method's variant."""
    changes = {"METHOD": variant.partition(":")[0], "KNN__PERIOD": 0, **tiny.VARIANTS[variant],
               **changes}  # fmt: skip
    return ["--config-file", CONFIG, "--data", str(images), "--output-dir", str(folder),
            "--device", "cpu", *flags, *tiny.overrides(**changes)]  # fmt: skip


def undisturbed(images: Path, base: Path, num: int = 1) -> tuple[str, list[str]]:
    """The tiny run in `num` processes that nobody stops: the digest of its last checkpoint, and
    what the run folder holds."""
    assert pretrain(arguments(images, base / "run"), base / "log", num) == [0] * num
    return final_digest(base / "run"), sorted(os.listdir(base / "run"))


def stopped_and_whole(folder: Path, num_steps: int) -> str:
    """Make folder/images, folder/run, stopped after `num_steps` of 12 steps, and folder/whole.

    Returns: the digest of the run that was not stopped.
    """
    (folder / "images").mkdir()
    make_images(folder / "images")
    assert tiny.trainer(folder / "images", folder / "whole", []).train() == 0
    run = tiny.trainer(folder / "images", folder / "run", [], CHECKPOINT__KEEP_LAST=3)
    assert run.train([tiny.StopAfter(num_steps - 1)]) == 143
    return final_digest(folder / "whole")


class Ranks:
    """The command in `num` processes of this machine; what they print is added to LOG.rank.

    Args:
        arms: called in each process, before the command, with its rank.
        group: put the processes into a process group of their own; its number is `pids[0]`.
    """

    def __init__(self, words: list[str], log: Path, num: int = 1, *,
                 arms: Sequence[Callable[[int], None]] = (), group: bool = False):  # fmt: skip
        port, leader = str(distributed._free_port()), None
        self.logs = [Path(f"{log}.{rank}") for rank in range(num)]
        self.processes = []
        for rank in range(num):
            args = (words, self.logs[rank], rank, num, port, arms, leader if group else -1)
            self.processes.append(SERVER.Process(target=_rank, args=args))
            self.processes[-1].start()
            leader = self.processes[0].pid
        self.pids = [process.pid for process in self.processes]

    def wait_for(self, path: Path, text: str = "", timeout_s: float = 60) -> None:
        """Until a file is there and holds `text`."""
        deadline = time.monotonic() + timeout_s
        while not (path.exists() and text in path.read_text()):
            assert time.monotonic() < deadline and self.processes[0].is_alive(), self.output(0)
            time.sleep(0.01)

    def join(self, timeout_s: float = 120) -> list[int]:
        """Exit codes by rank, -9 for a killed one.

        Once one has ended badly the others are given 20 s, as a launcher would.
        """
        for process in self.processes:
            process.join(timeout_s)
            timeout_s = 20 if process.exitcode else timeout_s
        try:
            assert None not in self.codes(), f"a process did not end; see {self.logs}"
        finally:
            self.kill()
        return self.codes()

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()

    def output(self, rank: int) -> str:
        return self.logs[rank].read_text()


def pretrain(words: list[str], log: Path, num: int = 1, stop: Stop | None = None,
             arms: Sequence[Callable[[int], None]] = ()) -> list[int]:  # fmt: skip
    """Run the command in `num` processes, ended by `stop`; exit codes as of `Ranks.join`."""
    group = stop is not None and stop.group
    arms = [*arms, partial(arm, stop)] if stop else arms
    return Ranks(words, log, num, arms=arms, group=group).join()


def _rank(words, log, rank, num, port, arms, leader) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # loader workers as those of the command
    if leader != -1:
        _join_group(leader or 0)
    if num > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(num), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
    for function in arms:
        function(rank)
    try:
        load_tool("pretrain").main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _join_group(leader: int) -> None:
    """Enter the process group of rank 0 (of this process: 0), which may still have to make it."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return os.setpgid(0, leader)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def stop_and_continue(words: list[str], folder: Path, num: int, stop: Stop,
                      arms: Sequence[Callable[[int], None]] = ()) -> dict:  # fmt: skip
    """Run until `stop` ends it, then again to the end.

    Args:
        arms: of the second run, as of `Ranks`.
    Returns: ended (exit codes), left (names in the run folder), from_step, digest, names.
    """
    ended = pretrain(words, folder.with_name(f"{folder.name}.stopped"), num, stop)
    left = sorted(os.listdir(folder))
    log = folder.with_name(f"{folder.name}.continued")
    codes = pretrain(words, log, num, arms=arms)
    said = Path(f"{log}.0").read_text()
    assert codes == [0] * num, said
    found = re.search(r"continuing from .* at step (\d+)/", said)
    assert found or "starting afresh" in said, said
    return {
        "ended": ended, "left": left, "from_step": int(found.group(1)) if found else 0,
        "digest": final_digest(folder), "names": sorted(os.listdir(folder)),
    }  # fmt: skip


def final_digest(folder: Path) -> str:
    return tiny.state_digest(ckpt.read_torch_file(Path(folder) / LAST))
