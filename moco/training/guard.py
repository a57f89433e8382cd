"""Stops all processes at one and the same step, before its update, where NaN or Inf turns up.

Each process looks at its own loss, keys and the gradient; one small message a step shares what was
found (and requests to stop, such as a signal). On a CPU it is read at once. Reading it on a GPU
would make the process wait until the GPU has caught up, so there the device itself leaves out the
update, and the process reads one step later, when the next update is about to be launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from moco.distributed import ProcessInfo, world_size

# As a message names them; a step is called by the first that applies.
FINDINGS = ("the loss is", "keys are", "the gradient is")


@dataclass(frozen=True)
class Evidence:
    """What is kept of a step until its findings are read, to explain them.

    step: from 0; lr: its learning rate; loss: of this process; keys_VBD: see `StepOutput`;
    index_B: its images; redo: computes the step's gradients again, of this process alone.
    """

    step: int
    lr: float
    loss: torch.Tensor
    keys_VBD: torch.Tensor | None
    index_B: torch.Tensor
    redo: Callable[[], None]


Report = Callable[[Evidence, frozenset[str]], NoReturn]


class StepGuard:
    """Shares findings and requests to stop between all processes.

    Args:
        report: raises NonFiniteError; called on all processes, with the evidence of this one and
            which of FINDINGS are not finite on any of them.
        delayed: read a step's findings when the next step's are given. The optimizer must then
            leave out an update where its `found_inf` is 1, as torch's fused ones do.
    """

    def __init__(self, process: ProcessInfo, report: Report, *, delayed: bool = False):
        self.device, self.report, self.delayed = process.device, report, delayed
        self.stop_requested = False
        self._pending: _Pending | None = None

    def check(
        self,
        evidence: Evidence,
        gradient_norm: torch.Tensor | None,
        *,
        stop: bool,
        wait: bool = False,
    ) -> torch.Tensor | None:
        """Share what a step found, after its backward and before its update.

        Args:
            gradient_norm: None where the loss says enough.
            stop: whether this process wants to stop; `stop_requested` becomes true on all of them,
                at the same step, once it has been read.
            wait: read at once, also where `delayed`.
        Returns: None where the findings were read and are good; else a boolean scalar on the
            device, true where this update must be left out.
        Raises: what `report` raises, on all processes at the same step.
        """
        self.settle()
        good = [evidence.loss, evidence.keys_VBD, gradient_norm]
        bad = [_not_finite(value, self.device) for value in good]
        flags = torch.stack([*bad, torch.full((), stop, dtype=torch.bool, device=self.device)])
        flags = flags.to(torch.uint8)
        if world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._pending = _Pending(evidence, flags)
        if wait or not self.delayed:
            self.settle()
            return None
        return flags[:-1].bool().any()

    def settle(self) -> None:
        """Read the findings that were not read yet. Raises: what `report` raises."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        *bad, stop = pending.read()
        self.stop_requested |= bool(stop)
        if any(bad):
            named = frozenset(n for n, flag in zip(FINDINGS, bad, strict=True) if flag)
            self.report(pending.evidence, named)
            raise AssertionError("the report of a step that is not finite must raise")


def skips_updates(optimizer: torch.optim.Optimizer, process: ProcessInfo) -> bool:
    """Whether the device can leave out an update by itself: on a GPU, by a fused optimizer."""
    # The attribute torch.amp.GradScaler goes by.
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return process.device.type == "cuda" and fused


def _not_finite(value: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if value is None:
        return torch.zeros((), dtype=torch.bool, device=device)
    return ~torch.isfinite(value.detach()).all()


class _Pending:
    """Flags on their way to this process's memory."""

    def __init__(self, evidence: Evidence, flags: torch.Tensor):
        self.evidence, self.flags, self.event = evidence, flags, None
        if flags.is_cuda:
            self.flags = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self.flags.copy_(flags, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.flags.tolist()
