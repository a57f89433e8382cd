"""The most memory this process has held."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes.

    On Linux that of its own pages: what getrusage says there may be the parent's, whose peak a new
    process takes over.
    """
    if _STATUS.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` start from what is held now, where the system can do that (Linux)."""
    if _CLEAR.exists():
        _CLEAR.write_text("5", encoding="utf-8")


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Peak bytes of this process: resident, and allocated on its GPU (None without one)."""
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_rss_bytes": peak_rss_bytes(), "peak_gpu_bytes": gpu}
