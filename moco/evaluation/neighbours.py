"""Nearest neighbours of test features among training features that need not be held at once.

Training features arrive in blocks; of each test sample only the k best neighbours so far are kept.
So memory does not grow with the number of training images. The order is exact: by cosine
similarity, of equal ones the lower index first, whatever the blocks.

Shapes: M test samples, N training samples, D features, k neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moco import distributed

BLOCK = 8192  # training features compared at a time
CHUNK = 256  # test samples compared at a time


class NeighbourSearch:
    """The `k` nearest training samples of each test sample.

    Args:
        test_features: [M, D] of any norm and float type; their unit vectors are kept in `dtype`.
        k: neighbours to keep; dtype: float16 halves the memory of features, which are then rounded
            before they are compared, in float32.
        chunk: test samples compared at a time.
    """

    def __init__(
        self,
        test_features: torch.Tensor,
        k: int,
        *,
        dtype: torch.dtype = torch.float32,
        chunk: int = CHUNK,
        block: int = BLOCK,
    ):
        self.k, self.dtype, self.chunk, self.block = k, dtype, chunk, block
        # In chunks, so that no second copy of all of them exists.
        self.test_MD = torch.empty(test_features.shape, dtype=dtype, device=test_features.device)
        for start in range(0, len(test_features), block):
            part = test_features[start : start + block]
            self.test_MD[start : start + block] = F.normalize(part.float(), dim=1)
        size = (len(test_features), k)
        self.similarity_MK = torch.full(size, -torch.inf, device=self.test_MD.device)
        self.index_MK = torch.full(size, -1, dtype=torch.int64, device=self.test_MD.device)

    def add(self, train_features: torch.Tensor, first: int) -> None:
        """Compare with training samples `first`, `first` + 1, ...; calls come in rising order.

        Args:
            train_features: [n, D] of any norm and float type.
        """
        for start in range(0, len(train_features), self.block):
            block_ND = F.normalize(
                train_features[start : start + self.block].to(self.test_MD.device).float(), dim=1
            )
            self._merge_block(block_ND.to(self.dtype).float(), first + start)

    def _merge_block(self, block_ND: torch.Tensor, first: int) -> None:
        for start in range(0, len(self.test_MD), self.chunk):
            rows = slice(start, start + self.chunk)
            similarity = self.test_MD[rows].float() @ block_ND.T
            if similarity.device.type != "cpu":  # asking how many would wait for the device
                best, index = stable_topk(similarity, min(self.k, len(block_ND)))
                self._merge(rows, best, index + first)
                continue
            # Only what is above the k-th so far can enter, since of equals the earlier stays. After
            # the first blocks that is little, and a search for few is much faster.
            entering = int((similarity > self.similarity_MK[rows, -1:]).sum(dim=1).max())
            if entering:
                best, index = stable_topk(similarity, min(self.k, entering))
                self._merge(rows, best, index + first)

    def _merge(self, rows: slice, similarity: torch.Tensor, index: torch.Tensor) -> None:
        """Join with later neighbours, sorted as ours are: a stable sort keeps the earlier first."""
        similarity = torch.cat([self.similarity_MK[rows], similarity], dim=1)
        index = torch.cat([self.index_MK[rows], index], dim=1)
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        self.similarity_MK[rows] = similarity[:, : self.k]
        self.index_MK[rows] = index.gather(1, order[:, : self.k])

    def join_processes(self) -> None:
        """Give every process the neighbours among the training samples of all.

        Rank r must have searched indices below those of rank r + 1.
        """
        if distributed.world_size() == 1:
            return
        all_similarity = distributed.all_gather_cat(self.similarity_MK[None])
        all_index = distributed.all_gather_cat(self.index_MK[None])
        self.similarity_MK, self.index_MK = all_similarity[0], all_index[0]
        for similarity, index in zip(all_similarity[1:], all_index[1:], strict=True):
            self._merge(slice(None), similarity, index)


def stable_topk(values_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of each row, falling, and their columns; of equal values the first columns.

    torch.topk leaves open which of equal values it takes, and their order. On a CPU these are
    looked for afterwards; a GPU, which would have to be waited for, gets values that differ.
    """
    if values_BN.device.type != "cpu" and values_BN.dtype == torch.float32:
        return _topk_of_keys(values_BN, k)
    best, index = values_BN.topk(k, dim=1)
    crowded = (values_BN >= best[:, -1:]).sum(dim=1) > k  # equal values on both sides of the cut
    if crowded.any():
        rows, order = values_BN[crowded].sort(dim=1, descending=True, stable=True)
        best[crowded], index[crowded] = rows[:, :k], order[:, :k]
    index, order = index.sort(dim=1)
    best, falling = best.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best, index.gather(1, falling)


def _topk_of_keys(values_BN: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`stable_topk` of float32 without NaN, by whole numbers that order value and then column."""
    bits = (values_BN + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    columns = torch.arange(values_BN.shape[1], device=values_BN.device)
    keys_BN = (rising << 32) + (0xFFFFFFFF - columns)
    index = 0xFFFFFFFF - (keys_BN.topk(k, dim=1).values & 0xFFFFFFFF)
    return values_BN.gather(1, index), index


def memory_plan(
    *,
    num_train: int,
    num_test: int,
    width: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    chunk: int = CHUNK,
    block: int = BLOCK,
) -> dict[str, int]:
    """Bytes that a search needs, by what they are for, computed from the sizes.

    Not all of it at one time, so their sum is a bound.
    """
    block = min(block, num_train)
    return {
        "test features": num_test * width * (4 + dtype.itemsize),  # as extracted, and as compared
        "neighbours": num_test * k * (4 + 8),
        # as they came, joined, and as unit vectors
        "block of training features": 3 * block * width * 4,
        # and their comparison with the k-th
        "similarities": chunk * block * (4 + 1),
        # candidates, their sort and its result
        "merge": 3 * chunk * 2 * k * (4 + 8),
    }
