"""What the checks of all data formats share: their report, and the size of an image file."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from detection.data.transforms import IMAGE_FORMATS, exif_orientation
from moco.errors import DataError

_QUARTER_TURNS = (5, 6, 7, 8)
_NUM_PROBLEMS_SHOWN = 5
_LONGEST_SHOWN = 200  # characters of a value that is not allowed
_MOST_BYTES = 64 << 20  # of an annotation or a split; those of VOC have kilobytes


@dataclass
class CheckReport:
    """What a check of data found.

    Attributes:
        repairs: kind -> how often it was repaired.
        first_seen: kind -> the file (and field) where it was met first.
        problems: what cannot be repaired, each `file: field: given; allowed`.
        num_images, num_boxes: what was read without a problem.
    """

    repairs: Counter = field(default_factory=Counter)
    first_seen: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_images: int = 0
    num_boxes: int = 0

    def repaired(self, kind: str, where: str) -> None:
        self.repairs[kind] += 1
        self.first_seen.setdefault(kind, where)

    def problem(self, where: object, what: str, given: object, allowed: str) -> None:
        given = str(given)
        if len(given) > _LONGEST_SHOWN:
            given = f"{given[:_LONGEST_SHOWN]}... ({len(given)} characters)"
        self.problems.append(" ".join(f"{where}: {what}: {given}; {allowed}".split()))

    def merge(self, other: CheckReport) -> None:
        """Add another report's findings to this one."""
        self.repairs.update(other.repairs)
        for kind, where in other.first_seen.items():
            self.first_seen.setdefault(kind, where)
        self.problems.extend(other.problems)
        self.num_images += other.num_images
        self.num_boxes += other.num_boxes

    def lines(self) -> list[str]:
        """The whole report for people: totals, repairs by kind, then every problem."""
        return [
            f"{self.num_images} images, {self.num_boxes} boxes read",
            *(
                f"{count} x {kind} (first: {self.first_seen[kind]})"
                for kind, count in self.repairs.items()
            ),
            *self.problems,
        ]


def read_small_file(path: Path) -> bytes:
    """The bytes of an annotation or a split file.

    Raises: OSError also for what is no regular file, since a pipe would be waited for for ever;
        ValueError for more than 64 MiB.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("is no regular file")
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) after EXIF orientation, read from the header without decoding.

    Raises: OSError or ValueError where PIL cannot read it.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("is no regular file")  # Image.open would wait for a pipe
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            turned = exif_orientation(image) in _QUARTER_TURNS
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    return (width, height) if turned else (height, width)


def raise_for_problems(report: CheckReport) -> None:
    """Raise DataError, in one line, if the report lists a problem; `error.report` has them all."""
    problems = list(dict.fromkeys(report.problems))
    if not problems:
        return
    shown = " | ".join(problems[:_NUM_PROBLEMS_SHOWN])
    rest = len(problems) - _NUM_PROBLEMS_SHOWN
    more = f" | and {rest} more" if rest > 0 else ""
    noun = "problem" if len(problems) == 1 else "problems"
    head = f"data check: {len(problems)} {noun} to correct before training"
    error = DataError(f"{head}: {shown}{more}")
    error.report = report
    raise error
