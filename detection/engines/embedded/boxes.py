"""torchvision's box coder and matcher, and indices of flags, without waits for a GPU.

torchvision makes a tensor of each constant in every call, and looks up which pairs are best: on a
GPU each of these waits until it has done all it was given. The numbers are torchvision's, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.models.detection import _utils as torchvision_boxes


class BoxCoder(torchvision_boxes.BoxCoder):
    def encode_single(
        self, reference_boxes: torch.Tensor, proposals: torch.Tensor
    ) -> torch.Tensor:
        return torchvision_boxes.encode_boxes(reference_boxes, proposals, self.weights)

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes [N, 4 K] of deltas [N, 4 K] to boxes [N, 4]."""
        deltas = [d / w for d, w in zip(self._unbind(rel_codes), self.weights, strict=True)]
        boxes, low, high = boxes.to(rel_codes.dtype), [], []
        for axis in (0, 1):
            start, end = boxes[:, axis, None], boxes[:, axis + 2, None]
            length = end - start
            middle = deltas[axis] * length + (start + 0.5 * length)
            grown = torch.exp(deltas[axis + 2].clamp(max=self.bbox_xform_clip)) * length
            low.append(middle - 0.5 * grown)
            high.append(middle + 0.5 * grown)
        return torch.stack([*low, *high], dim=2).flatten(1)

    @staticmethod
    def _unbind(rel_codes: torch.Tensor) -> Sequence[torch.Tensor]:
        return rel_codes.unflatten(1, (-1, 4)).unbind(2)


class Matcher(torchvision_boxes.Matcher):
    def set_low_quality_matches_(
        self, matches: torch.Tensor, all_matches: torch.Tensor, match_quality_matrix: torch.Tensor
    ) -> None:
        """Match a prediction again where no other overlaps a ground-truth box more."""
        highest_N1 = match_quality_matrix.amax(dim=1, keepdim=True)
        is_best = (match_quality_matrix == highest_N1).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))


def count_true(flags: Sequence[torch.Tensor]) -> list[int]:
    """How many of each are true, in one wait for all of them."""
    return torch.stack([f.sum() for f in flags]).tolist()


def true_indices(flags_N: torch.Tensor, count: int) -> torch.Tensor:
    """Where `flags_N` are true, as many as `count` says: with it a GPU need not be asked."""
    if flags_N.is_cuda:
        return flags_N.nonzero_static(size=count)[:, 0]
    return flags_N.nonzero()[:, 0]
