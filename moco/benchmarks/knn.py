"""Memory and time of a neighbour search, on random features: computed and measured.

Each search runs in a process of its own, whose peak memory is compared with what it held before.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from moco.benchmarks.record import write_results
from moco.child_processes import run_processes
from moco.evaluation.memory import peak_rss_bytes, reset_peak_rss
from moco.evaluation.neighbours import BLOCK, NeighbourSearch, memory_plan

IMAGENET = {"num_train": 1_281_167, "num_test": 50_000, "width": 2048, "k": 200}


@dataclass(frozen=True)
class Sizes:
    """Of one search: training and test samples, features each, neighbours."""

    num_train: int
    num_test: int
    width: int
    k: int


def _rows(seed: int, num: int, width: int) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def in_blocks(sizes: Sizes, dtype: torch.dtype) -> None:
    """As tools/evaluate_knn.py does: training features come in blocks and are not kept."""
    search = NeighbourSearch(_rows(0, sizes.num_test, sizes.width), sizes.k, dtype=dtype)
    for first in range(0, sizes.num_train, BLOCK):
        num = min(BLOCK, sizes.num_train - first)
        search.add(_rows(1 + first, num, sizes.width), first)


def all_at_once(sizes: Sizes, dtype: torch.dtype) -> None:
    """With all training features in memory, one product for each 256 test samples."""
    train = torch.empty(sizes.num_train, sizes.width, dtype=dtype)
    for first in range(0, sizes.num_train, BLOCK):
        num = min(BLOCK, sizes.num_train - first)
        train[first : first + num] = F.normalize(_rows(1 + first, num, sizes.width), dim=1)
    test = F.normalize(_rows(0, sizes.num_test, sizes.width), dim=1).to(dtype)
    for rows in test.split(256):
        (rows @ train.T).topk(sizes.k, dim=1)


SEARCHES = {"in blocks": in_blocks, "all at once": all_at_once}


def _measure(rank: int, name: str, sizes: Sizes, dtype: torch.dtype, threads: int, queue) -> None:
    torch.set_num_threads(threads)
    in_blocks(Sizes(64, 8, 16, 4), dtype)  # what any first call allocates
    reset_peak_rss()
    before, started = peak_rss_bytes(), time.perf_counter()
    SEARCHES[name](sizes, dtype)
    queue.put((peak_rss_bytes() - before, time.perf_counter() - started))


def measure(name: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[int, float]:
    """(bytes, seconds) of one search in a fresh process."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    args = (name, sizes, dtype, torch.get_num_threads(), queue)
    if code := run_processes(_measure, 1, args):
        raise SystemExit(code)
    return queue.get()


def run(sizes: Sizes, output: Path) -> dict:
    """Print and write the table: computed and measured bytes, and ImageNet's computed."""
    rows = {}
    for name in SEARCHES:
        measured, seconds = measure(name, sizes)
        rows[name] = {"measured_bytes": measured, "seconds": round(seconds, 2)}
    whole = sizes.num_train * sizes.width * 4
    rows["in blocks"]["computed_bytes"] = sum(memory_plan(**asdict(sizes)).values())
    rows["all at once"]["computed_bytes"] = whole
    imagenet = {
        dtype: sum(memory_plan(**IMAGENET, dtype=getattr(torch, dtype)).values())
        for dtype in ("float32", "float16")
    }
    print("| search | computed MiB | measured MiB | seconds |\n|---|---|---|---|")
    for name, row in rows.items():
        mib = [row[key] / 2**20 for key in ("computed_bytes", "measured_bytes")]
        print(f"| {name} | {mib[0]:,.0f} | {mib[1]:,.0f} | {row['seconds']:.1f} |")
    print(
        f"ImageNet, 1,281,167 x 2048: {imagenet['float32'] / 2**20:,.0f} MiB in blocks (float16 "
        f"{imagenet['float16'] / 2**20:,.0f}), all features at once "
        f"{1_281_167 * 2048 * 4 / 2**20:,.0f} MiB"
    )
    results = {"sizes": asdict(sizes), "searches": rows, "imagenet_computed_bytes": imagenet}
    write_results(output, results)
    return results
