"""kNN accuracy of the features while pretraining goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from moco.cfgnode import CfgNode
from moco.data.images import ImageSource, find_images
from moco.data.loader import build_eval_loader
from moco.evaluation.features import evaluation_mode, extract_features
from moco.evaluation.knn import knn_accuracy
from moco.evaluation.splits import check_same_classes, find_test_folder


def build_knn_monitor(
    cfg: CfgNode,
    data_dir: str,
    train: ImageSource,
    device: torch.device,
    say: Callable[[str], None],
) -> Callable[[nn.Module], dict[str, float]] | None:
    """A function encoder -> {"knn_top1": percent}, or None (said, with the reason).

    The neighbours are the training images; the test images are those of `val` or `test` in
    `data_dir`. Both need class folders of the same names.

    Raises: DataError where the two splits have different classes.
    """
    if not cfg.KNN.PERIOD:
        return None
    folder = find_test_folder(data_dir)
    if train.labels is None or folder is None or Path(train.root) == Path(data_dir):
        say(
            "kNN monitor: off, it needs class folders in train/ and in val/ or test/ of "
            f"{data_dir}"
        )
        return None
    test = find_images(folder, train.decoding)
    check_same_classes(train, test, "give both the same classes, or set KNN.PERIOD 0")

    def evaluate(encoder: nn.Module) -> dict[str, float]:
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
                    ),
                    device,
                    cfg.DATA.MEAN,
                    cfg.DATA.STD,
                )
                for s in (train, test)
            )
        accuracy = knn_accuracy(
            *train_set,
            *test_set,
            k=min(cfg.KNN.K, len(train)),
            temperature=cfg.KNN.TEMPERATURE,
            num_classes=len(train.class_names),
        )
        return {"knn_top1": accuracy}

    return evaluate
