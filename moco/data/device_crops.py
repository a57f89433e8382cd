"""Crops made on the device: of a data set that lives there, or of images decoded there.

Loader workers then only draw parameters (and read files). Both classes turn a batch of theirs into
the batch of the device backend: (crop_q, crop_k, index, table_q, table_k), the crops uint8
[B, 3, size, size] on the device, the tables on the CPU.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from moco.data import image_hash
from moco.data.augment_device import BOX, crop_batch
from moco.data.decode import read_rgb
from moco.data.first_sight import FirstSight, Seen, joined
from moco.data.image_rows import EXACT_BYTES
from moco.data.images import ImageSource
from moco.data.reading import unreadable
from moco.devices import send
from moco.errors import ConfigError, DataError

MAX_RESIDENT_BYTES = 4 << 30
_TOGETHER = 1024  # images that are hashed together
DeviceBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class ResidentImages:
    """All images of a source, decoded once, as one uint8 tensor on the device.

    Called with (index, table_q, table_k), returns the device backend's batch.

    Raises: DataError where images differ in size, are unreadable or need too much memory.
    """

    def __init__(self, source: ImageSource, size: int, device: torch.device):
        first = read_rgb(source, 0)
        self.height, self.width = first.shape[:2]
        self.size = size
        num_bytes = first.nbytes * len(source)
        if num_bytes > MAX_RESIDENT_BYTES:
            raise DataError(
                f"{source.root}: {len(source)} images of {self.width} x {self.height} need "
                f"{num_bytes / 2**30:.1f} GiB on the device; AUGMENT.RESIDENT allows "
                f"{MAX_RESIDENT_BYTES >> 30}; set it False"
            )
        images_NHWC = np.empty((len(source), *first.shape), np.uint8)
        seen: list[Seen | None] = []
        for index in range(len(source)):
            image = read_rgb(source, index)
            if image.shape != first.shape:
                height, width = image.shape[:2]
                raise DataError(
                    f"{source.path(index)}: has {width} x {height} pixels, other images "
                    f"{self.width} x {self.height}; AUGMENT.RESIDENT needs one size; set it False"
                )
            images_NHWC[index] = image
            if isinstance(source, FirstSight):
                source.note(index, image[..., ::-1])
                if (index + 1) % _TOGETHER == 0 or index + 1 == len(source):
                    seen.append(source.take())
        self.seen = joined(seen)  # of all images, whether a step has shown them or not
        images = torch.from_numpy(images_NHWC).to(device)
        self.images_NCHW = images.permute(0, 3, 1, 2).contiguous()

    def __call__(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> DeviceBatch:
        index, table_q, table_k = batch
        chosen = send(index, self.images_NCHW.device)
        images = self.images_NCHW.index_select(0, chosen)
        crop_q, crop_k = (crop_batch(images, table, self.size) for table in (table_q, table_k))
        return crop_q, crop_k, index, table_q, table_k


class GpuDecoder:
    """Decodes JPEG files on the GPU (nvJPEG, through torchvision) and crops there.

    Called with (files, index, table_q, table_k), returns the device backend's batch. A file is
    uint8 [bytes], or [H, W, 3] where a worker had to decode it. nvJPEG's pixels differ from
    libjpeg's by a few levels, mostly where it enlarges the colour channels.
    torchvision calls its decoders deprecated since 0.29; one without them is refused like a device
    that cannot decode.

    Raises: ConfigError where the device cannot decode; DataError for a damaged image.
    """

    def __init__(self, source: ImageSource, size: int, device: torch.device):
        self.source, self.size, self.device = source, size, device
        problem = self._problem()
        if problem:
            raise ConfigError(
                f"AUGMENT.DECODE is gpu; {device} cannot decode JPEG ({problem}); allowed are a "
                "CUDA device and a torchvision with nvJPEG; set AUGMENT.DECODE cpu"
            )

    def _problem(self) -> str | None:
        """Why this device cannot decode; None where it can."""
        if self.device.type != "cuda":
            return "it is no CUDA device"
        picture = io.BytesIO()
        Image.new("RGB", (16, 16)).save(picture, "JPEG")
        file = torch.frombuffer(bytearray(picture.getvalue()), dtype=torch.uint8)
        try:
            self._decode([file])
        except (ImportError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
            return " ".join(str(error).split())
        return None

    def __call__(
        self,
        batch: tuple[list, torch.Tensor, torch.Tensor, torch.Tensor],
        seen: Seen | None = None,
    ) -> DeviceBatch:
        files, index, table_q, table_k = batch
        images = self._images(files, index)
        if seen is not None:
            _add_pixels(seen, files, index.tolist(), images)
        crop_q, crop_k = (self._crops(images, table) for table in (table_q, table_k))
        return crop_q, crop_k, index, table_q, table_k

    def _images(self, files: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
        """Images uint8 [3, H, W] on the device."""
        encoded = [number for number, file in enumerate(files) if file.ndim == 1]
        try:
            decoded = self._decode([files[number] for number in encoded])
        except RuntimeError:
            decoded = [self._decode_one(files[n], int(index[n])) for n in encoded]
        images = dict(zip(encoded, decoded, strict=True))
        return [
            images[number] if number in images else send(file, self.device).permute(2, 0, 1)
            for number, file in enumerate(files)
        ]

    def _decode_one(self, file: torch.Tensor, index: int) -> torch.Tensor:
        try:
            return self._decode([file])[0]
        except RuntimeError as error:
            raise unreadable(self.source.path(index), f"nvJPEG: {error}") from error

    def _decode(self, files: list[torch.Tensor]) -> list[torch.Tensor]:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(files, mode=ImageReadMode.RGB, device=self.device) if files else []

    def _crops(self, images: list[torch.Tensor], table: torch.Tensor) -> torch.Tensor:
        crops = []
        for image_CHW, box in zip(images, table[:, BOX].int().tolist(), strict=True):
            top, left, height, width = box
            crop = image_CHW[None, :, top : top + height, left : left + width].float()
            crops.append(F.interpolate(crop, (self.size,) * 2, mode="bilinear", antialias=True))
        return torch.cat(crops).add_(0.5).clamp_(0, 255).to(torch.uint8)


def _add_pixels(
    seen: Seen, files: list[torch.Tensor], index: list[int], images: list[torch.Tensor]
) -> None:
    """Write the perceptual hashes of the images that were decoded here, and not by a worker."""
    place = {number: row for row, number in enumerate(seen.index.tolist())}
    decoded = [n for n, file in enumerate(files) if file.ndim == 1 and index[n] in place]
    if decoded:
        thumbnails = np.stack([image_hash.thumbnail_on_device(images[n]) for n in decoded])
        rows = [place[index[n]] for n in decoded]
        seen.rows[rows, EXACT_BYTES :] = image_hash.near_hashes(thumbnails)
