"""Features of a frozen encoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from moco.data.augment import normalize
from moco.errors import NonFiniteError


@contextlib.contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`module.eval()` inside the block; afterwards every submodule has its own mode back."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for submodule, training in modes:
            submodule.training = training


def extract_features(
    encode: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable,
    device: torch.device | str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode every image of a loader built by `build_eval_loader`.

    The caller puts the model into eval mode, with `evaluation_mode(model)`, and chooses by
    `encode` whether the features are the backbone's or the head's. Batch-norm buffers are then
    only read.

    Args:
        encode: normalised images [B, 3, H, W] on `device` -> features [B, D].
    Returns: (features float32 [N, D] with L2 norm 1, labels int64 [N]), both on the CPU.
    Raises: NonFiniteError where a feature is NaN or Inf.
    """
    owner = getattr(encode, "__self__", encode)
    assert not (isinstance(owner, torch.nn.Module) and any(m.training for m in owner.modules())), (
        "extract_features needs a model in eval mode; use evaluation_mode(model)"
    )
    features, labels = [], []
    num_images = 0
    with torch.inference_mode():
        for images_BCHW, label_B, _ in loader:
            images_BCHW = images_BCHW.to(device, non_blocking=True)
            features_BD = encode(normalize(images_BCHW, mean, std)).float()
            if not torch.isfinite(features_BD).all():
                raise NonFiniteError(
                    f"features of images {num_images} to {num_images + len(label_B) - 1} are not "
                    "finite; the weights have diverged, use an earlier checkpoint"
                )
            num_images += len(label_B)
            features.append(F.normalize(features_BD, dim=1).cpu())
            labels.append(label_B)
    # Joined outside inference mode, so that a classifier can be trained on the result.
    return torch.cat(features), torch.cat(labels)
