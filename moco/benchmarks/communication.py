"""Bytes that a process receives in one training step: this project beside the reference's ways.

Real steps of MoCo run in several gloo processes. What is counted does not depend on the speed or
the load of the machine.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from moco.benchmarks.record import write_results
from moco.benchmarks.traffic import CountedTraffic, socket_bytes
from moco.cfgnode import CfgNode
from moco.child_processes import run_processes
from moco.config import load_pretrain_config
from moco.distributed import (
    ProcessInfo,
    all_gather_cat,
    batch_shuffle,
    batch_unshuffle,
    data_parallel,
    rank,
    world_size,
)
from moco.errors import ConfigError
from moco.methods import moco
from moco.process_group import leaving_group
from moco.seeding import torch_generator
from moco.shuffle import exchange_plan
from moco.training.checkpoint import read_json, write_json_atomic
from moco.training.optimizer import build_optimizer
from moco.training.step import train_step

IMAGES, KEYS, BUFFERS, GRADIENTS, FINDINGS = KINDS = (
    "images",
    "keys",
    "buffers",
    "gradients",
    "findings",
)
_WARM_UP = 2  # DistributedDataParallel arranges its buckets anew after the first step


@torch.no_grad()
def gather_all_shuffle(images_BCHW: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The reference's batch shuffle: every rank receives all images, and keeps its share."""
    gathered = all_gather_cat(images_BCHW)
    return gathered[permutation.view(world_size(), -1)[rank()].to(gathered.device)]


@torch.no_grad()
def gather_all_unshuffle(keys_BD: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The reference's way back."""
    return gather_all_shuffle(keys_BD, torch.argsort(permutation))


@dataclass(frozen=True)
class Options:
    """What a step consists of. batch: images of one process; queue: K; width: of the network."""

    arch: str = "resnet50"
    image_size: int = 224
    batch: int = 8
    queue: int = 65536
    width: float = 1.0
    steps: int = 4

    def config(self, num_processes: int, amp: bool = False) -> CfgNode:
        pairs = {
            "MODEL.ARCH": self.arch, "MODEL.WIDTH": self.width, "MOCO.QUEUE_SIZE": self.queue,
            "DATA.SIZE": self.image_size, "TRAIN.BATCH_SIZE": self.batch * num_processes,
            "TRAIN.AMP": amp,
        }  # fmt: skip
        return load_pretrain_config(None, [str(word) for pair in pairs.items() for word in pair])


@dataclass(frozen=True)
class Variant:
    """gathers: images and keys by gathering all; broadcasts: buffers before each forward."""

    gathers: bool = False
    broadcasts: bool = False
    amp: bool = False


PUBLISHED = Options(batch=32)  # MoCo on ImageNet, of one GPU
NUM_GPUS = (8, 64, 256)
VARIANTS = {
    "this project": Variant(),
    "this project, TRAIN.AMP": Variant(amp=True),
    "shuffle by gathering all": Variant(gathers=True),
    "as the reference": Variant(gathers=True, broadcasts=True),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes of what is sent: one image, one key, all gradients, all buffers of the method."""

    image: int
    key: int
    gradients: int
    buffers: int

    @classmethod
    def of(cls, options: Options, num_processes: int = 1) -> Sizes:
        """Raises: ConfigError where these options make no MoCo."""
        with torch.device("meta"):
            method = moco.MoCo.from_config(options.config(num_processes))
        return cls(
            image=3 * options.image_size**2 * 4,
            key=method.queue.shape[0] * 4,
            gradients=sum(p.numel() * 4 for p in method.parameters() if p.requires_grad),
            buffers=sum(buffer.nbytes for buffer in method.buffers()),
        )


def expected_bytes(variant: Variant, num_ranks: int, batch: int, sizes: Sizes) -> dict[str, float]:
    """kind -> bytes a rank (not rank 0) receives in a step, on average over permutations.

    All-to-all: of B wanted images each is held by another rank with probability (W - 1) / W.
    Gathering: the B images of each of the W - 1 others. Sums travel in a ring.
    """
    others = num_ranks - 1
    shuffled = batch * (others if variant.gathers else others / num_ranks)
    return {
        IMAGES: shuffled * sizes.image * (0.5 if variant.amp else 1),
        KEYS: (shuffled + batch * others) * sizes.key,  # the way back, and the queue's
        BUFFERS: sizes.buffers if variant.broadcasts else 0,
        GRADIENTS: 2 * others / num_ranks * sizes.gradients,
    }


@dataclass
class Measured:
    """Of one rank and one variant, bytes a step: counted by kind, and of its sockets in total.

    planned_images: bytes of images that the plans of these steps' permutations say.
    """

    counted: dict[str, float] = field(default_factory=dict)
    sockets: float | None = None
    planned_images: float = 0.0


def measure(options: Options, variant: Variant) -> Measured:
    """Run `options.steps` training steps in this process's group, after two to warm up."""
    cfg = options.config(world_size(), variant.amp)
    process = ProcessInfo(rank(), world_size(), rank(), torch.device("cpu"))
    torch.manual_seed(0)
    method = moco.MoCo.from_config(cfg)
    if variant.broadcasts:
        model = torch.nn.parallel.DistributedDataParallel(method)
    else:
        model = data_parallel(method, process)
    optimizer = build_optimizer(cfg, method)
    draws = torch.Generator().manual_seed(rank())
    size = (options.batch, 3, options.image_size, options.image_size)

    def step(number: int) -> None:
        views = torch.randint(0, 256, (2, *size), generator=draws, dtype=torch.uint8)
        train_step(
            model, method, optimizer, (views[0], views[1], torch.arange(options.batch)),
            step=number, lr=0.01, momentum=0.99, cfg=cfg, process=process, measure=False,
        )  # fmt: skip

    for number in range(_WARM_UP):
        step(number)
    traffic = CountedTraffic()
    with _counted_parts(traffic, variant.gathers):
        before = _quiet_socket_bytes()
        with traffic:
            for number in range(_WARM_UP, _WARM_UP + options.steps):
                step(number)
        after = _quiet_socket_bytes()
    measured = {kind: traffic.received[kind] / options.steps for kind in KINDS}
    sockets = None if before is None or after is None else (after - before) / options.steps
    return Measured(measured, sockets, _planned_images(options, variant))


@contextlib.contextmanager
def _counted_parts(traffic: CountedTraffic, gathers: bool):
    """MoCo's exchanges, each counted as what it carries; the reference's where `gathers`."""
    parts = {
        "batch_shuffle": (gather_all_shuffle if gathers else batch_shuffle, IMAGES),
        "batch_unshuffle": (gather_all_unshuffle if gathers else batch_unshuffle, KEYS),
        "all_gather_cat": (all_gather_cat, KEYS),
    }
    counted = {name: traffic.counted(*part) for name, part in parts.items()}
    with mock.patch.multiple(moco, **counted):
        yield


def _quiet_socket_bytes() -> int | None:
    """`socket_bytes` at a moment when no rank sends: between two barriers."""
    dist.barrier()
    received = socket_bytes()
    dist.barrier()
    return received


def _planned_images(options: Options, variant: Variant) -> float:
    """Bytes of images a step, from the permutations that the measured steps drew."""
    num_ranks, seed = world_size(), options.config(world_size()).SEED
    if variant.gathers:
        num_images = float(options.batch * (num_ranks - 1))
    else:
        num_images = 0.0
        for number in range(_WARM_UP, _WARM_UP + options.steps):
            generator = torch_generator(seed, "method-step", number)
            permutation = torch.randperm(options.batch * num_ranks, generator=generator)
            plan = exchange_plan(permutation, rank(), num_ranks)
            num_images += plan.num_from_others(rank()) / options.steps
    return num_images * 3 * options.image_size**2 * (2 if variant.amp else 4)


def _worker(number: int, num_processes: int, folder: str, options: Options) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=num_processes
    )
    with leaving_group():
        found = {name: asdict(measure(options, variant)) for name, variant in VARIANTS.items()}
        write_json_atomic(Path(folder) / f"{number}.json", found)


def measure_in_processes(num_processes: int, options: Options) -> list[dict[str, dict]]:
    """For each rank: variant -> `Measured` as a dictionary."""
    with tempfile.TemporaryDirectory() as folder:
        code = run_processes(_worker, num_processes, (num_processes, folder, options))
        if code:
            raise SystemExit(code)
        return [read_json(Path(folder) / f"{number}.json") for number in range(num_processes)]


def run(options: Options, *, processes: Sequence[int], output: Path) -> dict:
    """Measure with each number of processes, print three tables, write `output`.

    Raises: ConfigError before anything is started.
    """
    if min(processes) < 2:
        raise ConfigError(f"--processes {min(processes)}; allowed: 2 or more")
    sizes = Sizes.of(options, max(processes))
    ranks = {num: measure_in_processes(num, options) for num in processes}
    as_planned = all(
        found["counted"][IMAGES] == found["planned_images"]
        for variants in ranks.values()
        for rank_found in variants
        for found in rank_found.values()
    )
    published = {
        num: {
            name: expected_bytes(variant, num, PUBLISHED.batch, Sizes.of(PUBLISHED))
            for name, variant in VARIANTS.items()
        }
        for num in NUM_GPUS
    }
    print("MB a process other than rank 0 receives in a step: counted | formula (on average)")
    print(measured_table(ranks, options.batch, sizes))
    print(f"image bytes are those of the drawn permutations, on every process: {as_planned}\n")
    print("MB in total, of the last process: counted | arrived on its sockets")
    print(totals_table(ranks))
    print(f"\nMB by the formula: {PUBLISHED.arch}, {PUBLISHED.batch} images of 224 px a GPU")
    print(formula_table())
    result = {
        "options": asdict(options),
        "bytes": asdict(sizes),
        "image_bytes_as_planned": as_planned,
        "received_by_rank": ranks,
        "published_size_by_formula": published,
    }
    write_results(output, result)
    return result


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [list(map(str, head)), ["---"] * len(head), *([str(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mb(num_bytes: float) -> str:
    """Three digits or more, to be read beside each other."""
    mb = num_bytes / 1e6
    return f"{mb:,.0f}" if mb >= 100 or not mb else f"{mb:#.3g}"


# Table row -> the variant that shows it, and its kind.
ROWS = {
    "images, gathered by all (reference)": ("as the reference", IMAGES),
    "images, all-to-all": ("this project", IMAGES),
    "images, all-to-all in bf16 (TRAIN.AMP)": ("this project, TRAIN.AMP", IMAGES),
    "keys, gathered twice (reference)": ("as the reference", KEYS),
    "keys": ("this project", KEYS),
    "queue and other buffers (reference)": ("as the reference", BUFFERS),
    "queue and other buffers": ("this project", BUFFERS),
    "gradients": ("this project", GRADIENTS),
}


def measured_table(ranks: dict[int, list[dict]], batch: int, sizes: Sizes) -> str:
    """Counted bytes, the mean of all ranks but 0 (which sends the broadcasts), beside
    `expected_bytes`, as Markdown."""
    rows = []
    for row, (name, kind) in ROWS.items():
        cells = []
        for num, found in ranks.items():
            counted = statistics.fmean(each[name]["counted"][kind] for each in found[1:])
            formula = expected_bytes(VARIANTS[name], num, batch, sizes)[kind]
            cells.append(f"{_mb(counted)} | {_mb(formula)}")
        rows.append([row, *cells])
    head = [f"{num} processes: counted | formula" for num in ranks]
    table = _markdown(["", *head], rows).splitlines()
    table[1] = "|---" * (1 + 2 * len(ranks)) + "|"
    return "\n".join(table)


def totals_table(ranks: dict[int, list[dict]]) -> str:
    """All that a step brings to the last rank, and what arrived on its sockets."""
    rows = []
    for name in VARIANTS:
        cells = []
        for found in ranks.values():
            measured = found[-1][name]
            sockets = measured["sockets"]
            total = sum(measured["counted"].values())
            cells += [f"{total / 1e6:,.3f}"]
            cells += ["not told" if sockets is None else f"{sockets / 1e6:,.3f}"]
        rows.append([name, *cells])
    head = [text for num in ranks for text in (f"{num} processes: counted", "sockets")]
    return _markdown(["", *head], rows)


def formula_table() -> str:
    """The published training on more GPUs than a machine has, by the formula alone."""
    sizes, rows = Sizes.of(PUBLISHED), []
    for row, (name, kind) in ROWS.items():
        found = [
            expected_bytes(VARIANTS[name], num, PUBLISHED.batch, sizes)[kind] for num in NUM_GPUS
        ]
        rows.append([row, *map(_mb, found)])
    for name, variant in VARIANTS.items():
        totals = [
            sum(expected_bytes(variant, num, PUBLISHED.batch, sizes).values()) for num in NUM_GPUS
        ]
        if name != "shuffle by gathering all":
            rows.append([f"**in total, {name}**", *map(_mb, totals)])
    return _markdown(["MB in a step", *(f"{num} GPUs" for num in NUM_GPUS)], rows)
