"""The view "whole": all of an image, squeezed into a square."""

from __future__ import annotations

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

from moco.data.augment import eval_resize, to_uint8_CHW
from moco.data.images import ImageSource
from moco.data.loader import _Loader


class WholeImages(Dataset):
    """`dataset[index]` -> (image uint8 [3, size, size], index, index); labels are not needed.

    Shorter side to size * 256 / 224, then both to `size`, bilinear: vissl's view for VOC07.
    """

    def __init__(self, source: ImageSource, size: int):
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        image = self.source.open(index)
        for size in (eval_resize(self.size), [self.size, self.size]):
            image = functional.resize(image, size, InterpolationMode.BILINEAR)
        return to_uint8_CHW(image), index, index


def build_whole_loader(
    source: ImageSource, size: int, batch_size: int, num_workers: int, *, pin_memory: bool = False
) -> DataLoader:
    """Loader of every image once, in order, as `build_eval_loader`'s."""
    dataset = WholeImages(source, size)
    batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    return _Loader(dataset, batches, num_workers, pin_memory)
