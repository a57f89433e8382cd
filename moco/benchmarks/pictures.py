"""Generated pictures with the statistics of photographs, where no photographs may be had."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

_DETAIL = 1.25  # amplitude falls as frequency^-_DETAIL; photographs have 1.0 to 1.5
_JPEG_QUALITY = 90


def natural_picture(seed: int, width: int = 500, height: int = 400) -> np.ndarray:
    """uint8 [height, width, 3]: noise with a photograph's spectrum, cut by edges.

    Brightness varies more than colour; at JPEG quality 90 it takes about 4 bits a pixel, as
    ImageNet's photographs do.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = []
    for amplitude in (52.0, 16.0, 16.0):  # brightness, two colour differences
        noise = rng.standard_normal((height, width))
        plane = np.fft.irfft2(np.fft.rfft2(noise) * frequency**-_DETAIL, s=(height, width))
        planes.append(plane * (amplitude / plane.std()))
    light, red, blue = planes
    rows, columns = np.mgrid[:height, :width]
    for _ in range(6):  # half-planes of another brightness and colour: edges through the picture
        angle = rng.uniform(0, 2 * np.pi)
        side = (columns - rng.uniform(0, width)) * np.cos(angle)
        side = side + (rows - rng.uniform(0, height)) * np.sin(angle) > 0
        light, red, blue = (
            plane + side * rng.normal(0, spread)
            for plane, spread in ((light, 25), (red, 18), (blue, 18))
        )
    light = light - light.mean() + rng.uniform(90, 150)
    pixels = np.stack([light + red, light - 0.5 * (red + blue), light + blue], axis=2)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def natural_jpeg(seed: int, width: int = 500, height: int = 400) -> bytes:
    """`natural_picture` as a JPEG file with 4:2:0 chroma."""
    file = io.BytesIO()
    Image.fromarray(natural_picture(seed, width, height)).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
