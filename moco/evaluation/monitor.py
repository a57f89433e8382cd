"""kNN accuracy of the features while pretraining goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.data.images import ImageSource, find_images
from moco.data.subset import SubsetSource, stratified_indices
from moco.distributed import ProcessInfo, broadcast_buffers
from moco.errors import DataError
from moco.evaluation.features import encoder_function, evaluation_mode, feature_width
from moco.evaluation.knn import sweep
from moco.evaluation.knn_search import FeatureReader, find_neighbours
from moco.evaluation.splits import TEST_FOLDERS, class_differences, find_test_folder
from moco.kernels.choose import evaluates_by_kernels

# A training step runs the query encoder forward and backward, and the key encoder forward.
_PASSES_OF_A_STEP = 4


def build_knn_monitor(
    cfg: CfgNode,
    data_dir: str,
    train: ImageSource,
    process: ProcessInfo,
    say: Callable[[str], None],
) -> KnnMonitor | None:
    """The monitor, or None (said, with the reason); the same on every process.

    The neighbours are the training images; the test images are those of `val` or `test` in
    `data_dir`. Both need class folders of the same names. The monitor only watches: whatever is
    wrong with its images turns it off, in a line, and pretraining goes on.

    Args:
        cfg: with TRAIN.AMP and the other choices resolved.
    """
    if not cfg.KNN.PERIOD:
        return None
    try:
        test = _test_images(data_dir, train)
    except DataError as error:
        say(f"kNN monitor off: {error}")
        return None
    monitor = KnnMonitor(cfg, train, test, process, say)
    say(monitor.describe(len(train)))
    return monitor


def _test_images(data_dir: str, train: ImageSource) -> ImageSource:
    """Raises: DataError where there are none with the labels of `train`."""
    folder = find_test_folder(data_dir)
    if train.labels is None:
        raise DataError(f"{train.root} is a flat folder of images, without labels")
    if folder is None:
        raise DataError(f"{data_dir} has no folder {' or '.join(TEST_FOLDERS)}")
    if Path(train.root) == Path(data_dir):
        raise DataError(f"{data_dir} holds classes, not train/ beside {folder.name}/")
    test = find_images(folder, train.decoding)
    if test.labels is None:
        raise DataError(f"{folder} is a flat folder of images, without labels")
    differing = class_differences(train, test)
    if differing:
        raise DataError(differing)
    return test


class KnnMonitor:
    """`monitor(encoder)` -> {"knn_top1": percent}, a collective call of all processes.

    It reads and computes as training does: decoder, precision, memory order and kernels are the
    configuration's. Of a split of more than KNN.MAX_IMAGES images a share is used, the same of
    every class and the same in every evaluation; "knn_images" is then among the figures.
    """

    def __init__(
        self,
        cfg: CfgNode,
        train: ImageSource,
        test: ImageSource,
        process: ProcessInfo,
        say: Callable[[str], None],
    ):
        self.cfg, self.process, self.say = cfg, process, say
        self.is_on = True
        self.num_whole = len(train), len(test)
        self.train, self.test = (_capped(source, cfg.KNN.MAX_IMAGES) for source in (train, test))

    def describe(self, images_an_epoch: int) -> str:
        """A line about what is compared and what that costs, before anything is computed."""
        used, whole = (len(self.train), len(self.test)), self.num_whole
        splits = [
            f"{num} of {all_} {name} images" if num < all_ else f"all {num} {name} images"
            for num, all_, name in zip(used, whole, ("training", "test"), strict=True)
        ]
        capped = f" (KNN.MAX_IMAGES {self.cfg.KNN.MAX_IMAGES})" if used != whole else ""
        share = sum(used) / (_PASSES_OF_A_STEP * images_an_epoch)
        return (
            f"kNN monitor: {' and '.join(splits)}{capped}, shared by {self.process.world_size} "
            f"process(es), every {self.cfg.KNN.PERIOD} epoch(s); their encoding computes about "
            f"{share:.1%} of what an epoch's training does"
        )

    def __call__(
        self, encoder: nn.Module, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Args: stop: asked between batches. Returns: None where it said so on any process."""
        try:
            return self._evaluate(encoder, stop) if self.is_on else {}
        except DataError as error:  # an unreadable image, stuck workers; the same on all processes
            self.is_on = False
            self.say(f"kNN monitor off from now on: {error}; pretraining goes on")
            return {}

    def _evaluate(
        self, encoder: nn.Module, stop: Callable[[], bool]
    ) -> dict[str, float] | None:
        cfg, process = self.cfg, self.process
        with evaluation_mode(encoder), evaluates_by_kernels(encoder), _buffers_of_main(encoder):
            encode = encoder_function(encoder, cfg.KNN.FEATURES, amp=cfg.TRAIN.AMP)
            search = find_neighbours(
                self._reader(encode), self.train, self.test,
                k=min(cfg.KNN.K, len(self.train)), dtype=torch.float32, say=self.say, stop=stop,
            )  # fmt: skip
        if search is None:
            return None
        train_labels, test_labels = (
            torch.tensor(source.labels, device=process.device) for source in (self.train, self.test)
        )
        k, temperature = search.k, cfg.KNN.TEMPERATURE
        accuracy = sweep(
            search.similarity_MK, train_labels[search.index_MK], test_labels, [k], [temperature],
            num_classes=len(self.train.class_names),
        )[k, temperature]  # fmt: skip
        figures = {"knn_top1": accuracy}
        if (len(self.train), len(self.test)) != self.num_whole:
            figures["knn_images"] = float(len(self.train))
        return figures

    def _reader(self, encode: Callable[[torch.Tensor], torch.Tensor]) -> FeatureReader:
        cfg, size = self.cfg, self.cfg.DATA.SIZE
        return FeatureReader(
            encode=encode,
            width=feature_width(encode, size, self.process.device, cfg.DATA.CHANNELS),
            process=self.process,
            size=size,
            # An image of the network's own size (CIFAR) is not scaled up and cropped.
            resize=size if cfg.MODEL.STEM == "cifar" else None,
            mean=cfg.DATA.MEAN,
            std=cfg.DATA.STD,
            batch_size=cfg.KNN.BATCH_SIZE,
            num_workers=cfg.DATA.NUM_WORKERS,
            backend="pil" if cfg.AUGMENT.BACKEND == "pil" else "opencv",
            channels_last=cfg.TRAIN.CHANNELS_LAST,
            channels=cfg.DATA.CHANNELS,
        )


def _capped(source: ImageSource, max_images: int) -> ImageSource:
    if not max_images or len(source) <= max_images:
        return source
    return SubsetSource(source, stratified_indices(source.labels, max_images / len(source), 0))


@contextlib.contextmanager
def _buffers_of_main(module: nn.Module) -> Iterator[None]:
    """Every process has rank 0's buffers inside the block, as it is rank 0's encoder that is saved;
    batch-norm statistics are each process's own."""
    own = {name: buffer.clone() for name, buffer in module.named_buffers()}
    broadcast_buffers(module)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(own[name])
