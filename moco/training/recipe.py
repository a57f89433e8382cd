"""What a configuration means on a given number of processes, said before training starts.

It compares with the published setting, warns where the combination departs from it, and estimates
the memory of one process. It changes nothing: the configuration stays what the user wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.devices import memory_of
from moco.methods import Method, build_method
from moco.training.batch import WHOLE_BATCH_WARNING, images_per_forward, sees_whole_batch

# Published base rates at a batch of 256: SGD of MoCo v1 and v2 (arXiv 1911.05722, section 4;
# 2003.04297, section 3), LARS and AdamW of v3 (2104.02057, sections 4 and 5).
_BASE_LR = {"sgd": 0.03, "lars": 0.3, "adamw": 1.5e-4}
_BASE_BATCH = 256
_BN_GROUP = 32  # of v1 and v2 on 8 GPUs
_SMALL_BN_GROUP = 8
_GIB = 2**30
_LESS_MEMORY = (
    "Raise TRAIN.ACCUMULATION_STEPS (the same batch in parts; see what --dry-run says of batch "
    "norm), lower TRAIN.BATCH_SIZE, or start more processes"
)


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one process, without the framework's own (CUDA context, caches).

    weights: parameters and buffers, the queue among them; gradients; optimizer: its state;
    activations: what backward keeps of one micro-batch (without accumulation all images of the
    process); inputs: both views of all images; logits: a micro-batch's similarities with their
    gradient.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    inputs: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Recipe:
    """The resolved setting: lines to print, warnings, and the memory estimate."""

    lines: tuple[str, ...]
    warnings: tuple[str, ...]
    memory: Memory

    def text(self) -> str:
        return "\n".join([*self.lines, *(f"warning: {w}" for w in self.warnings)])


def resolve_recipe(
    cfg: CfgNode, *, num_images: int, world_size: int, device_memory: int | None = None
) -> Recipe:
    """Work out batch, rate, schedule, batch-norm groups, negatives and memory.

    Args:
        cfg: a pretraining configuration whose batch divides among the processes and whose
            BN_SPLITS divide a process's images (`Trainer` refuses others).
        num_images: of the data set; world_size: processes, one a GPU.
        device_memory: bytes of a process's GPU, to set beside the estimate.
    """
    train = cfg.TRAIN
    per_process, parts = train.BATCH_SIZE // world_size, train.ACCUMULATION_STEPS
    micro = f"{parts} micro-batches x {per_process // parts}" if parts > 1 else f"{per_process}"
    steps, left_out = divmod(num_images, train.BATCH_SIZE)
    last = f"; {left_out} of {num_images} images do not fill a batch" if left_out else ""
    with torch.device("meta"):
        method = build_method(cfg, num_images)
    memory = estimate_memory(cfg, method, per_process)
    lines = (
        f"batch: {train.BATCH_SIZE} images = {world_size} process(es) x {micro}; "
        f"{steps} steps an epoch, {train.EPOCHS} epochs, {steps * train.EPOCHS} steps{last}",
        f"learning rate: {train.LR:g} ({train.OPTIMIZER}, {train.SCHEDULE}); the linear rule, "
        f"{_BASE_LR[train.OPTIMIZER]:g} x batch / {_BASE_BATCH}, gives {linear_lr(cfg):g}",
        f"batch norm: {_norm_in_words(cfg, world_size)}",
        f"negatives: {_negatives_in_words(cfg, method, num_images)}",
        f"memory of a process, estimated: {memory.total / _GIB:.2f} GiB"
        + (f" of the GPU's {device_memory / _GIB:.2f}; " if device_memory else "; ")
        + ", ".join(f"{name} {size / _GIB:.2f}" for name, size in vars(memory).items()),
    )
    warnings = _warnings(cfg, method, num_images, world_size)
    if device_memory and memory.total > device_memory:
        warnings.append(f"the estimate is above the GPU's memory. {_LESS_MEMORY}")
    return Recipe(lines, tuple(warnings), memory)


def out_of_memory_remedy(
    cfg: CfgNode, num_images: int, world_size: int, device: torch.device
) -> str:
    """The end of the message about a GPU whose memory was too small."""
    total = memory_of(device)
    recipe = resolve_recipe(cfg, num_images=num_images, world_size=world_size)
    size = f", of the GPU's {total / _GIB:.2f}" if total else ""
    return (
        f"This run's estimate is {recipe.memory.total / _GIB:.2f} GiB a process{size}. "
        f"{_LESS_MEMORY}, then start the same command with --resume"
    )


def linear_lr(cfg: CfgNode) -> float:
    """The rate the linear rule gives the optimizer for TRAIN.BATCH_SIZE (SGD: 0.03 at 256)."""
    return _BASE_LR[cfg.TRAIN.OPTIMIZER] * cfg.TRAIN.BATCH_SIZE / _BASE_BATCH


def estimate_memory(cfg: CfgNode, method: Method, images_per_process: int) -> Memory:
    """Bytes of one process in one step; TRAIN.ACCUMULATION_STEPS divides activations and logits.

    Args:
        method: on the meta device, where tensors have sizes and no content. Its encoder is run
            there, so activations are counted, not guessed: all that autograd keeps. bfloat16
            halves them.
    """
    encoder = method.transfer_encoder()
    size = cfg.DATA.SIZE
    images = images_per_process // cfg.TRAIN.ACCUMULATION_STEPS
    views = torch.empty(images, cfg.DATA.CHANNELS, size, size, device="meta")
    trainable = sum(_bytes(p) for p in method.parameters() if p.requires_grad)
    # Where both encoders learn, backward keeps both passes.
    num_passes = max(1, round(trainable / sum(_bytes(p) for p in encoder.parameters())))
    kept = saved_bytes(encoder, views) * num_passes // (2 if cfg.TRAIN.AMP else 1)
    weights = sum(map(_bytes, (*method.parameters(), *method.buffers())))
    moments = trainable * (2 if cfg.TRAIN.OPTIMIZER == "adamw" else 1)
    logits = 2 * 4 * images * (1 + method.count_negatives(cfg.TRAIN.BATCH_SIZE))
    inputs = 2 * _bytes(views) * cfg.TRAIN.ACCUMULATION_STEPS
    return Memory(weights, trainable, moments, kept, inputs, logits)


def saved_bytes(network: nn.Module, images_BCHW: torch.Tensor) -> int:
    """Bytes that a forward pass in training mode keeps for backward, weights not counted."""
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor  # held, so that no two tensors get one address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(images_BCHW)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _norm_in_words(cfg: CfgNode, world_size: int) -> str:
    if cfg.MODEL.NORM == "SyncBN":
        return f"SyncBN over all {cfg.TRAIN.BATCH_SIZE} images"
    return f"groups of {_bn_group(cfg, world_size)} images (v1 and v2: {_BN_GROUP})"


def _bn_group(cfg: CfgNode, world_size: int) -> int:
    return images_per_forward(cfg, world_size) // cfg.MODEL.BN_SPLITS


def _negatives_in_words(cfg: CfgNode, method: Method, num_images: int) -> str:
    batch = cfg.TRAIN.BATCH_SIZE
    count = method.count_negatives(batch)
    words = f"{count} a query ({count / num_images:.1%} of {num_images} images)"
    if hasattr(method, "queue"):
        words += f", the keys of the last {count / (method.views_enqueued * batch):.1f} steps"
    return words


def _warnings(cfg: CfgNode, method: Method, num_images: int, world_size: int) -> list[str]:
    train, rule = cfg.TRAIN, linear_lr(cfg)
    out = []
    if abs(train.LR / rule - 1) > 0.01:
        out.append(
            f"TRAIN.LR {train.LR:g} is {train.LR / rule:.2f} times what the linear rule gives for "
            f"a batch of {train.BATCH_SIZE} ({rule:g})"
        )
    if method.shuffles_keys:
        group = _bn_group(cfg, world_size)
        if sees_whole_batch(cfg, world_size):
            out.append(WHOLE_BATCH_WARNING)
        elif group < _SMALL_BN_GROUP:
            out.append(f"batch norm sees groups of {group} images; published are {_BN_GROUP}")
    if hasattr(method, "queue"):
        out += _queue_warnings(cfg, method.queue.shape[1], num_images)
    left_out = num_images % train.BATCH_SIZE
    if left_out * 10 > num_images:
        out.append(
            f"{left_out} of {num_images} images are left out of each epoch, whose last batch "
            "would not be full; lower TRAIN.BATCH_SIZE"
        )
    return out


def _queue_warnings(cfg: CfgNode, size: int, num_images: int) -> list[str]:
    out = []
    if size % cfg.TRAIN.BATCH_SIZE:
        out.append(
            f"MOCO.QUEUE_SIZE {size} is no multiple of the batch {cfg.TRAIN.BATCH_SIZE}: it wraps "
            "within a step here, the reference refuses it"
        )
    if size >= num_images:
        out.append(
            f"MOCO.QUEUE_SIZE {size} is not below the {num_images} images: each image is its own "
            "negative, as an older key; lower it"
        )
    return out
