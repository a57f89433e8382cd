"""R22: over 2,000 steps nothing grows, and at the end everything is given back."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from pretrain_runs import make_images
from processes import SERVER

from moco.data.images import find_images
from moco.training.progress import JsonLog, TensorBoardLog
from moco.training.trainer import Trainer

pytestmark = pytest.mark.faults
STEPS, CONTROL_STEPS, EVERY, LOG_PERIOD = 2_000, 400, 20, 4
STEPS_PER_EPOCH = 8
# What may be added a step, from the second quarter of the run to the last. Bytes that malloc gave
# out and Python's objects are exact; resident memory moves by whole pages.
ALLOWED = {"malloc_bytes": 512, "python_blocks": 1, "worker_bytes": 2048, "files": 0.01,
           "children": 0.01, "threads": 0.01}  # fmt: skip


class _Mallinfo2(ctypes.Structure):
    """glibc's, malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]  # fmt: skip


def malloc_bytes() -> int:
    """Bytes in use of what malloc manages; those resident where the C library does not say."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return resident_bytes("self")
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident_bytes(pid: int | str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return 0


def measure() -> dict[str, float]:
    gc.collect()
    children = multiprocessing.active_children()
    return {
        "malloc_bytes": malloc_bytes(),
        "python_blocks": sys.getallocatedblocks(),
        "worker_bytes": sum(resident_bytes(child.pid) for child in children),
        "files": len(os.listdir("/proc/self/fd")),
        "children": len(children),
        "threads": threading.active_count(),
    }


class Watch:
    """An observer that measures now and then, and in a control leaks something in each step."""

    def __init__(self, leak: str):
        self.leak, self.leaked, self.found = leak, [], []

    def on_step(self, record) -> None:
        for _ in range(LOG_PERIOD):  # steps since the last record
            if self.leak == "tensor":
                self.leaked.append(torch.zeros(1024))  # 4 kB
            elif self.leak == "file" and len(self.leaked) < 900:  # a process may have 1,024
                self.leaked.append(os.open(os.devnull, os.O_RDONLY))
            elif self.leak == "object":
                self.leaked.append([{} for _ in range(10)])
        if record.step % EVERY == 0:
            self.found.append(measure())

    def on_epoch(self, record) -> None: ...


def _train(folder: str, num_steps: int, leak: str) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    folder = Path(folder)
    cfg = tiny.config(
        TRAIN__BATCH_SIZE=4, TRAIN__EPOCHS=num_steps // STEPS_PER_EPOCH, DATA__NUM_WORKERS=2,
        DATA__SIZE=8, KNN__PERIOD=0, CHECKPOINT__PERIOD=50, LOG__PERIOD=LOG_PERIOD,
    )  # fmt: skip
    trainer = Trainer(cfg, find_images(folder / "images"), folder / "run", tiny.alone(),
                      say=lambda line: None)  # fmt: skip
    (folder / "run").mkdir(exist_ok=True)
    gc.freeze()  # what exists now need not be looked through at each measurement
    multiprocessing.RawValue("i")  # Python keeps the file of its shared memory, once a process
    before, watch = measure(), Watch(leak)
    observers = [watch, JsonLog(folder / "run/log.jsonl", 0)]
    if leak != "writer":
        observers.append(TensorBoardLog(folder / "run/tensorboard", 0))
    else:  # it is never closed
        watch.leaked.append(TensorBoardLog(folder / "run/tensorboard", 0))
    code = trainer.train(observers)
    for observer in observers[1:]:
        observer.close()
    after = measure()
    result = {"code": code, "before": before, "found": watch.found, "after": after}
    (folder / "result.json").write_text(json.dumps(result))


def run(folder: Path, num_steps: int, leak: str = "") -> dict:
    (folder / "images").mkdir()
    make_images(folder / "images", 4 * STEPS_PER_EPOCH)
    process = SERVER.Process(target=_train, args=(str(folder), num_steps, leak))
    process.start()
    process.join(400)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
    return json.loads((folder / "result.json").read_text())


def growth(found: list[dict]) -> dict[str, float]:
    """What each figure gains a step, from the second quarter to the last."""
    quarter = len(found) // 4
    second, last = found[quarter : 2 * quarter], found[-quarter:]
    steps = (len(found) - 2 * quarter) * EVERY
    return {
        name: (statistics.median(f[name] for f in last)
               - statistics.median(f[name] for f in second)) / steps
        for name in ALLOWED
    }  # fmt: skip


def problems(result: dict, num_steps: int) -> list[str]:
    """What grew, and what was not given back."""
    assert result["code"] == 0 and len(result["found"]) == num_steps // EVERY
    gained = growth(result["found"])
    print(gained, result["before"], result["after"])
    names = [f"{name} grows" for name in ALLOWED if gained[name] > ALLOWED[name]]
    kept = [n for n in ("files", "children", "threads") if result["after"][n] > result["before"][n]]
    return names + [f"{name} kept" for name in kept]


def test_nothing_grows_and_all_is_given_back(tmp_path, long, observed):
    num_steps = 5 * STEPS if long else STEPS
    result = run(tmp_path, num_steps)
    assert max(found["children"] for found in result["found"]) == 2  # the workers were there
    bad = problems(result, num_steps)
    observed("R22", 2 * len(ALLOWED) - 3 - len(bad), 2 * len(ALLOWED) - 3)


@pytest.mark.parametrize(
    "leak, name, a_step", [("tensor", "malloc_bytes", 4096), ("object", "python_blocks", 11),
                           ("file", "files", 1)],
)  # fmt: skip
def test_control_a_leak_is_found(tmp_path, leak, name, a_step, observed):
    result = run(tmp_path, CONTROL_STEPS, leak)
    # All of it: so short a run also has the growth of its beginning.
    found = f"{name} grows" in problems(result, CONTROL_STEPS)
    observed("R22", int(found and growth(result["found"])[name] > 0.9 * a_step), 1, control=True)


def test_control_a_writer_that_is_not_closed_is_found(tmp_path, observed):
    found = problems(run(tmp_path, CONTROL_STEPS, "writer"), CONTROL_STEPS)
    observed("R22", int("threads kept" in found), 1, control=True)
