"""Ways to end a pretraining process at a chosen point; armed in a child process, for its life."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moco.evaluation import monitor
from moco.training import checkpoint as ckpt
from moco.training import guard, trainer
from moco.training import step as one_step

# Points inside the writing of a checkpoint, in their order.
WRITE_POINTS = (
    "file opened",
    "half written",
    "before fsync",
    "before rename",
    "before the manifest",
    "before the manifest's rename",
    "inside prune",
)


@dataclass(frozen=True)
class Stop:
    """How a process ends.

    Args:
        how: "SIGTERM" or "kill -9" once `step` steps are done, or one of WRITE_POINTS: kill -9
            there in the writing of the checkpoint of `step`; or "call": kill -9 at the `step`-th
            call of a Python function in the training, wherever that is.
        rank: the rank it happens to; None: all.
        term_at: SIGTERM to all ranks once so many steps are done; 0: none.
        group: the kill -9 goes to the whole process group, loader workers included.
    """

    how: str
    step: int
    rank: int | None = 0
    term_at: int = 0
    group: bool = False

    def __str__(self) -> str:
        if self.how not in WRITE_POINTS:
            return self.how
        return f"kill -9, {self.how}" + (" (of the stop's checkpoint)" if self.term_at else "")


# Of the tiny run: 12 steps, a checkpoint after 4, 8 and 12 of which one is kept.
STOPS = (
    Stop("SIGTERM", 1),
    Stop("SIGTERM", 3),
    Stop("SIGTERM", 6, rank=None),
    Stop("SIGTERM", 10),
    Stop("kill -9", 1, rank=None),
    Stop("kill -9", 5),
    Stop("kill -9", 11, rank=None),
    *(Stop(point, 8) for point in WRITE_POINTS),
    Stop("half written", 4),
    Stop("before the manifest", 12),
    Stop("half written", 7, term_at=6),
    Stop("before the manifest", 7, term_at=6),
)


def die() -> None:
    (os.killpg if _whole_group else os.kill)(0 if _whole_group else os.getpid(), signal.SIGKILL)


_whole_group = False


def arm(stop: Stop, rank: int) -> None:
    """Patch this process so that it ends as `stop` says; there is no way back."""
    global _whole_group
    _whole_group = stop.group
    if stop.term_at:
        after_step(stop.term_at, lambda: signal.raise_signal(signal.SIGTERM))
    if stop.rank not in (None, rank):
        return
    if stop.how == "SIGTERM":
        after_step(stop.step, lambda: signal.raise_signal(signal.SIGTERM))
    elif stop.how == "kill -9":
        after_step(stop.step, die)
    elif stop.how == "call":
        count_calls(stop.step)
    else:
        _in_write(stop.how, stop.step)


def after_step(step: int, act) -> None:
    """Call `act()` once so many steps of the run are done."""
    train_step = trainer.train_step

    def wrapped(*args, **kwargs):
        result = train_step(*args, **kwargs)
        if kwargs["step"] + 1 == step:
            act()
        return result

    trainer.train_step = wrapped


def after_first_step(act) -> None:
    """Call `act()` once the first step of this process is done."""
    train_step, is_first = trainer.train_step, True

    def wrapped(*args, **kwargs):
        nonlocal is_first
        result = train_step(*args, **kwargs)
        if is_first:
            act()
        is_first = False
        return result

    trainer.train_step = wrapped


def count_calls(last: int = 0) -> None:
    """Die at the `last`-th call of a Python function in the training; print how many there were."""
    train = trainer.Trainer.train

    def counted(self, *args, **kwargs):
        count = 0

        def at_event(frame, event, argument):
            nonlocal count
            if event == "call":
                count += 1
                if count == last:
                    die()

        sys.setprofile(at_event)
        try:
            return train(self, *args, **kwargs)
        finally:
            sys.setprofile(None)
            print(f"{count} calls")

    trainer.Trainer.train = counted


def hold(where: str, folder: str, seconds: float = 60.0) -> None:
    """Make this process wait inside a step or an evaluation, for a signal to come there.

    It touches FOLDER/held.RANK and goes on once a held process of the job received SIGTERM.

    Args:
        where: "step N": in its backward's end, on all ranks; "evaluation N": rank 0 between two
            batches of the kNN after epoch N.
        seconds: after which it goes on anyway.
    """
    what, number = where.split()
    go, held = pathlib.Path(folder, "go"), pathlib.Path(folder, f"held.{os.environ['RANK']}")

    def wait(act) -> None:
        previous = signal.getsignal(signal.SIGTERM)

        def handler(signum, frame):
            go.touch()
            signal.signal(signal.SIGTERM, previous)
            signal.raise_signal(signum)

        signal.signal(signal.SIGTERM, handler)
        held.touch()
        deadline = time.monotonic() + seconds
        try:
            while not go.exists() and time.monotonic() < deadline:
                act()
        finally:
            signal.signal(signal.SIGTERM, previous)

    if what == "step":
        _nth_call(one_step, "gradient_norm", int(number), lambda: wait(lambda: time.sleep(0.01)))
        return
    build, count = monitor.build_knn_monitor, -1

    def build_knn_monitor(*args):
        evaluate = build(*args)

        def evaluate_long(encoder, stop):
            nonlocal count
            count += 1
            was_held = count != int(number) or os.environ["RANK"] != "0"

            def held_stop() -> bool:
                nonlocal was_held
                if not was_held:
                    was_held = True
                    wait(lambda: time.sleep(0.01))
                return stop()

            return evaluate(encoder, held_stop)

        return evaluate_long

    monitor.build_knn_monitor = build_knn_monitor


def _nth_call(where, name: str, number: int, act) -> None:
    """Call `act()` as a function is called for the `number`-th time."""
    function, count = getattr(where, name), 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            act()
        return function(*args, **kwargs)

    setattr(where, name, wrapped)


def skip_collective(name: str, number: int) -> None:
    """Leave out the `number`-th call of torch.distributed's function `name`."""
    function, count = getattr(dist, name), 0

    def skipping(*args, **kwargs):
        nonlocal count
        count += 1
        return None if count == number else function(*args, **kwargs)

    setattr(dist, name, skipping)


def catch_no_signals() -> None:
    """A broken guard: a signal ends the process, as it would by default."""
    trainer.caught_signals = lambda: contextlib.nullcontext([])


def keep_stop_to_itself() -> None:
    """A broken guard: a process does not tell the others that it was asked to stop."""
    check = guard.StepGuard.check

    def alone(self, *args, stop, **kwargs):
        result = check(self, *args, stop=False, **kwargs)
        self.stop_requested = stop
        return result

    guard.StepGuard.check = alone


def forget(part: str) -> None:
    """A broken guard: a resume that does not restore one part of the state."""
    read = ckpt.read_torch_file

    def reading(path, *args):
        content = read(path, *args)
        if part == "optimizer":
            for moments in content["optimizer"]["state"].values():
                for tensor in moments.values():
                    tensor.zero_()
        elif part == "step":
            content["extra"]["step"] -= 1
        else:
            for name, tensor in content["state_dict"].items():
                if part in name:
                    tensor.zero_()
        return content

    ckpt.read_torch_file = reading


def _in_write(point: str, step: int) -> None:
    assert point in WRITE_POINTS, point
    save = ckpt.save_checkpoint

    def save_checkpoint(path, content, **fields):
        if fields["step"] == step:
            _arm_write(point)
        save(path, content, **fields)

    ckpt.save_checkpoint = save_checkpoint


def _arm_write(point: str) -> None:
    if point == "file opened":
        _after(tempfile, "mkstemp")
    elif point == "half written":
        save = torch.save
        torch.save = lambda content, file: save(content, _HalfFile(file, content))
    elif point == "before fsync":
        os.fsync = lambda handle: die()
    elif point == "before rename":
        os.replace = lambda *paths: die()
    elif point == "before the manifest":
        ckpt.write_manifest = lambda *args, **fields: die()
    elif point == "before the manifest's rename":
        write = ckpt.write_manifest

        def write_manifest(*args, **fields):
            os.replace = lambda *paths: die()
            write(*args, **fields)

        ckpt.write_manifest = write_manifest
    else:
        _after(pathlib.Path, "unlink")


def _after(where, name: str) -> None:
    """Die as soon as a function has done its work."""
    function = getattr(where, name)

    def wrapped(*args, **kwargs):
        function(*args, **kwargs)
        die()

    setattr(where, name, wrapped)


class _HalfFile:
    def __init__(self, file, content):
        self.file, self.left = file, ckpt.tensor_bytes(content) // 2

    def write(self, data) -> int:
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            die()
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
