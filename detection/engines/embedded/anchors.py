"""Anchors of one feature map (detectron2/modeling/anchor_generator.py).

Unlike torchvision's: not rounded, sizes outermost, and the stride is a constant, not the image
size divided by the grid size (which gives 15 where an image of 333 pixels meets a stride of 16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> torch.Tensor:
    """Boxes [num_sizes * num_ratios, 4] (x0, y0, x1, y1) around the origin, in pixels.

    A size is the square root of the area, an aspect ratio is height / width.
    """
    boxes = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            boxes.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
    return torch.tensor(boxes)


class AnchorGrid(nn.Module):
    """The cell anchors at every location of a feature map.

    Args:
        stride: pixels between neighbouring locations.
        offset: where in its cell a location lies, in strides, from 0 to below 1.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[float],
        aspect_ratios: Sequence[float],
        stride: int,
        offset: float,
    ):
        super().__init__()
        self.stride = stride
        self.offset = offset
        self.register_buffer("cell", cell_anchors(sizes, aspect_ratios), persistent=False)

    @property
    def num_per_location(self) -> int:
        return self.cell.shape[0]

    def forward(self, grid_height: int, grid_width: int) -> torch.Tensor:
        """Anchors [grid_height * grid_width * num_per_location, 4], rows of the grid outermost."""
        y, x = (
            torch.arange(
                self.offset * self.stride,
                length * self.stride,
                self.stride,
                dtype=torch.float32,
                device=self.cell.device,
            )
            for length in (grid_height, grid_width)
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        locations = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
        return (locations + self.cell).view(-1, 4)
