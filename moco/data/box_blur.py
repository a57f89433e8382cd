"""The boxes of PIL's Gaussian blur, which all backends share."""

from __future__ import annotations

import math


def box_weights(sigma: float) -> list[float]:
    """One of PIL's three boxes (BoxBlur.c, after Gwosdek et al. 2011): 2 R + 3 weights.

    2 R + 1 equal weights and a smaller one at each end, so that the three boxes together have the
    variance sigma^2.
    """
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) ** 2)
    weight = 1 / (2 * (whole + part) + 1)
    end = (1 - (2 * whole + 1) * weight) / 2
    return [end, *[weight] * (2 * whole + 1), end]
