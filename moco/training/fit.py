"""Whether the weights and the optimizer state of a checkpoint fit a run: all or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from moco.errors import CheckpointError

_WRAPPER = "module."  # DistributedDataParallel's, which the reference's files have


def unwrapped(path: str | os.PathLike, state: object) -> dict[str, torch.Tensor]:
    """A checkpoint's `state_dict` without the prefix `module.`.

    Raises: CheckpointError where it is no dict of named tensors, or two names become one.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: its 'state_dict' is no dict of tensors; it is damaged")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            raise CheckpointError(
                f"{path}: {str(name)[:80]!r} in its 'state_dict' is no tensor; it is damaged"
            )
        own = name.removeprefix(_WRAPPER)
        if own in tensors:
            raise CheckpointError(
                f"{path}: holds {own!r} with and without {_WRAPPER!r}; remove one of them"
            )
        tensors[own] = tensor
    return tensors


def check_weights(
    path: str | os.PathLike, given: Mapping[str, torch.Tensor], needed: Mapping[str, torch.Tensor]
) -> None:
    """Raise CheckpointError unless names, shapes and kinds are equal and all is finite."""
    both = [name for name in needed if name in given]
    shapes = [
        f"{name} {tuple(given[name].shape)} (needed {tuple(needed[name].shape)})"
        for name in both
        if given[name].shape != needed[name].shape
    ]
    kinds = [
        f"{name} {given[name].dtype} (needed {needed[name].dtype})"
        for name in both
        if given[name].is_floating_point() != needed[name].is_floating_point()
        or given[name].is_complex() != needed[name].is_complex()
    ]
    wild = [n for n in both if not torch.isfinite(given[n]).all()]
    _refuse(
        path,
        "weights do",
        {
            "missing": [name for name in needed if name not in given],
            "unknown": [name for name in given if name not in needed],
            "of other shape": shapes,
            "of another kind": kinds,
            "with NaN or Inf": wild,
        },
    )


def check_optimizer(
    path: str | os.PathLike, given: object, optimizer: torch.optim.Optimizer, *, has_stepped: bool
) -> None:
    """Raise CheckpointError unless a saved state is one of this optimizer and these parameters.

    torch compares the numbers of parameters only: moments of another shape, of another optimizer
    or of half the parameters would be taken.
    """
    groups = given.get("param_groups") if isinstance(given, Mapping) else None
    state = given.get("state") if isinstance(given, Mapping) else None
    is_whole = isinstance(groups, list) and isinstance(state, Mapping)
    is_whole = is_whole and all(
        isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups
    )
    numbers = [number for group in groups for number in group["params"]] if is_whole else []
    is_whole = is_whole and all(type(number) is int for number in numbers)
    is_whole = is_whole and len(set(numbers)) == len(numbers)
    is_whole = is_whole and all(isinstance(part, Mapping) for part in state.values())
    own = optimizer.param_groups
    if not is_whole or [len(g["params"]) for g in groups] != [len(g["params"]) for g in own]:
        raise CheckpointError(
            f"{path}: its optimizer state does not fit; it is of {_size(groups)} parameters, this "
            f"run has {_size(own)}. Use the configuration it was made with"
        )
    uses_adam = "betas" in optimizer.defaults
    settings = {"lr", "weight_decay", "betas" if uses_adam else "momentum"}
    entries = {"step", "exp_avg", "exp_avg_sq"} if uses_adam else {"momentum_buffer"}
    saved = {number: state.get(number, {}) for number in numbers}
    parameters = [p for group in own for p in group["params"]]
    problems: dict[str, list[str]] = {"missing": [], "of other shape": [], "of another kind": []}
    problems["without a setting"] = [
        f"group {i}" for i, group in enumerate(groups) if not settings <= group.keys()
    ]
    is_needed = has_stepped and all(group.get("momentum", 1) != 0 for group in groups)
    for (number, part), weight in zip(saved.items(), parameters, strict=True):
        if not part:
            if is_needed and weight.requires_grad:
                problems["missing"].append(f"parameter {number}")
        elif set(part) != entries:
            has = ", ".join(map(str, part))
            problems["of another kind"].append(f"parameter {number} has {has}")
        for name, value in part.items():
            if torch.is_tensor(value) and value.dim() and value.shape != weight.shape:
                problems["of other shape"].append(f"{name} of parameter {number}")
    problems["unknown"] = [str(number) for number in state if number not in saved]
    _refuse(path, "optimizer state does", problems)


def _size(groups: object) -> str:
    try:
        return str(sum(len(group["params"]) for group in groups))
    except (KeyError, TypeError):
        return "unknown"


def _refuse(path: str | os.PathLike, what: str, problems: Mapping[str, list[str]]) -> None:
    found = [
        f"{len(names)} {problem}: {', '.join(names[:3])}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(
            f"{path}: its {what} not fit this model; {'; '.join(found)}. Use the "
            "configuration it was made with"
        )
