from __future__ import annotations

import math

import torch

from detection.engines.embedded.anchors import AnchorGrid, cell_anchors


def test_cell_anchors_are_size_major_and_not_rounded():
    anchors = cell_anchors([32, 64], [0.5, 1.0, 2.0])
    # size 32, height / width 0.5: width 32 * sqrt(2), height half of it
    half_width, half_height = 16 * math.sqrt(2), 8 * math.sqrt(2)
    expected = torch.tensor(
        [
            [-half_width, -half_height, half_width, half_height],
            [-16.0, -16.0, 16.0, 16.0],
            [-half_height, -half_width, half_height, half_width],
            [-2 * half_width, -2 * half_height, 2 * half_width, 2 * half_height],
            [-32.0, -32.0, 32.0, 32.0],
            [-2 * half_height, -2 * half_width, 2 * half_height, 2 * half_width],
        ]
    )
    torch.testing.assert_close(anchors, expected, rtol=1e-6, atol=0)
    assert not torch.equal(anchors, anchors.round())


def test_the_grid_runs_along_rows_with_the_constant_stride():
    grid = AnchorGrid(sizes=[32, 64], aspect_ratios=[1.0], stride=16, offset=0.0)
    anchors = grid(2, 21)  # 21 columns: 333 pixels, where image // grid would be 15
    assert anchors.shape == (2 * 21 * 2, 4)
    assert anchors[0].tolist() == [-16.0, -16.0, 16.0, 16.0]
    assert anchors[1].tolist() == [-32.0, -32.0, 32.0, 32.0]
    assert anchors[2].tolist() == [0.0, -16.0, 32.0, 16.0]  # next column
    assert anchors[2 * 20].tolist() == [304.0, -16.0, 336.0, 16.0]  # last column: 20 x 16
    assert anchors[2 * 21].tolist() == [-16.0, 0.0, 16.0, 32.0]  # next row


def test_the_offset_is_in_strides_and_nothing_is_saved():
    grid = AnchorGrid(sizes=[32], aspect_ratios=[1.0], stride=16, offset=0.5)
    assert grid(1, 2).tolist() == [[-8.0, -8.0, 24.0, 24.0], [8.0, -8.0, 40.0, 24.0]]
    assert grid.num_per_location == 1
    assert dict(grid.state_dict()) == {}
