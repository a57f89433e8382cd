"""Records as one block of bytes, for loader processes to share."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np


class PackedRecords(Sequence):
    """A sequence of records that is copied to no forked process.

    Reading a Python object writes its reference count, so each loader process would come to own
    a copy of all records, which are gigabytes of COCO (as in Detectron2, data/common.py). Here an
    item is made anew when it is read.
    """

    def __init__(self, records: Sequence[dict]) -> None:
        pieces = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]])
