"""What 16-bit grey images use of their range.

Twelve-bit values (medical, satellite) in 16-bit files keep 16 grey levels of 256 when the full
range is scaled. The range that is right is the sensor's, which no file tells, so it is a key of the
configuration; here a few images are looked at, and a range is proposed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moco.data.rgb import Decoding, grey_levels, is_sixteen_bit, opened
from moco.errors import DataError

NUM_LOOKED_AT, MOST_DECODED = 32, 8
_FEWEST_LEVELS = 64  # of 256, from black to white
_PERCENTILES = (0.1, 99.9)  # a dead or burnt-out pixel says nothing
_MOST_OUTSIDE = 0.01  # of the pixels


@dataclass(frozen=True)
class SixteenBitUse:
    """Of one image: the values most of its pixels lie between, and the share outside the range."""

    low: int
    high: int
    outside: float


def sixteen_bit_use(file: io.BytesIO | str, decoding: Decoding) -> SixteenBitUse | None:
    """None for an image of another kind. Raises: what Pillow raises for a file."""
    with opened(file, decoding) as image:
        if not is_sixteen_bit(image):
            return None
        values = np.asarray(image)
    low, high = np.percentile(values, _PERCENTILES)
    black, white = decoding.sixteen_bit_range
    outside = float(((values < black) | (values > white)).mean())
    return SixteenBitUse(int(low), int(high), outside)


def look_at_sixteen_bits(source) -> list[str]:
    """Lines about the 16-bit grey among `NUM_LOOKED_AT` images spread over a source.

    Args:
        source: `ImageSource` or anything like it.
    """
    number = min(len(source), NUM_LOOKED_AT)
    found: list[SixteenBitUse] = []
    for index in (i * len(source) // number for i in range(number)):
        if len(found) == MOST_DECODED:
            break
        try:
            use = sixteen_bit_use(io.BytesIO(source.read_bytes(index)), source.decoding)
        except DataError:
            continue
        except Exception:  # an unreadable image is the loader's to report, or to replace
            continue
        if use is not None:
            found.append(use)
    return lines_about(found, source.decoding, "DATA.SIXTEEN_BIT_RANGE")


def lines_about(
    uses: Sequence[SixteenBitUse], decoding: Decoding, key: str, of: int | None = None
) -> list[str]:
    """What to say of 16-bit images that were looked at, none where there was none.

    Args:
        key: the name of the range's key.
        of: how many there are in all, where that is known.
    """
    if not uses:
        return []
    low, high = min(use.low for use in uses), max(use.high for use in uses)
    levels = grey_levels(low, high, decoding.sixteen_bit_range)
    number = f"{len(uses)} of {of}" if of is not None else str(len(uses))
    start = f"16-bit grey: {number} such images looked at, values"
    given = f"{key} {decoding.sixteen_bit_range}"
    line = f"{start} {low} to {high}: {levels} of 256 grey levels by {given}"
    proposed = proposed_range(low, high)
    if levels < _FEWEST_LEVELS and low < high:
        others = grey_levels(low, high, proposed)
        line = f"warning: {line}; {key} '{proposed}' would give {others}"
    outside = sum(use.outside for use in uses) / len(uses)
    if outside > _MOST_OUTSIDE:
        line += (
            f"; warning: {outside:.0%} of their pixels lie outside and become black or white"
        )
    return [line]


def proposed_range(low: int, high: int) -> tuple[int, int]:
    """From 0 to the largest number of as many bits; where the values begin far above 0, theirs."""
    white = (1 << max(high.bit_length(), 1)) - 1
    if grey_levels(low, high, (0, white)) >= _FEWEST_LEVELS:
        return (0, white)
    return (low, max(high, low + 1))
