"""What `torch.load(weights_only=True)` lets pass and no checkpoint needs: refused by name."""

from __future__ import annotations

import torch

_ATTRIBUTES = {"_metadata"}  # that torch sets on a state dict


def odd_part(content: object) -> str | None:
    """Why the content of a file is refused, or None.

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
