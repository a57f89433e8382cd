"""Checkpoints in the reference's layout, and what can be wrong with them."""

from __future__ import annotations

import functools
import re

import tiny
import torch
from foreign_files import narrow_resnet

from moco.methods import build_method

PREFIXES = ("module.", "", "_orig_mod.", "module._orig_mod.")


def named(content: dict) -> dict[str, torch.Tensor]:
    return content["state_dict"]


@functools.cache
def _tiny_content() -> dict:
    """Of a tiny MoCo after an epoch: every moment there, no two tensors alike."""
    method = build_method(tiny.config())
    draws = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in method.state_dict().items():
        random = torch.rand(tensor.shape, generator=draws) + 0.5
        state[name] = random if tensor.is_floating_point() else tensor.clone()
    moments = {
        i: {"momentum_buffer": torch.rand(p.shape, generator=draws)}
        for i, p in enumerate(method.parameters())
        if p.requires_grad
    }
    group = {"params": list(range(len(list(method.parameters())))), "lr": 0.03, "momentum": 0.9,
             "weight_decay": 1e-4, "dampening": 0, "nesterov": False}  # fmt: skip
    optimizer = {"state": moments, "param_groups": [group]}
    return {"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}


def _prefixed(content: dict, prefix: str) -> dict:
    state = {f"{prefix}{name}": tensor for name, tensor in content["state_dict"].items()}
    return {**content, "state_dict": state}


def moco_content(prefix: str) -> dict:
    """A whole checkpoint of the tiny run, as the reference would have written it."""
    return _prefixed(_tiny_content(), prefix)


@functools.cache
def _resnet50() -> dict:
    state = {}
    for encoder, seed in (("encoder_q", 1), ("encoder_k", 2)):
        parts = narrow_resnet("resnet50", seed=seed)
        parts |= {f"fc.{i}.{kind}": torch.ones(2) for i in (0, 2) for kind in ("weight", "bias")}
        state |= {f"{encoder}.{name}": tensor for name, tensor in parts.items()}
    state |= {"queue": torch.rand(8, 20), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    moments = {0: {"momentum_buffer": torch.rand(2)}}
    optimizer = {"state": moments, "param_groups": [{"params": [0]}]}
    return {"epoch": 1, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


def resnet50_content(prefix: str) -> dict:
    return _prefixed(_resnet50(), prefix)


def _renamed(change):
    def damage(content: dict, prefix: str) -> dict:
        state = {change(name, prefix): tensor for name, tensor in named(content).items()}
        return {**content, "state_dict": state}

    return damage


def _without(pattern: str):
    def damage(content: dict, prefix: str) -> dict:
        kept = {n: t for n, t in named(content).items() if not re.search(pattern, n)}
        assert len(kept) < len(named(content)), pattern
        return {**content, "state_dict": kept}

    return damage


def _changed(ending: str, change):
    def damage(content: dict, prefix: str) -> dict:
        state = dict(named(content))
        name = f"{prefix}{ending}"
        state[name] = change(state[name])
        return {**content, "state_dict": state}

    return damage


def _added(make):
    def damage(content: dict, prefix: str) -> dict:
        return {**content, "state_dict": {**named(content), **make(named(content), prefix)}}

    return damage


def _of_optimizer(change):
    def damage(content: dict, prefix: str) -> dict:
        content = {**content, "optimizer": {**content["optimizer"]}}
        content["optimizer"] = change(content["optimizer"])
        return content

    return damage


def _swapped(name: str, prefix: str) -> str:
    other = {"encoder_q.": "encoder_k.", "encoder_k.": "encoder_q."}
    return re.sub(r"encoder_[qk]\.", lambda found: other[found.group()], name)


_CONV = "encoder_q.layer3.0.conv2.weight"

# name -> damage(content, prefix). "none" and "swapped" are whole files.
DAMAGES = {
    "none": lambda content, prefix: content,
    "swapped": _renamed(_swapped),
    "the query encoder missing": _without(r"encoder_q\."),
    "one tensor missing": _without(r"encoder_q\.layer3\.0\.conv2\.weight$"),
    "a block's norm missing": _without(r"encoder_q\.layer2\.1\.bn1\."),
    "the last block missing": _without(r"encoder_q\.layer4\.1\."),
    "the last stage missing": _without(r"encoder_q\.layer4\."),
    "the stem missing": _without(r"encoder_q\.conv1\."),
    "running variances missing": _without(r"encoder_q\..*running_var$"),
    "one counter missing": _without(r"encoder_q\.layer1\.0\.bn1\.num_batches_tracked$"),
    "wider": _changed(_CONV, lambda t: torch.cat([t, t])),
    "narrower": _changed(_CONV, lambda t: t[: len(t) // 2].clone()),
    "another kernel": _changed(_CONV, lambda t: t[..., :1, :1].clone()),
    "flat": _changed(_CONV, lambda t: t.flatten()),
    "a scalar": _changed(_CONV, lambda t: t.sum()),
    "transposed": _changed(
        "encoder_q.layer2.0.conv1.weight", lambda t: t.transpose(0, 1).contiguous()
    ),
    "NaN": _changed(_CONV, lambda t: t * float("nan")),
    "Inf": _changed("encoder_q.layer3.0.bn2.running_var", lambda t: t / 0),
    "whole numbers": _changed(_CONV, lambda t: t.to(torch.int64)),
    "complex numbers": _changed(_CONV, lambda t: t.to(torch.complex64)),
    "no tensor": _changed(_CONV, lambda t: "x"),
    "terabytes of four bytes": _changed(_CONV, lambda t: t.flatten()[:1].expand(1 << 40)),
    "an unknown tensor": _added(lambda s, p: {f"{p}stray.weight": torch.ones(2)}),
    "an unknown tensor in the encoder": _added(
        lambda s, p: {f"{p}encoder_q.layer3.0.conv7.weight": torch.ones(2)}
    ),
    "one more block": _added(
        lambda s, p: {
            n.replace("layer4.1.", "layer4.9."): t
            for n, t in s.items() if n.startswith(f"{p}encoder_q.layer4.1.")
        }
    ),
    "a block of 5000 digits": _added(
        lambda s, p: {f"{p}encoder_q.layer4.{'9' * 5000}.conv1.weight": torch.ones(2)}
    ),
    "one name with another prefix": _renamed(
        lambda n, p: f"other.{n}" if n.endswith("encoder_q.layer3.0.conv2.weight") else n
    ),
    "half of the names with another prefix": _renamed(
        lambda n, p: f"other.{n}" if "layer3" in n or "layer4" in n else n
    ),
    "another encoder's name": _renamed(lambda n, p: n.replace("encoder_q.", "encoder_x.")),
    "no state dict": lambda content, prefix: {**content, "state_dict": [1]},
    "an empty state dict": lambda content, prefix: {**content, "state_dict": {}},
    "another architecture's name": lambda content, prefix: {**content, "arch": "resnet34"},
    "a head missing": _without(r"encoder_q\.fc\."),
    "the key encoder missing": _without(r"encoder_k\."),
    "one tensor of the key encoder missing": _without(r"encoder_k\.layer3\.0\.conv2\.weight$"),
    "the queue missing": _without(r"queue"),
    "a queue of other dimension": _changed("queue", lambda t: t[:4].clone()),
    "a longer queue": _changed("queue", lambda t: torch.cat([t, t], dim=1)),
    "NaN in the queue": _changed("queue", lambda t: t * float("nan")),
    "half of the moments missing": _of_optimizer(
        lambda o: {**o, "state": dict(list(o["state"].items())[: len(o["state"]) // 2])}
    ),
    "no moments": _of_optimizer(lambda o: {**o, "state": {}}),
    "moments of other shape": _of_optimizer(
        lambda o: {**o, "state": {i: {n: t.repeat(2, *[1] * (t.dim() - 1)) for n, t in e.items()}
                                  for i, e in o["state"].items()}}
    ),
    "moments of Adam": _of_optimizer(
        lambda o: {**o, "state": {i: {"step": torch.ones(()), "exp_avg": e["momentum_buffer"],
                                      "exp_avg_sq": e["momentum_buffer"]}
                                  for i, e in o["state"].items()}}
    ),
    "an optimizer of fewer parameters": _of_optimizer(
        lambda o: {**o, "param_groups": [{**o["param_groups"][0], "params": [0]}]}
    ),
    "a parameter twice in the optimizer": _of_optimizer(
        lambda o: {**o, "param_groups": [
            {**g, "params": [g["params"][0], *g["params"][:-1]]} if len(g["params"]) > 1
            else {"params": [0, 0]} for g in o["param_groups"]
        ]}
    ),
    "an optimizer without its rate": _of_optimizer(
        lambda o: {**o, "param_groups": [
            {k: v for k, v in g.items() if k != "lr"} for g in o["param_groups"]
        ]}
    ),
    "no optimizer": lambda content, prefix: {**content, "optimizer": None},
    "an epoch below 0": lambda content, prefix: {**content, "epoch": -1},
    "an epoch that is no number": lambda content, prefix: {**content, "epoch": "1"},
}  # fmt: skip
_FIRST_HARMLESS = "a head missing"
# What neither the converter nor an evaluation of features reads.
HARMLESS_TO_A_BACKBONE = set(list(DAMAGES)[list(DAMAGES).index(_FIRST_HARMLESS) :])
