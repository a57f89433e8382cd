"""Which images a run has trained on, collected from all ranks and kept in its checkpoints.

Loader workers hash an image when they first read it (`moco.data.first_sight`). A rank keeps what
came with the batches it trained on; ranks exchange it when an epoch ends and before a checkpoint,
so that a checkpoint knows exactly the images that its weights have seen.
"""

from __future__ import annotations

import numpy as np
import torch

from moco.data.first_sight import Seen, SeenFlags, joined
from moco.data.image_rows import ROW_BYTES
from moco.distributed import ProcessInfo, all_gather_cat
from moco.errors import CheckpointError
from moco.training.image_record import FORMAT, ImageRecord, Unknown, checked_rows, merged

_NUMBER_BYTES = 8


class SeenImages:
    """The hashes of the images that a run has trained on.

    Args:
        num_images: of the source; their numbers are what `add` is given.
    """

    def __init__(self, num_images: int, process: ProcessInfo):
        self.flags = SeenFlags(num_images)
        self.process = process
        self.lacks = ""  # why images may be missing
        self._can_fill = False  # those would be images of this list
        self._waiting: list[tuple[int, Seen]] = []  # with the step that shows them
        self._known = np.zeros(num_images, bool)
        # Rank 0 alone writes checkpoints; 24 bytes an image are not kept in every process.
        self._rows = np.zeros((num_images if process.is_main else 0, ROW_BYTES), np.uint8)
        self._earlier = np.zeros((0, ROW_BYTES), np.uint8)  # of another list of images

    def __len__(self) -> int:
        return int(self._known.sum()) + len(self._earlier)

    @property
    def max_bytes(self) -> int:
        """What it takes in a checkpoint once all images are known."""
        return len(self._known) * ROW_BYTES + len(self._known) // 8 + self._earlier.nbytes

    def begin_with(self, record: ImageRecord | Unknown) -> None:
        """Take in what the weights that a new run begins with have seen before."""
        if isinstance(record, Unknown):
            self.lacks = f"those of the weights it began with are unknown ({record.reason})"
            return
        self._earlier, self.lacks = record.rows, record.lacks

    def add(self, step: int, seen: Seen) -> None:
        """Images in the batch of `step` (0 is the first) that are seen for the first time."""
        new = ~self._known[seen.index]
        self.flags.mark(seen.index)
        if new.any():
            self._waiting.append((step, Seen(seen.index[new], seen.rows[new])))

    def gather(self, last_step: int) -> None:
        """Take in what all ranks were shown in the first `last_step` steps; a collective.

        Batches that were loaded ahead wait for their step.
        """
        shown = joined([seen for step, seen in self._waiting if step < last_step])
        self._waiting = [(step, seen) for step, seen in self._waiting if step >= last_step]
        seen = self._of_all_ranks(shown)
        if seen is None:
            return
        self._known[seen.index] = True
        if self.process.is_main:
            self._rows[seen.index] = seen.rows
        self.flags.mark(seen.index)
        if self._can_fill and self._known.all():
            self.lacks, self._can_fill = "", False

    def _of_all_ranks(self, own: Seen | None) -> Seen | None:
        count = 0 if own is None else len(own.index)
        counts = all_gather_cat(torch.tensor([count], device=self.process.device)).tolist()
        if not any(counts):
            return None
        packed = np.zeros((max(counts), _NUMBER_BYTES + ROW_BYTES), np.uint8)
        if own is not None:
            numbers = own.index.astype("<i8").view(np.uint8).reshape(count, _NUMBER_BYTES)
            packed[:count, :_NUMBER_BYTES], packed[:count, _NUMBER_BYTES:] = numbers, own.rows
        everyone = all_gather_cat(torch.from_numpy(packed).to(self.process.device)).cpu().numpy()
        parts = everyone.reshape(len(counts), max(counts), -1)
        packed = np.concatenate([part[:n] for part, n in zip(parts, counts, strict=True)])
        index = np.ascontiguousarray(packed[:, :_NUMBER_BYTES]).view("<i8").ravel()
        return Seen(index, packed[:, _NUMBER_BYTES:])

    def state(self) -> dict[str, object]:
        """On rank 0: plain values and tensors, for a checkpoint."""
        return {
            "format": FORMAT,
            "known": torch.from_numpy(np.packbits(self._known)),  # a bit an image of the list
            "rows": torch.from_numpy(self._rows[self._known]),
            "earlier": torch.from_numpy(self._earlier),
            "lacks": self.lacks,
            "can_fill": self._can_fill,
        }

    def summary(self) -> dict[str, object]:
        """For a checkpoint's manifest."""
        return {"num_known": len(self), "num_images": len(self._known), "lacks": self.lacks}

    def restore(self, where: str, found: object, *, step: int, same_images: bool) -> None:
        """Go on from the record of a checkpoint after `step` steps; None where it has none.

        Args:
            same_images: the list of images is the checkpoint's.
        Raises: CheckpointError where the record is damaged.
        """
        if found is None:
            if step:
                self.lacks = f"the first {step} steps were not recorded ({where})"
                self._can_fill = same_images
            return
        rows, earlier = (checked_rows(found, name, where) for name in ("rows", "earlier"))
        self.lacks = str(found.get("lacks", ""))
        self._can_fill = same_images and found.get("can_fill") is True
        if not same_images:
            self._earlier = merged([rows, earlier])
            return
        self._earlier = earlier
        bits, count = found.get("known"), len(self._known)
        known = np.zeros(0, bool)
        if torch.is_tensor(bits) and bits.dtype == torch.uint8 and len(bits) == -(-count // 8):
            known = np.unpackbits(bits.numpy(), count=count).astype(bool)
        if known.sum() != len(rows) or len(known) != count:
            raise CheckpointError(f"{where}: its record of images is damaged; give another file")
        self._known = known
        if self.process.is_main:
            self._rows[known] = rows
        self.flags.mark(np.flatnonzero(known))
