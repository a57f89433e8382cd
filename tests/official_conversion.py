"""What facebookresearch/moco, detection/convert-pretrain-to-detectron2.py, makes of a checkpoint.

Its names by rules of our own; with a checkout at hand the file itself is run beside them
(tests/parity/test_official_conversion.py).
"""

from __future__ import annotations

import re

import numpy as np
import torch


def official_conversion(checkpoint: dict) -> dict:
    """The content of its .pkl: the query encoder with head and batch counters, as arrays."""
    start = "module.encoder_q."
    state = {n.removeprefix(start): t for n, t in checkpoint["state_dict"].items()
             if n.startswith(start)}  # fmt: skip
    return {
        "model": {official_name(name): tensor.numpy() for name, tensor in state.items()},
        "__author__": "MOCO",
        "matching_heuristics": True,
    }


def official_name(name: str) -> str:
    stage, rest = re.fullmatch(r"(?:layer([1-4])\.)?(.+)", name).groups()
    rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    rest = re.sub(r"\bbn([123])\b", r"conv\1.norm", rest)
    return f"res{int(stage) + 1}.{rest}" if stage else f"stem.{rest}"


def narrow_moco(shapes: dict[str, tuple[int, ...]], width: int, head: str) -> dict:
    """A checkpoint of the reference's kind, random: torchvision's `shapes`, a head of v1 or v2."""
    generator = torch.Generator().manual_seed(3)
    state = {n: 0.5 + 0.1 * torch.rand(s, generator=generator) for n, s in shapes.items()}
    for name in [n for n in shapes if n.endswith("running_mean")]:
        state[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    fc = {"fc.0": (width, width), "fc.2": (4, width)} if head == "mlp" else {"fc": (4, width)}
    for name, shape in fc.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(shape), torch.rand(shape[0])
    return {"state_dict": {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}}


def arrays_equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
