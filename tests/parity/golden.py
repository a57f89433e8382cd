"""Golden arrays: what Detectron2 computed, small enough to commit; and the comparison with it.

Of every tensor a golden file keeps its shape, a digest of all its bytes (the bitwise comparison),
its largest element, its sum weighted by position, and the elements themselves: all of them where
there are few, else some from all over it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-5
_NUM_WHOLE = 64  # tensors up to this size are kept whole
_NUM_SAMPLED = {"gradient": 4, "weight": 4, "statistics": 4, "momentum": 4}  # elsewhere 16


@dataclass(frozen=True)
class Row:
    """One quantity. `difference`: of its worst element, relative to the largest element; inf where
    a shape or a discrete value differs. `bitwise`: all bytes are equal."""

    name: str
    bitwise: bool
    difference: float


def quantity(name: str) -> str:
    """`train/gradient:backbone.x` -> `gradient`; `detect/batch/boxes.0` -> `boxes`."""
    return name.split("/", 1)[1].split("/")[-1].split(":")[0].split(".")[0]


def pack(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The arrays of a golden file."""
    entries = [_summary(name, tensor) for name, tensor in named.items()]
    return {
        "names": np.array(list(named)),
        "shapes": np.array([entry["shape"] for entry in entries]),
        "digests": np.array([entry["digest"] for entry in entries], dtype=np.uint64),
        "largest": np.array([entry["largest"] for entry in entries], dtype=np.float32),
        "sums": np.array([entry["sums"] for entry in entries], dtype=np.float32),
        "elements": np.concatenate([entry["elements"] for entry in entries]),
    }


def compare(named: dict[str, torch.Tensor], golden: dict[str, np.ndarray]) -> list[Row]:
    """A row for every quantity of `golden` and every one that only `named` has."""
    names = golden["names"].tolist()
    kept = dict(zip(names, _entries(golden), strict=True))
    scales = _scales(kept)
    rows = []
    for name, wanted in kept.items():
        if name not in named:
            rows.append(Row(name, False, float("inf")))
            continue
        found = _summary(name, named[name])
        rows.append(
            Row(
                name,
                found["digest"] == wanted["digest"],
                _difference(found, wanted, scales[name], named[name].is_floating_point()),
            )
        )
    return rows + [Row(name, False, float("inf")) for name in named if name not in kept]


def _difference(found: dict, wanted: dict, scale: float, is_float: bool) -> float:
    if found["shape"] != wanted["shape"]:
        return float("inf")
    if found["digest"] == wanted["digest"]:
        return 0.0
    if not is_float:
        return float("inf")
    if scale == 0.0:
        return 0.0 if found["largest"] == 0.0 else float("inf")
    of_elements = np.abs(found["elements"] - wanted["elements"]).max(initial=0.0) / scale
    weighted, magnitude = wanted["sums"].astype(np.float64)
    of_sum = abs(found["sums"][0] - weighted) / max(magnitude, scale * found["count"] ** 0.5)
    return float(max(of_elements, of_sum))


def _scales(kept: dict[str, dict]) -> dict[str, float]:
    """What differences are relative to: the tensor's largest element. Gradients and momenta: the
    largest of all of them, as that of a shift before another batch norm is 0 but for rounding."""
    scales = {name: float(entry["largest"]) for name, entry in kept.items()}
    for kind in ("gradient", "momentum"):
        phases = {}
        for name in kept:
            if quantity(name) == kind:
                phases.setdefault(name.split("/")[0], []).append(name)
        for names in phases.values():
            scales |= dict.fromkeys(names, max(scales[name] for name in names))
    return scales


def _summary(name: str, tensor: torch.Tensor) -> dict:
    array = tensor.detach().cpu().contiguous().numpy()
    array = array + array.dtype.type(0)  # -0 is 0
    shape = "x".join(map(str, array.shape)) + f" {array.dtype}"
    digest = hashlib.blake2b(shape.encode() + array.tobytes(), digest_size=8).digest()
    flat = array.reshape(-1).astype(np.float64)
    spread = (np.arange(1, flat.size + 1, dtype=np.uint64) * 2654435769 % 2**32) / 2**32
    return {
        "shape": shape,
        "digest": np.uint64(int.from_bytes(digest, "little")),
        "largest": np.float32(np.abs(flat).max(initial=0.0)),
        # Weights in (0.5, 1.5) notice elements that changed places.
        "sums": ((flat * (0.5 + spread)).sum(), np.abs(flat).sum()),
        "count": flat.size,
        "elements": flat[_kept_elements(name, flat.size)],
    }


def _kept_elements(name: str, size: int) -> np.ndarray:
    few = _NUM_SAMPLED.get(quantity(name), 16)
    if size <= (few if few == 4 else _NUM_WHOLE):
        return np.arange(size)
    spread = np.arange(1, few + 1, dtype=np.uint64) * 2654435769 % 2**32
    return (spread * size >> 32).astype(np.int64)


def _entries(golden: dict[str, np.ndarray]) -> list[dict]:
    entries, start = [], 0
    for index, name in enumerate(golden["names"].tolist()):
        shape = str(golden["shapes"][index])
        lengths = [int(length) for length in shape.split(" ")[0].split("x") if length]
        count = len(_kept_elements(name, int(np.prod(lengths))))
        entries.append(
            {
                "shape": shape,
                "digest": golden["digests"][index],
                "largest": golden["largest"][index],
                "sums": golden["sums"][index],
                "elements": golden["elements"][start : start + count],
            }
        )
        start += count
    assert start == len(golden["elements"])
    return entries


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def fingerprint() -> dict[str, object]:
    """What the last bit of a result depends on: versions, processor, code path, threads."""
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
    }


def _processor() -> str:
    """Vendor, family, model and vector extensions, where Linux tells; else the platform's word."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, flags=re.MULTILINE))
    words = [fields.get(key, "?") for key in ("vendor_id", "cpu family", "model")]
    vector = sorted(f for f in fields.get("flags", "").split() if re.match("avx|amx|fma|sse4", f))
    return " ".join(words + vector)


def recorded() -> dict:
    """Where and how the goldens were recorded."""
    return json.loads((FOLDER / "recorded.json").read_text())


def platform_differences() -> list[str]:
    """In what this platform is not the one of the recording; [] where bits must be equal."""
    there, here = recorded()["fingerprint"], fingerprint()
    changed = [key for key in there if there[key] != here[key]]
    return [f"{key}: {there[key]} there, {here[key]} here" for key in changed]
