"""Files that any program can use: what they are written as, and what is refused when read."""

from __future__ import annotations

import copy

import torch

_ATTRIBUTES = {"_metadata"}  # that torch sets on a state dict


def as_plain(content: object) -> object:
    """`content` with each of its tensors on the CPU, with the strides of a new tensor of its shape.

    Programs that know nothing of how these were computed rely on that: torch's fused optimizers
    go through weights and moments as they lie in memory, and a 1x1 convolution chooses its kernel
    by strides that `is_contiguous` does not tell apart. Tensors that are so already are not copied.
    """
    if torch.is_tensor(content):
        plain = content.cpu()
        if plain.layout == torch.strided and plain.stride() != _plain_strides(plain.shape):
            plain = plain.clone(memory_format=torch.contiguous_format)
        return plain
    if isinstance(content, dict):
        copied = copy.copy(content)  # a state dict keeps its attributes
        copied.update({name: as_plain(part) for name, part in content.items()})
        return copied
    if isinstance(content, list | tuple):
        return type(content)(as_plain(part) for part in content)
    return content


def _plain_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def odd_part(content: object) -> str | None:
    """Why the content of a file is refused, or None: what `torch.load(weights_only=True)` lets
    pass and no checkpoint needs.

    Refused are tensors that claim more elements than the file holds bytes for (a stride of 0 makes
    terabytes of four bytes), sparse and quantized ones, and attributes on containers, which can
    hide their methods.
    """
    seen: set[int] = set()
    parts = [content]
    while parts:
        part = parts.pop()
        if torch.is_tensor(part):
            reason = _odd_tensor(part)
            if reason:
                return reason
        elif isinstance(part, dict | list | tuple | set) and id(part) not in seen:
            seen.add(id(part))
            if set(getattr(part, "__dict__", ())) - _ATTRIBUTES:
                return "it sets attributes of a dict"
            parts.extend(dict.values(part) if isinstance(part, dict) else part)
    return None


def _odd_tensor(tensor: torch.Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return "it holds a sparse, quantized or empty tensor"
    held = tensor.untyped_storage().nbytes()
    claimed = tensor.numel() * tensor.element_size()
    if claimed > held:
        return f"a tensor of shape {tuple(tensor.shape)} claims {claimed} bytes, {held} are there"
    return None
