"""The view "whole": all of an image, squeezed into a square."""

from __future__ import annotations

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

from moco.data.augment import eval_resize, to_uint8_CHW
from moco.data.channels import open_planes
from moco.data.images import ImageSource
from moco.data.loader import _Loader


class WholeImages(Dataset):
    """`dataset[index]` -> (image uint8 [C, size, size], index, index); labels are not needed.

    Shorter side to size * 256 / 224, then both to `size`, bilinear: vissl's view for VOC07.
    """

    def __init__(self, source: ImageSource, size: int, channels: int = 3):
        self.source, self.size, self.channels = source, size, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        planes = []
        for plane in open_planes(self.source, index, self.channels):
            for size in (eval_resize(self.size), [self.size, self.size]):
                plane = functional.resize(plane, size, InterpolationMode.BILINEAR)
            planes.append(to_uint8_CHW(plane))
        return torch.cat(planes), index, index


def build_whole_loader(
    source: ImageSource,
    size: int,
    batch_size: int,
    num_workers: int,
    *,
    pin_memory: bool = False,
    channels: int = 3,
) -> DataLoader:
    """Loader of every image once, in order, as `build_eval_loader`'s."""
    dataset = WholeImages(source, size, channels)
    batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    return _Loader(dataset, batches, num_workers, pin_memory)
