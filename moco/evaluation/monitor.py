"""kNN accuracy of the features while pretraining goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.data.images import ImageSource, find_images
from moco.data.loader import build_eval_loader
from moco.errors import DataError
from moco.evaluation.features import evaluation_mode, extract_features
from moco.evaluation.knn import knn_accuracy
from moco.evaluation.splits import TEST_FOLDERS, class_differences, find_test_folder


def _test_images(data_dir: str, train: ImageSource) -> ImageSource:
    """Raises: DataError where there are none with the labels of `train`."""
    folder = find_test_folder(data_dir)
    if train.labels is None:
        raise DataError(f"{train.root} is a flat folder of images, without labels")
    if folder is None:
        raise DataError(f"{data_dir} has no folder {' or '.join(TEST_FOLDERS)}")
    if Path(train.root) == Path(data_dir):
        raise DataError(f"{data_dir} holds classes, not train/ beside {folder.name}/")
    test = find_images(folder)
    if test.labels is None:
        raise DataError(f"{folder} is a flat folder of images, without labels")
    differing = class_differences(train, test)
    if differing:
        raise DataError(differing)
    return test


def build_knn_monitor(
    cfg: CfgNode,
    data_dir: str,
    train: ImageSource,
    device: torch.device,
    say: Callable[[str], None],
) -> Callable[[nn.Module], dict[str, float]] | None:
    """A function encoder -> {"knn_top1": percent}, or None (said, with the reason).

    The neighbours are the training images; the test images are those of `val` or `test` in
    `data_dir`. Both need class folders of the same names. The monitor only watches: whatever is
    wrong with its images turns it off, in a line, and pretraining goes on.
    """
    if not cfg.KNN.PERIOD:
        return None
    try:
        test = _test_images(data_dir, train)
    except DataError as error:
        say(f"kNN monitor off: {error}")
        return None
    is_on = True

    def evaluate(encoder: nn.Module) -> dict[str, float]:
        nonlocal is_on
        try:
            return accuracy(encoder) if is_on else {}
        except DataError as error:  # an unreadable image, stuck workers
            is_on = False
            say(f"kNN monitor off from now on: {error}; pretraining goes on")
            return {}

    def accuracy(encoder: nn.Module) -> dict[str, float]:
        encode = encoder.forward_features if cfg.KNN.FEATURES == "backbone" else encoder
        with evaluation_mode(encoder):
            train_set, test_set = (
                extract_features(
                    encode,
                    # An image of the network's own size (CIFAR) is not scaled up and cropped.
                    build_eval_loader(
                        s,
                        cfg.DATA.SIZE,
                        cfg.KNN.BATCH_SIZE,
                        cfg.DATA.NUM_WORKERS,
                        resize=cfg.DATA.SIZE if cfg.MODEL.STEM == "cifar" else None,
                        channels=cfg.DATA.CHANNELS,
                    ),
                    device,
                    cfg.DATA.MEAN,
                    cfg.DATA.STD,
                )
                for s in (train, test)
            )
        percent = knn_accuracy(
            *train_set,
            *test_set,
            k=min(cfg.KNN.K, len(train)),
            temperature=cfg.KNN.TEMPERATURE,
            num_classes=len(train.class_names),
        )
        return {"knn_top1": percent}

    return evaluate
