"""Detection runs that are interrupted, run in several processes, and compared bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

import numpy as np
import torch

from detection.engines.progress import Progress
from moco import distributed
from moco.training.checkpoint import read_torch_file

# A detector by kernels, of tiny widths that they have: multiples of 32 channels.
KERNELS = {
    "MODEL__CHANNELS_LAST": True,
    "MODEL__COMPILE": "kernels",
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 32,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 32,
}


def stop_at(monkeypatch, iteration: int, how: Callable[[], None]) -> None:
    """Interrupt the training of one session while it reports `iteration`."""
    report = Progress.report

    def interrupting(self, now, losses, lr):
        report(self, now, losses, lr)
        if now == iteration:
            how()

    monkeypatch.setattr(Progress, "report", interrupting)


def send_sigterm() -> None:
    """To all processes of the run, as a batch system does."""
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise KeyboardInterrupt


def final_state(run) -> dict:
    return read_torch_file(run.output_dir / "model_final.pth")


def differing(a, b, where: str = "") -> list[str]:
    """Paths at which two nested states are not bit for bit the same; keys in another order too."""
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where} keys"]
        return [d for k in a for d in differing(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where} length"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differing(x, y, f"{where}.{i}")]
    same = torch.equal(a, b) if torch.is_tensor(a) else np.array_equal(a, b)
    return [] if same else [where]


def in_two_ranks(work: Callable[..., None], *args, timeout_s: float = 90) -> None:
    """`work(*args)` in two forked processes with torchrun's variables; both must end well."""
    context = torch.multiprocessing.get_context("fork")
    port = distributed._free_port()
    workers = []
    for rank in range(2):
        variables = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_PORT=port)
        variables = {k: str(v) for k, v in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}

        def start(variables=variables):
            os.environ.update(variables)
            work(*args)

        workers.append(context.Process(target=start))
        workers[-1].start()
    for worker in workers:
        worker.join(timeout_s)
        assert worker.exitcode == 0
