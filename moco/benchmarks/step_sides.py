"""The implementations of a training step that are measured side by side, each in its own process.

A process of its own keeps apart what is a process's: memory, its allocator's settings, autotuned
kernels. It waits at a pipe between its turns, so it costs the others nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.nn as nn

from moco import distributed
from moco.benchmarks import step_profile
from moco.benchmarks.reference_step import ReferenceStep, reference_networks
from moco.cfgnode import CfgNode
from moco.child_processes import end_with_parent
from moco.config import load_pretrain_config
from moco.data.augment import normalize
from moco.devices import set_arithmetic
from moco.distributed import ProcessInfo
from moco.errors import ConfigError, MocoError
from moco.evaluation.memory import peak_memory, reset_peak_rss
from moco.methods import build_method
from moco.seeding import derive_seed
from moco.training.acceleration import accelerate_, resolve
from moco.training.optimizer import build_optimizer
from moco.training.step import train_step

Step = Callable[[int], None]
_WARM_UP = 2

REFERENCE, PLAIN, FLOAT32, FAST = "reference", "TRAIN.REFERENCE", "float32", "fast"
LIGHTLY = "lightly"
WORDS = {  # KEY VALUE pairs that make a side
    REFERENCE: (),
    PLAIN: ("TRAIN.REFERENCE", "True"),
    FLOAT32: ("TRAIN.AMP", "False"),
    FAST: (),
    LIGHTLY: (),
}
DESCRIPTIONS = {
    REFERENCE: "a step as the public code does it (moco/benchmarks/reference_step.py)",
    PLAIN: "this project in its parity mode",
    FLOAT32: "this project in float32, with what else is fast on this machine",
    FAST: "this project as it is by default on this machine",
    LIGHTLY: "lightly's MoCo example, in float32",
}


def unavailable_reason(side: str) -> str | None:
    """Why a side cannot be measured here, or None."""
    if side == LIGHTLY and importlib.util.find_spec("lightly") is None:
        return "lightly is not installed (pip install lightly)"
    return None


class SideProcess:
    """One side of one case, in a process of its own.

    Args:
        words: KEY VALUE pairs of the case. threads: of a CPU step; None for torch's choice.
    Raises: ConfigError where the side refuses the configuration.
    """

    def __init__(self, side: str, words: list[str], device: str, threads: int | None):
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        args = (child, side, words, device, threads)
        self._process = context.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        child.close()
        self.facts = self._ask("facts")

    def step(self, number: int) -> None:
        """One step, finished on the device when this returns."""
        self._ask("step", number)

    def profile(self, number: int) -> dict[str, float]:
        """Seconds of one step by groups of operations."""
        return self._ask("profile", number)

    def peak_bytes(self) -> int:
        """Peak memory of the steps beyond what the process held before it built anything."""
        return self._ask("peak")

    def close(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._pipe.send(("stop",))
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, *message):
        self._pipe.send(message)
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ConfigError(
                f"side {self.side!r}: its process ended with code {self._process.exitcode} "
                "(-9: no memory is left, choose a smaller TRAIN.BATCH_SIZE; else see above)"
            ) from None
        if kind == "refused":
            raise ConfigError(f"side {self.side!r}: {content}")
        return content


def _serve(pipe: Connection, side: str, words: list[str], device: str, threads: int | None) -> None:
    end_with_parent()
    try:
        _serve_steps(pipe, side, words, device, threads)
    except (MocoError, torch.OutOfMemoryError) as error:
        pipe.recv()
        pipe.send(("refused", " ".join(str(error).split())))


def _serve_steps(pipe: Connection, side: str, words, device, threads) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    cfg = load_pretrain_config(None, [*words, *WORDS[side]])
    if side in (REFERENCE, LIGHTLY):
        # Without set-up: how memory is freed is the reference's, the system's default.
        process = ProcessInfo(0, 1, 0, torch.device(device))
    else:
        process = distributed.setup_process(device)
    reset_peak_rss()
    before = _peak(process.device)
    torch.manual_seed(derive_seed(cfg.SEED, "init"))
    set_arithmetic(process.device, tf32=cfg.TRAIN.TF32)  # the same for all sides
    step, facts = _BUILDERS[side](cfg, process)
    for number in range(_WARM_UP):  # compiles, tunes and allocates
        step(number)
    while (message := pipe.recv())[0] != "stop":
        kind, *args = message
        if kind == "facts":
            answer = {**facts, "threads": torch.get_num_threads()}
        elif kind == "peak":
            answer = _peak(process.device) - before
        else:
            work = lambda number=args[0]: step(_WARM_UP + number)  # noqa: E731
            answer = work() if kind == "step" else step_profile.profile(work, process.device)
        pipe.send(("done", answer))


def _peak(device: torch.device) -> int:
    memory = peak_memory(device)
    return memory["peak_gpu_bytes"] if device.type == "cuda" else memory["peak_rss_bytes"]


def _ours(cfg: CfgNode, process: ProcessInfo) -> tuple[Step, dict]:
    resolved = resolve(cfg, process.device)
    cfg = resolved.cfg
    started = time.monotonic()
    method = build_method(cfg, num_images=1_281_167).to(process.device).train()
    accelerate_(method, cfg)
    optimizer = build_optimizer(cfg, method)
    batch = _random_batch(cfg)
    facts = {"text": resolved.text, "bfloat16": cfg.TRAIN.AMP}
    facts["build_s"] = round(time.monotonic() - started, 2)
    if process.device.type == "cuda":
        batch = [part.pin_memory() for part in batch]

    def step(number: int) -> None:
        train_step(
            method, method, optimizer, batch, step=number, lr=cfg.TRAIN.LR,
            momentum=cfg.MOCO.MOMENTUM, cfg=cfg, process=process, measure=False,
        )  # fmt: skip
        _wait(process.device)

    return step, facts


def _reference(cfg: CfgNode, process: ProcessInfo) -> tuple[Step, dict]:
    _require_moco(cfg)
    model = ReferenceStep(cfg).to(process.device).train()
    views = _normalised_views(cfg, process.device)

    def step(number: int) -> None:
        model.step(*views, momentum=cfg.MOCO.MOMENTUM)
        _wait(process.device)

    return step, {"text": DESCRIPTIONS[REFERENCE], "bfloat16": False}


def _lightly(cfg: CfgNode, process: ProcessInfo) -> tuple[Step, dict]:
    """The example of lightly's documentation: its head, memory bank and moving average."""
    import lightly
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import (
        batch_shuffle,
        batch_unshuffle,
        deactivate_requires_grad,
        update_momentum,
    )

    _require_moco(cfg)
    networks = []
    for backbone in reference_networks(cfg):
        dim = backbone.fc[0].in_features if cfg.MODEL.HEAD == "mlp" else backbone.fc.in_features
        backbone.fc = nn.Identity()
        networks.append((backbone, MoCoProjectionHead(dim, dim, cfg.MODEL.DIM)))
    (backbone, head), (backbone_k, head_k) = networks
    for query, key in ((backbone, backbone_k), (head, head_k)):
        key.load_state_dict(query.state_dict())
        deactivate_requires_grad(key)
    bank = (cfg.MOCO.QUEUE_SIZE, cfg.MODEL.DIM)
    loss = NTXentLoss(cfg.MOCO.TEMPERATURE, memory_bank_size=bank)
    everything = nn.ModuleList([backbone, head, backbone_k, head_k, loss]).to(process.device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, cfg.TRAIN.LR, 0.9, weight_decay=1e-4)
    view_q, view_k = _normalised_views(cfg, process.device)
    everything.train()

    def step(number: int) -> None:
        update_momentum(backbone, backbone_k, cfg.MOCO.MOMENTUM)
        update_momentum(head, head_k, cfg.MOCO.MOMENTUM)
        queries = head(backbone(view_q).flatten(1))
        with torch.no_grad():
            shuffled, order = batch_shuffle(view_k)
            keys = batch_unshuffle(head_k(backbone_k(shuffled).flatten(1)), order)
        value = loss(queries, keys.detach())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        _wait(process.device)

    return step, {"text": f"lightly {lightly.__version__}", "bfloat16": False}


_BUILDERS = {
    REFERENCE: _reference, PLAIN: _ours, FLOAT32: _ours, FAST: _ours, LIGHTLY: _lightly,
}  # fmt: skip


def _require_moco(cfg: CfgNode) -> None:
    if cfg.METHOD != "moco":
        raise ConfigError(f"METHOD is {cfg.METHOD!r}; this side has moco only")


def _random_batch(cfg: CfgNode) -> list[torch.Tensor]:
    """Two views, uint8, and numbers: as the loader gives them."""
    shape = (2, cfg.TRAIN.BATCH_SIZE, 3, cfg.DATA.SIZE, cfg.DATA.SIZE)
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return [views[0], views[1], torch.arange(cfg.TRAIN.BATCH_SIZE)]


def _normalised_views(cfg: CfgNode, device: torch.device) -> list[torch.Tensor]:
    """The same views as the reference's loader gives them: float32, already on the device."""
    views = _random_batch(cfg)[:2]
    return [normalize(view.to(device), cfg.DATA.MEAN, cfg.DATA.STD) for view in views]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
