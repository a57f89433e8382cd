"""Which images a linear classifier is trained on, and how their pixels are normalised."""

from __future__ import annotations

from moco.cfgnode import CfgNode
from moco.data.images import ImageSource
from moco.data.subset import SubsetSource, indices_from_list, stratified_indices
from moco.errors import ConfigError
from moco.evaluation.weights import Pretrained


def pixel_statistics(cfg: CfgNode, weights: Pretrained) -> tuple[tuple, tuple]:
    """Mean and std of the images: the configuration's, else the weights', else ImageNet's.

    Raises: ConfigError where they are not of the channels that the weights are for.
    """
    given = tuple(cfg.DATA.MEAN), tuple(cfg.DATA.STD)
    pixels = given if all(given) else weights.pixel_statistics()
    mean, std = (own or other for own, other in zip(given, pixels, strict=True))
    for key, values in (("DATA.MEAN", mean), ("DATA.STD", std)):
        if len(values) != weights.channels:
            raise ConfigError(
                f"{key} is {values}; {weights.path} is for images of {weights.channels} channels; "
                "give as many numbers, or ()"
            )
    return mean, std


def choose_labels(train: ImageSource, data: CfgNode) -> ImageSource | SubsetSource:
    """The training images that DATA.LABELS_FRACTION or DATA.LABELS_LIST leaves."""
    if data.LABELS_LIST:
        return SubsetSource(train, indices_from_list(train, data.LABELS_LIST))
    if data.LABELS_FRACTION < 1:
        chosen = stratified_indices(train.labels, data.LABELS_FRACTION, data.LABELS_SEED)
        return SubsetSource(train, chosen)
    return train
