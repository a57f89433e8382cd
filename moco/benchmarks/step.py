"""Seconds and memory of a training step, beside the reference's, and its share of the limit.

Sides take turns on the same random images, each in its own process (`step_sides`). The limit is
the machine's matrix peak, measured in the same run; the operations of a step are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from moco.benchmarks import step_sides
from moco.benchmarks.peak import matrix_peak
from moco.benchmarks.record import alternate, compare, table, write_results
from moco.benchmarks.step_sides import FAST, FLOAT32, LIGHTLY, PLAIN, REFERENCE, SideProcess
from moco.cfgnode import CfgNode
from moco.config import load_pretrain_config
from moco.errors import ConfigError
from moco.models.encoders import build_encoders, encoder_options

_R18 = ("MODEL.ARCH", "resnet18", "DATA.SIZE", "32", "TRAIN.BATCH_SIZE", "64")
_CIFAR = (
    "MODEL.STEM", "cifar", "MODEL.HEAD", "linear", "MODEL.BN_SPLITS", "8",
    "MOCO.QUEUE_SIZE", "4096", "MOCO.TEMPERATURE", "0.1", "MOCO.MOMENTUM", "0.99",
)  # fmt: skip
# name -> KEY VALUE pairs; what they do not name is MoCo v2's default (K 65536).
CASES: dict[str, tuple[str, ...]] = {
    "r50_112": ("DATA.SIZE", "112", "TRAIN.BATCH_SIZE", "16"),
    "r50_224": ("DATA.SIZE", "224", "TRAIN.BATCH_SIZE", "8"),
    "r18_32": _R18,
    "r18_cifar": (*_R18, *_CIFAR),
    "r50_224_gpu": ("DATA.SIZE", "224", "TRAIN.BATCH_SIZE", "256"),
}
DEFAULT_CASES = ("r50_112", "r50_224", "r18_32", "r18_cifar")
DEFAULT_SIDES = (REFERENCE, FLOAT32, FAST)
SIDES = (REFERENCE, PLAIN, FLOAT32, FAST, LIGHTLY)


@dataclass(frozen=True)
class Options:
    """What is measured.

    cases: names of CASES. sides: the first is what the others are compared with. overrides: KEY
    VALUE pairs for all cases and sides. threads: None for torch's choice. num_profiled: steps of
    each side that are profiled after the rounds. peak_side: see `matrix_peak`.
    """

    cases: Sequence[str] = DEFAULT_CASES
    sides: Sequence[str] = DEFAULT_SIDES
    overrides: Sequence[str] = ()
    num_rounds: int = 9
    device: str = "cpu"
    threads: int | None = None
    num_profiled: int = 0
    peak_side: int | None = None


def run(options: Options, *, output: Path) -> None:
    """Measure, print tables, write JSON.

    Raises: ConfigError for fewer than 3 rounds, unknown names, or what a side refuses.
    """
    _check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    peaks = measure_peaks(options)
    content: dict = {"device": options.device, "peak_flops_per_s": peaks, "cases": {}}
    for case in options.cases:
        words = [*CASES[case], *options.overrides]
        content["cases"][case] = result = measure_case(words, options, peaks)
        print(f"\n**{case}**, {options.device}, {result['threads']} thread(s), "
              f"{result['batch']} images of {result['size']} pixels, "
              f"{result['flops'] / 1e9:.1f} GFLOP\n")  # fmt: skip
        print(table(result["sides"], result["baseline"]))
        print(f"\n{limits_table(result)}")
        for side, groups in result.get("profile", {}).items():
            print(f"\n{profile_table(side, groups)}")
    write_results(output, content)
    print(f"\nwritten: {output}")


def measure_peaks(options: Options) -> dict[str, dict[str, float]]:
    """{precision: `matrix_peak`} of this machine."""
    device = torch.device(options.device)
    peaks = {
        str(dtype).removeprefix("torch."): matrix_peak(dtype, device, side=options.peak_side)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for name, peak in peaks.items():
        print(f"peak in {name}: {peak['best'] / 1e9:.0f} GFLOP/s (matrix product "
              f"{peak['matrix product'] / 1e9:.0f}, 3x3 convolution "
              f"{peak['convolution'] / 1e9:.0f})", flush=True)  # fmt: skip
    return peaks


def measure_case(
    words: list[str], options: Options, peaks: Mapping[str, Mapping[str, float]]
) -> dict:
    """All sides of one case: `compare`'s rows with images/s, share of the peak and memory."""
    cfg = load_pretrain_config(None, words)
    flops = step_flops(cfg)
    sides: dict[str, SideProcess] = {}
    profiles: dict[str, dict[str, float]] = {}
    try:
        for name in options.sides:
            reason = step_sides.unavailable_reason(name)
            if reason:
                print(f"{name} is left out: {reason}", flush=True)
                continue
            sides[name] = SideProcess(name, words, options.device, options.threads)
            print(f"{name}: {sides[name].facts['text']}", flush=True)
        jobs = {name: side.step for name, side in sides.items()}
        baseline = next(iter(jobs))
        rows = compare(alternate(jobs, options.num_rounds), baseline)
        for name, side in sides.items():
            row = rows[name]
            precision = "bfloat16" if side.facts["bfloat16"] else "float32"
            rate = flops / row["median_s"]
            row |= {
                "images_per_s": cfg.TRAIN.BATCH_SIZE / row["median_s"],
                "precision": precision,
                "share_of_peak": rate / peaks[precision]["best"],
                "peak_memory_bytes": side.peak_bytes(),
                "is": side.facts["text"],
            }
        for name, side in sides.items():
            found = [side.profile(options.num_rounds + i) for i in range(options.num_profiled)]
            if found:
                profiles[name] = min(found, key=lambda groups: sum(groups.values()))
        threads = sides[baseline].facts["threads"]
    finally:
        for side in sides.values():
            side.close()
    result = {
        "words": words,
        "batch": cfg.TRAIN.BATCH_SIZE,
        "size": cfg.DATA.SIZE,
        "threads": threads,
        "flops": flops,
        "baseline": baseline,
        "sides": rows,
    }
    return {**result, "profile": profiles} if profiles else result


def step_flops(cfg: CfgNode) -> int:
    """Operations of one step of METHOD moco: of convolutions and matrix products, two for each
    multiplication with its addition. Counted on the meta device, where tensors have no content."""
    with torch.device("meta"):
        query, key = build_encoders(2, **encoder_options(cfg))
        size = cfg.DATA.SIZE
        images = torch.empty(cfg.TRAIN.BATCH_SIZE, 3, size, size)
        with FlopCounterMode(display=False) as counter:
            query(images).sum().backward()
            with torch.no_grad():
                key(images)
    # The logits and the gradient to the queries read the queue once each.
    logits = 2 * 2 * cfg.TRAIN.BATCH_SIZE * cfg.MOCO.QUEUE_SIZE * cfg.MODEL.DIM
    return counter.get_total_flops() + logits


def limits_table(result: Mapping) -> str:
    """Images per second, share of the matrix peak and memory, as Markdown."""
    lines = [
        "| | images/s | precision | share of its peak | peak memory MiB |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["sides"].items():
        lines.append(
            f"| {name} | {row['images_per_s']:.1f} | {row['precision']} | "
            f"{row['share_of_peak']:.0%} | {row['peak_memory_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def profile_table(side: str, groups: Mapping[str, float]) -> str:
    """`SideProcess.profile`'s result as Markdown."""
    total = sum(groups.values())
    lines = [f"| {side} | ms | share |", "|---|---|---|"]
    lines += [f"| {name} | {s * 1e3:.1f} | {s / total:.1%} |" for name, s in groups.items()]
    return "\n".join(lines)


def _check(options: Options) -> None:
    if options.num_rounds < 3:
        raise ConfigError(f"--rounds {options.num_rounds}: at least 3 are needed for quartiles")
    for flag, given, known in (
        ("--cases", options.cases, CASES), ("--sides", options.sides, SIDES),
    ):  # fmt: skip
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise ConfigError(f"{flag} {' '.join(unknown)}: allowed are {', '.join(known)}")
