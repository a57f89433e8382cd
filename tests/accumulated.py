"""Training steps whose batch is shared by processes and micro-batches in different ways."""

from __future__ import annotations

import torch
from tiny import method_config

from moco import distributed
from moco.distributed import ProcessInfo
from moco.methods import build_method
from moco.training.optimizer import build_optimizer
from moco.training.step import train_step

# Methods whose keys have no gradient; the rest refuses.
VARIANTS = ("moco", "moco_symmetric", "memory_bank", "moco_v3")
BATCH = 16
NUM_IMAGES = 40


def run(
    variant: str,
    *,
    parts: int,
    rank: int = 0,
    num: int = 1,
    num_steps: int = 4,
    double: bool = False,
    step_function=train_step,
    **changes,
):
    """Losses of each step, and what was learned: weights, queue, pointer or bank, momenta.

    Args:
        parts: TRAIN.ACCUMULATION_STEPS. rank, num: of the processes. double: in float64.
    """
    cfg = method_config(
        variant, TRAIN__BATCH_SIZE=BATCH, TRAIN__ACCUMULATION_STEPS=parts, MODEL__BN_SPLITS=1,
        MOCO__QUEUE_SIZE=3 * BATCH + 4, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    method = build_method(cfg, NUM_IMAGES)
    if double:
        method.double()
        for name in ("encoder_q", "encoder_k"):
            if hasattr(method, name):
                getattr(method, name).register_forward_pre_hook(lambda m, args: args[0].double())
    process = ProcessInfo(rank, num, 0, torch.device("cpu"))
    model = distributed.data_parallel(method, process) if num > 1 else method
    optimizer = build_optimizer(cfg, method)
    losses, own = [], slice(rank * BATCH // num, (rank + 1) * BATCH // num)
    for step in range(num_steps):
        draws = torch.Generator().manual_seed(step)
        views = torch.randint(256, (2, BATCH, 3, 16, 16), generator=draws, dtype=torch.uint8)
        index = torch.randperm(NUM_IMAGES, generator=draws)[:BATCH]
        result = step_function(
            model, method, optimizer, (*views[:, own], index[own]), step=step, lr=0.05,
            momentum=0.9, cfg=cfg, process=process,
        )  # fmt: skip
        losses.append(result.loss)
    learned = {n: t for n, t in method.state_dict().items() if "running" not in n}
    learned = {n: t for n, t in learned.items() if "num_batches" not in n}
    for number, entry in optimizer.state_dict()["state"].items():
        learned[f"momentum of {number}"] = entry["momentum_buffer"]
    return torch.stack(losses), {n: t.detach().clone() for n, t in learned.items()}


def largest_difference(a: dict, b: dict) -> float:
    """Over all tensors, relative to the largest element of each."""
    assert a.keys() == b.keys()
    scale = {n: max(t.abs().max().item(), 1e-12) for n, t in a.items()}
    return max((a[n].double() - b[n].double()).abs().max().item() / scale[n] for n in a)
