"""Features of a frozen encoder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from moco.data.augment import normalize
from moco.errors import NonFiniteError
from moco.training.progress import format_duration

_BATCHES_UNREAD = 64  # on a GPU
_QUIET_SECONDS = 30.0  # between lines about the rate
_FIRST_SECONDS = 5.0  # before the first of them


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


class RateLines:
    """Lines about how many of `total` images are done: after 5 s, then every half minute."""

    def __init__(self, what: str, total: int, say: Callable[[str], None]):
        self.what, self.total, self.say = what, total, say
        self.done = 0
        self.started = time.monotonic()
        self.last = self.started - _QUIET_SECONDS + _FIRST_SECONDS

    def add(self, num_images: int) -> None:
        self.done += num_images
        now = time.monotonic()
        if now - self.last >= _QUIET_SECONDS:
            self.last = now
            rate = self.done / (now - self.started)
            left = format_duration((self.total - self.done) / rate)
            self.say(f"{self.what}: {self.done}/{self.total} images {rate:.1f} img/s ETA {left}")


def encoder_function(
    encoder: torch.nn.Module, features: str, *, amp: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images [B, 3, H, W] -> features [B, D] of the "backbone" or the "head", under bfloat16
    autocast where `amp` is set. The encoder must be in eval mode."""
    _check_eval_mode(encoder)
    encode = encoder.forward_features if features == "backbone" else encoder

    def function(images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images_BCHW.device.type, dtype=torch.bfloat16, enabled=amp):
            return encode(images_BCHW)

    return function


def feature_width(
    encode: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    device: torch.device,
    channels: int = 3,
) -> int:
    """How many features `encode` gives for an image of `size` pixels."""
    with torch.inference_mode():
        return encode(torch.zeros(1, channels, size, size, device=device)).shape[1]


def iterate_features(
    encode: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable,
    device: torch.device | str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    channels_last: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Encode the batches of a loader built by `build_eval_loader`.

    The caller puts the model into eval mode, so batch-norm buffers are only read.

    Args:
        encode: normalised images [B, 3, H, W] on `device` -> features [B, D].
    Yields: (features float32 [B, D] as they are, on `device`; labels int64 [B] on the CPU).
    Raises: NonFiniteError where a feature is NaN or Inf; on a GPU, which is not waited for in every
        batch, up to 64 batches later and before the last one is done with.
    """
    _check_eval_mode(getattr(encode, "__self__", encode))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    finite = _FiniteWatch(1 if torch.device(device).type == "cpu" else _BATCHES_UNREAD)
    for images_BCHW, label_B, _ in loader:
        with torch.inference_mode():
            images_BCHW = normalize(images_BCHW.to(device, non_blocking=True), mean, std)
            features_BD = encode(images_BCHW.contiguous(memory_format=memory_format)).float()
            finite.add(features_BD)
        yield features_BD, label_B
    finite.read()


class _FiniteWatch:
    """Whether features are finite, read from the device every `period` batches."""

    def __init__(self, period: int):
        self.period, self.num_images = period, 0
        self.unread: list[tuple[int, int, torch.Tensor]] = []

    def add(self, features_BD: torch.Tensor) -> None:
        first, self.num_images = self.num_images, self.num_images + len(features_BD)
        self.unread.append((first, self.num_images - 1, torch.isfinite(features_BD).all()))
        if len(self.unread) == self.period:
            self.read()

    def read(self) -> None:
        unread, self.unread = self.unread, []
        if not unread:
            return
        flags = torch.stack([flag for *_, flag in unread]).tolist()
        for (first, last, _), is_finite in zip(unread, flags, strict=True):
            if not is_finite:
                raise NonFiniteError(
                    f"features of images {first} to {last} are not finite; the weights have "
                    "diverged, use an earlier checkpoint"
                )


def extract_features(
    encode: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable,
    device: torch.device | str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode every image of a loader; arguments and errors as of `iterate_features`.

    Returns: (features float32 [N, D] with L2 norm 1, labels int64 [N]), both on the CPU.
    """
    features, labels = [], []
    for features_BD, label_B in iterate_features(encode, loader, device, mean, std):
        features.append(F.normalize(features_BD, dim=1).cpu())
        labels.append(label_B)
    # Joined outside inference mode, so that a classifier can be trained on the result.
    return torch.cat(features), torch.cat(labels)


def _check_eval_mode(owner: object) -> None:
    assert not (isinstance(owner, torch.nn.Module) and any(m.training for m in owner.modules())), (
        "features need a model in eval mode; use evaluation_mode(model)"
    )
