"""How a step is computed on this machine: precision, memory order, compiled code.

TRAIN.AMP, CHANNELS_LAST and COMPILE may be left to the machine (None). What it decides is written
into the configuration before the run's identity is made from it, so a run that continues on
another kind of machine is refused, by the key's name, instead of changing its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.errors import ConfigError
from moco.kernels import choose, compiler
from moco.training.loss_scale import LossScale

_CPU_BF16 = ("amx_bf16", "avx512_bf16")  # flags of /proc/cpuinfo
_LEAST_CAPABILITY = 8  # Ampere, the first with bfloat16 matrix units
_FLOAT16_CAPABILITY = 7  # Volta, the first with float16's
_ENCODERS = ("encoder_q", "encoder_k")


@dataclass(frozen=True)
class Acceleration:
    """cfg: with TRAIN.AMP, CHANNELS_LAST and COMPILE decided; text: what was decided, and why."""

    cfg: CfgNode
    text: str


@dataclass(frozen=True)
class _Choice:
    value: object
    why: str


def resolve(cfg: CfgNode, device: torch.device) -> Acceleration:
    """Decide what the configuration leaves to the machine; TRAIN.REFERENCE overrides all of it.

    A resolved configuration resolves to itself.

    Raises: ConfigError for settings that cannot be had together or on this device.
    """
    if cfg.TRAIN.REFERENCE:
        amp, last, compiled = (_Choice(v, "TRAIN.REFERENCE") for v in (False, False, "eager"))
    else:
        amp = _decide(cfg, "AMP") or _choose_amp(cfg, device)
        last = _decide(cfg, "CHANNELS_LAST") or _choose_channels_last(cfg, device)
        compiled = _decide(cfg, "COMPILE") or _choose_compile(cfg, device, last.value)
        _check_compile(cfg, device, last.value, compiled.value)
        _check_dtype(cfg, device)
    out = cfg.clone()
    out.defrost()
    out.TRAIN.AMP, out.TRAIN.CHANNELS_LAST = amp.value, last.value
    out.TRAIN.COMPILE = compiled.value
    if cfg.TRAIN.REFERENCE:
        out.AUGMENT.BACKEND, out.AUGMENT.DECODE, out.AUGMENT.RESIDENT = "pil", "cpu", False
        out.TRAIN.AMP_DTYPE, out.TRAIN.TF32 = "bfloat16", False
    out.freeze()
    text = (
        f"step: {out.TRAIN.AMP_DTYPE if amp.value else 'float32'} ({amp.why}); channels "
        f"{'last' if last.value else 'first'} ({last.why}); {compiled.value} ({compiled.why})"
    )
    if device.type == "cuda":
        precision = "TF32" if out.TRAIN.TF32 else "full"
        text += f"; float32 products in {precision} precision (TRAIN.TF32)"
        text += _warning(out, device)
    return Acceleration(out, text)


def accelerate_(method: nn.Module, cfg: CfgNode) -> None:
    """Make a method compute as a resolved configuration says; names and values stay as they are.

    With COMPILE torch the encoders are compiled in the first step.

    Raises: ConfigError where the kernels cannot be compiled.
    """
    if cfg.TRAIN.CHANNELS_LAST:
        method.to(memory_format=torch.channels_last)
    if cfg.TRAIN.COMPILE == "kernels":
        choose.use_kernels_(method)
    if cfg.TRAIN.COMPILE == "torch":
        for name in _ENCODERS:
            encoder = getattr(method, name, None)
            if encoder is not None:
                encoder.compile()


def build_loss_scale(cfg: CfgNode, device: torch.device) -> LossScale | None:
    """What a resolved configuration's float16 needs; None for other types."""
    scales = cfg.TRAIN.AMP and cfg.TRAIN.AMP_DTYPE == "float16"
    return LossScale(device) if scales else None


def cpu_bf16_flag(cpuinfo: str) -> str | None:
    """The flag, of the text of /proc/cpuinfo, that says bfloat16 products are done in hardware."""
    words = set(cpuinfo.split())
    return next((flag for flag in _CPU_BF16 if flag in words), None)


def _decide(cfg: CfgNode, key: str) -> _Choice | None:
    value = cfg.TRAIN[key]
    return None if value is None else _Choice(value, f"TRAIN.{key}")


def _choose_amp(cfg: CfgNode, device: torch.device) -> _Choice:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        is_half = cfg.TRAIN.AMP_DTYPE == "float16"
        least = _FLOAT16_CAPABILITY if is_half else _LEAST_CAPABILITY
        return _Choice(major >= least, f"the GPU's capability is {major}.{minor}")
    if device.type != "cpu":
        return _Choice(False, f"lower precision was not tried on {device.type}")
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return _Choice(False, "this system does not say whether the CPU has bfloat16")
    flag = cpu_bf16_flag(info.read_text(encoding="utf-8"))
    why = f"the CPU has {flag}" if flag else f"the CPU has none of {', '.join(_CPU_BF16)}"
    return _Choice(flag is not None, why)


def _choose_channels_last(cfg: CfgNode, device: torch.device) -> _Choice:
    if device.type == "cuda" and cfg.MODEL.BN_SPLITS > 1:
        # Channels last each layer's groups are copied out and back; channels first they are views.
        return _Choice(False, f"MODEL.BN_SPLITS {cfg.MODEL.BN_SPLITS}: its groups are copied else")
    return _Choice(_is_resnet(cfg), cfg.MODEL.ARCH)


def _choose_compile(cfg: CfgNode, device: torch.device, channels_last: bool) -> _Choice:
    if device.type != "cpu":
        return _Choice("eager", "TRAIN.COMPILE torch was not measured on a GPU")
    if not _fits_kernels(cfg, channels_last):
        return _Choice("eager", "kernels are for ResNets with batch norm, channels last")
    try:
        origin = compiler.compile_kernels()
    except ConfigError as error:
        return _Choice("eager", str(error))
    return _Choice("kernels", f"for this CPU, {origin}")


def _check_dtype(cfg: CfgNode, device: torch.device) -> None:
    if cfg.TRAIN.AMP_DTYPE == "float16" and device.type != "cuda":
        raise ConfigError(
            f"TRAIN.AMP_DTYPE is float16 on {device.type}; allowed: on a CUDA GPU, with the loss "
            "scaled; set TRAIN.AMP_DTYPE bfloat16"
        )


def _warning(cfg: CfgNode, device: torch.device) -> str:
    """About a GPU without bfloat16, for the end of the text; "" for others."""
    capability = torch.cuda.get_device_capability(device)
    if cfg.TRAIN.REFERENCE or capability[0] >= _LEAST_CAPABILITY:
        return ""
    if cfg.TRAIN.AMP and cfg.TRAIN.AMP_DTYPE == "float16":
        return ""
    what = "only emulates bfloat16, which is slow" if cfg.TRAIN.AMP else "has no bfloat16"
    return (
        f". warning: this GPU (capability {capability[0]}.{capability[1]}) {what}; "
        "TRAIN.AMP_DTYPE float16 is what it is fast in"
    )


def _check_compile(cfg: CfgNode, device: torch.device, channels_last: bool, value: str) -> None:
    if value == "kernels" and not (device.type == "cpu" and _fits_kernels(cfg, channels_last)):
        raise ConfigError(
            f"TRAIN.COMPILE is kernels with {cfg.MODEL.ARCH}, MODEL.NORM {cfg.MODEL.NORM}, "
            f"TRAIN.CHANNELS_LAST {channels_last} on {device.type}; allowed: a ResNet with NORM BN "
            "and CHANNELS_LAST True on cpu; else set TRAIN.COMPILE eager or torch"
        )
    if value == "torch" and cfg.MODEL.NORM == "SyncBN":
        raise ConfigError(
            "TRAIN.COMPILE is torch with MODEL.NORM SyncBN, whose messages between processes "
            "cannot be compiled; set TRAIN.COMPILE eager"
        )


def _fits_kernels(cfg: CfgNode, channels_last: bool) -> bool:
    return _is_resnet(cfg) and cfg.MODEL.NORM == "BN" and channels_last


def _is_resnet(cfg: CfgNode) -> bool:
    return cfg.MODEL.ARCH.startswith("resnet")
