"""Features kept in files, a fixed number of images in each.

A part is the unit of work: processes share the parts out, and an extraction that was stopped goes
on with the parts that are missing. Each has a manifest that says which weights and view made it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moco.data.images import ImageSource
from moco.data.loader import build_eval_loader
from moco.data.subset import SubsetSource
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError
from moco.evaluation.features import RateLines, iterate_features
from moco.training import checkpoint as ckpt

PART = 32768  # images in a file: 256 MiB of 2048 float32 features


class FeatureStore:
    """Features of one split under `folder`.

    Args:
        identity: what the features depend on (weights, view, images); parts of another identity
            are refused.
        dtype: of the stored features.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        source: ImageSource,
        identity: str,
        *,
        dtype: torch.dtype = torch.float32,
        part: int = PART,
    ):
        self.folder, self.split, self.source, self.identity = folder, split, source, identity
        self.dtype, self.part = dtype, part

    @property
    def num_parts(self) -> int:
        return -(-len(self.source) // self.part)

    def path(self, number: int) -> Path:
        return self.folder / f"{self.split}_{number:05d}.pt"

    def missing(self) -> list[int]:
        """Parts to be computed. Raises: CheckpointError where one was made otherwise."""
        return [number for number in range(self.num_parts) if not self._present(number)]

    def _present(self, number: int) -> bool:
        path = self.path(number)
        try:
            manifest = ckpt.verify_manifest(path)
        except CheckpointError:
            return False  # missing or cut short by a kill: it is computed (again)
        if manifest.get("identity") != self.identity:
            raise CheckpointError(
                f"{path}: holds features of other weights, images or settings (identity "
                f"{manifest.get('identity')}, now {self.identity}); give another --output-dir, or "
                "remove this folder"
            )
        return True

    def fill(
        self,
        encode: Callable[[torch.Tensor], torch.Tensor],
        process: ProcessInfo,
        *,
        size: int,
        resize: int | None,
        batch_size: int,
        num_workers: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        channels_last: bool = False,
        backend: str = "pil",
        say: Callable[[str], None] = print,
    ) -> None:
        """Compute this process's share of the missing parts."""
        own = self.missing()[process.rank :: process.world_size]
        total = sum(len(self._indices(number)) for number in own)
        rate = RateLines(f"features of {self.source.root}", total, say)
        for number in own:
            loader = build_eval_loader(
                SubsetSource(self.source, self._indices(number)),
                size,
                batch_size,
                num_workers,
                resize=resize,
                pin_memory=process.device.type == "cuda",
                backend=backend,
                channels=len(mean),
            )
            features, labels = [], []
            for features_BD, label_B in iterate_features(
                encode, loader, process.device, mean, std, channels_last=channels_last
            ):
                features.append(features_BD.to("cpu", self.dtype))
                labels.append(label_B)
                rate.add(len(label_B))
            content = {"features": torch.cat(features), "labels": torch.cat(labels)}
            ckpt.save_checkpoint(self.path(number), content, identity=self.identity)

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [N, D] of the stored type, labels int64 [N]) on the CPU, in order.

        The whole is allocated once and filled part by part.
        """
        features, labels = None, torch.empty(len(self.source), dtype=torch.int64)
        for number in range(self.num_parts):
            content = ckpt.read_torch_file(self.path(number))
            at = self._indices(number)
            if features is None:
                width = content["features"].shape[1]
                features = torch.empty(len(self.source), width, dtype=self.dtype)
            features[at.start : at.stop] = content["features"]
            labels[at.start : at.stop] = content["labels"]
        return features, labels

    def _indices(self, number: int) -> range:
        return range(number * self.part, min((number + 1) * self.part, len(self.source)))
