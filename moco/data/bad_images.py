"""What happens where an image is unreadable: another is shown instead, up to a share of them.

Without a policy the first unreadable image ends the run. Only the image itself counts as bad; a
disk that fails, or a shard that is damaged, always ends the run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moco import seeding
from moco.data.reading import UnreadableImage
from moco.errors import DataError

_TRIES = 100
_Image = TypeVar("_Image")


class BadImages:
    """Replaces unreadable images, counts and lists them.

    Which image comes instead depends on (seed, epoch, index) alone, so workers, processes and a
    resumed run agree. Each bad image is appended once to `bad_images.rank<r>.jsonl`, with its
    number, path and reason; all processes read each other's lists, and those of the run they
    continue, to count.

    Args:
        num_images, root: of the source.
        max_fraction: of the images that may be bad.
        folder: where the lists are.
    """

    def __init__(
        self, num_images: int, root: str, *, seed: int, max_fraction: float, folder: Path, rank: int
    ):
        self.num_images, self.root, self.seed = num_images, root, seed
        self.max_fraction = max_fraction
        self.limit = int(max_fraction * num_images)
        self.folder = Path(folder)
        self.list = self.folder / f"bad_images.rank{rank}.jsonl"
        self.known: set[int] = set()
        self._read_up_to: dict[Path, int] = {}

    def read(
        self, read: Callable[[int], _Image], epoch: int, index: int
    ) -> tuple[_Image, int]:
        """`read(index)` and `index`, or those of the image that replaces it.

        The replacement's own number is returned: everything that follows (its draws, its class) is
        what it would be had the order named it.

        Raises: DataError where more images are bad than are allowed.
        """
        chosen = index
        for attempt in range(1, _TRIES + 1):
            try:
                return read(chosen), chosen
            except UnreadableImage as error:
                self._note(chosen, error)
            rng = seeding.python_random(self.seed, "replacement", epoch, index, attempt)
            chosen = rng.randrange(self.num_images)
        raise DataError(f"{self.root}: {_TRIES} images drawn one after another are all unreadable")

    def _note(self, index: int, error: UnreadableImage) -> None:
        self._read_lists()
        if index not in self.known:
            self._append({"index": index, "path": error.name, "reason": error.reason})
            self.known.add(index)
            print(
                f"warning: {error}; another image is shown instead ({len(self.known)} bad images, "
                f"{self.limit} of {self.num_images} are allowed)",
                file=sys.stderr,
                flush=True,
            )
        if len(self.known) > self.limit:
            raise DataError(
                f"{self.root}: {len(self.known)} of {self.num_images} images are unreadable, "
                f"DATA.MAX_BAD_FRACTION {self.max_fraction:g} allows {self.limit}; they are listed "
                f"in {self.list}, the last: {error}"
            )

    def _append(self, record: dict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One write in append mode: lines of several workers do not mix.
            with open(self.list, "ab", buffering=0) as file:
                file.write((json.dumps(record) + "\n").encode())
        except OSError as error:
            raise DataError(f"{self.list}: cannot be written ({error.strerror})") from error

    def _read_lists(self) -> None:
        """Take in the lines that came since the last time."""
        for path in sorted(self.folder.glob("bad_images.rank*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._read_up_to.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read_up_to[path] = self._read_up_to.get(path, 0) + len(whole)
            for line in whole.splitlines():
                try:
                    self.known.add(int(json.loads(line)["index"]))
                except (ValueError, KeyError, TypeError):
                    continue  # cut off when a process was killed; the image is listed again
