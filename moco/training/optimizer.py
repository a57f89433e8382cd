"""The optimizers of pretraining."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from moco.cfgnode import CfgNode

_TRUST = 0.001


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled to each tensor's weights (arXiv 1708.03888).

    The update d of a tensor w (its gradient + weight_decay * w) becomes trust * |w| / |d| * d
    before it enters the momentum; d stays as it is where a norm is zero. Biases and batch norm's
    parameters, all of one dimension, are neither decayed nor scaled, as SimCLR and BYOL do.
    As torch's fused optimizers do, it leaves out an update where its attribute `found_inf`, a
    scalar on the device, is 1.

    Args:
        parameters: tensors that may lack a gradient; those are left alone.
        lr: learning rate. momentum, weight_decay: factors. trust: trust coefficient.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust: float = _TRUST,
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(parameters, options)
        self._step_supports_amp_scaling = True  # torch's name for: `found_inf` is obeyed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_tensor(weight, group)

    def _step_tensor(self, weight: torch.Tensor, group: dict) -> None:
        update = weight.grad
        if weight.dim() > 1:
            update = update.add(weight, alpha=group["weight_decay"])
            weight_norm, update_norm = weight.norm(), update.norm()
            ratio = group["trust"] * weight_norm / update_norm
            usable = (weight_norm > 0) & (update_norm > 0)
            update = update * torch.where(usable, ratio, 1.0)
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer, found_inf = state["momentum_buffer"], getattr(self, "found_inf", None)
        if found_inf is not None:
            skip = found_inf.bool()
            moved = torch.where(skip, buffer, buffer.mul(group["momentum"]).add_(update))
            weight.copy_(torch.where(skip, weight, weight.sub(moved, alpha=group["lr"])))
            buffer.copy_(moved)
            return
        buffer.mul_(group["momentum"]).add_(update)
        weight.sub_(buffer, alpha=group["lr"])


class FusedSGD(torch.optim.SGD):
    """torch's SGD in one pass over the memory, the same numbers, also for channels-last weights.

    torch's own call of its kernel copies channels-last gradients on a CPU and then uses none of the
    copies (2.14, FusedSGDKernel.cpp). As there, an update is left out where the attribute
    `found_inf`, a scalar on the device, is 1.

    Args:
        parameters: tensors, or torch's groups of them, that may lack a gradient; those are left
            alone.
        lr: learning rate. momentum, weight_decay: factors. nesterov: as torch's.
    """

    def __init__(
        self,
        parameters: Iterable,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, **options, nesterov=nesterov, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "FusedSGD takes no closure"
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            buffers = [self._buffer(weight) for weight in weights] if group["momentum"] else []
            torch._fused_sgd_(
                *(list(map(_in_memory_order, part)) for part in (weights, gradients, buffers)),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,  # from a buffer of zeros it gives what the first step does
                found_inf=getattr(self, "found_inf", None),
            )

    def _buffer(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """A view whose elements come in the order in which they lie in memory."""
    if tensor.is_contiguous():
        return tensor
    assert tensor.is_contiguous(memory_format=torch.channels_last), tensor.stride()
    return tensor.permute(0, 2, 3, 1)


def build_optimizer(cfg: CfgNode, method: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer `cfg.TRAIN` names, over all parameters.

    "sgd": momentum, weight decay on all parameters (MoCo v1, section 4). "lars", "adamw": MoCo v3
    for ResNets and ViTs; AdamW decays all parameters too. SGD and AdamW take one pass over the
    memory, but with TRAIN.REFERENCE, where they are torch's default.
    The key encoder's parameters are listed, as in the reference, so that optimizer states can be
    exchanged with it; they have no gradient and are never stepped.
    """
    train, parameters = cfg.TRAIN, list(method.parameters())
    fused = not train.REFERENCE and parameters[0].device.type in ("cpu", "cuda")
    options = {"lr": train.LR, "weight_decay": train.WEIGHT_DECAY}
    if train.OPTIMIZER == "adamw":
        optimizer = torch.optim.AdamW(parameters, **options, fused=fused or None)
    elif train.OPTIMIZER == "lars":
        return LARS(parameters, momentum=train.SGD_MOMENTUM, **options)
    else:
        kind = FusedSGD if fused else torch.optim.SGD
        optimizer = kind(parameters, momentum=train.SGD_MOMENTUM, **options)
    keep_own_ways_(optimizer)
    return optimizer


def plain_state(optimizer: torch.optim.Optimizer) -> dict:
    """The state dict of an optimizer without the choice of a fused kernel, which a program that
    loads it would take over. The tensors are the optimizer's own."""
    state = optimizer.state_dict()
    groups = [{**g, "fused": None} if "fused" in g else g for g in state["param_groups"]]
    return {**state, "param_groups": groups}


def keep_own_ways_(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer keep its kernels when it loads a state, which brings those of the process
    that saved it, and let what it loads and, for fused kernels, gradients lie in memory as their
    weights do."""
    optimizer.register_load_state_dict_post_hook(_after_load)
    if optimizer.defaults["fused"]:
        optimizer.register_step_pre_hook(_conform_gradients)


def _after_load(optimizer: torch.optim.Optimizer) -> None:
    kernels = {name: optimizer.defaults[name] for name in ("fused", "foreach")}
    for group in optimizer.param_groups:
        group.update(kernels)
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape:
                state[name] = _lying_like(value, weight)
            elif name == "step" and kernels["fused"]:  # torch's fused AdamW reads it on the device
                state[name] = value.to(weight.device)


def _conform_gradients(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
    """torch's fused kernels on a CPU go through weights, gradients and state as they lie in memory,
    whatever their order, and give nonsense where it differs. Autograd's gradients lie like their
    weights; those a caller sets may not."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad = _lying_like(weight.grad, weight)


def _lying_like(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`value`, or a copy of it in the memory order of `weight`."""
    if value.stride() == weight.stride():
        return value
    return torch.empty_like(weight, dtype=value.dtype, requires_grad=False).copy_(value)
