"""What every measurement shares: alternating rounds, medians with their spread, the JSON file."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision

from moco.training.checkpoint import write_json_atomic


def alternate(jobs: Mapping[str, Callable[[int], object]], num_rounds: int) -> dict[str, list]:
    """Seconds of each job in each round; the order of the jobs turns by one from round to round.

    Args:
        jobs: name -> function of the round's number.
    Returns: {name: num_rounds seconds}.
    """
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            jobs[name](number)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(seconds: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict]:
    """For each name its median seconds, and how many times faster than `baseline` it is.

    Returns: {name: {"median_s", "speedup", "speedup_quartiles", "rounds"}}. The speed-up is the
        median of the ratios within each round, so what slows the machine slows both of a pair.
    """
    out = {}
    for name, own in seconds.items():
        ratios = [b / a for a, b in zip(own, seconds[baseline], strict=True)]
        quartiles = np.percentile(ratios, [25, 75]).tolist()
        out[name] = {
            "median_s": statistics.median(own),
            "speedup": statistics.median(ratios),
            "speedup_quartiles": [round(q, 3) for q in quartiles],
            "rounds": len(own),
        }
    return out


def table(compared: Mapping[str, dict], baseline: str) -> str:
    """`compare`'s result as a Markdown table."""
    lines = [
        f"| | median s | times faster than {baseline} | quartiles | rounds |",
        "|---|---|---|---|---|",
    ]
    for name, row in compared.items():
        low, high = row["speedup_quartiles"]
        lines.append(
            f"| {name} | {row['median_s']:.4f} | {row['speedup']:.2f} | {low:.2f} to {high:.2f} | "
            f"{row['rounds']} |"
        )
    return "\n".join(lines)


def write_results(path: Path, content: dict, versions: Mapping[str, str] | None = None) -> None:
    """Write one measurement as JSON, with the machine, the versions and the command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        path,
        {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                **(versions or {}),
            },
            **content,
        },
    )


def machine() -> dict[str, object]:
    """Processor, cores, threads and GPU, without anything that names the host."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
