"""What the checks of all data formats share: their report, and the size of an image file."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from detection.data.account import counted
from detection.data.transforms import exif_orientation
from moco.data.rgb import DEFAULT_DECODING, Decoding, is_sixteen_bit, opened
from moco.errors import DataError

EXIF_TURNED = (
    "image with an EXIF orientation: turned, as Detectron2 does, and its boxes are taken to be "
    "those of the turned image"
)
OTHER_UNICODE_FORM = "name in another Unicode form (NFC, NFD) than its file's: taken as the same"
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
        unread_boxes: reason -> how many boxes of the files are in no record.
        sixteen_bit: the files of 16-bit grey.
        notes: lines on the whole, first of all what of it is used (`detection.data.account`).
    """

    repairs: Counter = field(default_factory=Counter)
    first_seen: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_images: int = 0
    num_boxes: int = 0
    unread_boxes: Counter = field(default_factory=Counter)
    sixteen_bit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        self.unread_boxes.update(other.unread_boxes)
        self.sixteen_bit.extend(other.sixteen_bit)
        self.notes.extend(other.notes)

    def lines(self) -> list[str]:
        """The whole report for people: totals, repairs by kind, then every problem."""
        total = f"{counted(self.num_images, 'image')}, {counted(self.num_boxes, 'box')} read"
        return [
            *(self.notes or [total]),
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


@dataclass(frozen=True)
class ImageHeader:
    """What an image's header says.

    Attributes:
        height, width: after EXIF orientation.
        orientation: EXIF's, 1 (upright) to 8.
        is_sixteen_bit: grey of 16 bits.
    """

    height: int
    width: int
    orientation: int
    is_sixteen_bit: bool

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) as stored, before the orientation is applied."""
        turned = self.orientation in _QUARTER_TURNS
        return (self.width, self.height) if turned else (self.height, self.width)


def image_header(path: Path, decoding: Decoding = DEFAULT_DECODING) -> ImageHeader:
    """Read an image's header; no pixel is decoded.

    Raises: OSError or ValueError where PIL cannot read it, with the reason.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("is no regular file")  # Image.open would wait for a pipe
        with opened(path, decoding) as image:
            width, height = image.size
            orientation = exif_orientation(image)
            sixteen_bit = is_sixteen_bit(image)
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from error
    if orientation in _QUARTER_TURNS:
        height, width = width, height
    return ImageHeader(height, width, orientation, sixteen_bit)


def image_size(path: Path, decoding: Decoding = DEFAULT_DECODING) -> tuple[int, int]:
    """(height, width) after EXIF orientation. Raises: as `image_header`."""
    header = image_header(path, decoding)
    return header.height, header.width


def not_opened(error: OSError | ValueError) -> str:
    """Why an image cannot be opened, in the words of a problem."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, UnidentifiedImageError):  # its own words repeat the path
        reason = "no known image format"
    return f"does not open ({' '.join(reason.split())})"


def other_size(
    given: tuple[int, int],
    header: ImageHeader,
    corners: Sequence[tuple[float, float]],
    whose: str,
) -> str:
    """What to say where an annotation gives another size than its image's.

    Args:
        given: (height, width) of the annotation.
        corners: (right, lower) end of each of its boxes.
        whose: the file or element that gives it, "<size>".
    """
    found = f"the image is {header.width} x {header.height}"
    stored_height, stored_width = header.stored_size
    if header.orientation == 1 or given != (stored_height, stored_width):
        return found
    found += f" after its EXIF orientation {header.orientation}, which is applied; {whose} has the "
    found += "size of the unrotated image"
    fit_stored, fit_turned = (
        all(right <= width and lower <= height for right, lower in corners)
        for height, width in ((stored_height, stored_width), (header.height, header.width))
    )
    upright = (
        f"correct {whose} to {header.width} x {header.height}",
        "remove the EXIF orientation from the image",
    )
    if fit_stored and not fit_turned:
        return f"{found}, and the boxes fit only that one: {upright[1]}"
    if fit_turned and not fit_stored:
        return f"{found}, but the boxes fit only the rotated one: {upright[0]}"
    which = "both sizes" if fit_stored else "neither size"
    return (
        f"{found}, and the boxes fit {which}: look at one; where they are right on the image as "
        f"viewers show it, {upright[0]}, else {upright[1]}"
    )


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
