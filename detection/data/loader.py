"""The training stream and the test samples of a detector.

The stream is Detectron2's in form: an endless row of permutations of the training images, cut
into batches of images that are all wide or all tall, incomplete batches carried on. It differs
in its draws. Detectron2 keeps state in samplers and workers, so there the stream depends on the
number of workers and starts anew on resume. Here every draw is a function of (seed, purpose,
position), so any iteration can be started at and neither workers nor ranks change a pixel.
`detection.data.detectron2_stream` replays Detectron2's own stream (DATALOADER.STREAM).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from detection.data.account import trained_objects, training_account
from detection.data.masks import nonempty_masks, select_masks, transform_masks
from detection.data.sample_loader import Loader, start_loader
from detection.data.transforms import (
    decoding_of,
    flip_image,
    nonempty_boxes,
    read_image,
    resize_image,
    shortest_edge_shape,
    transform_boxes,
)
from moco.cfgnode import CfgNode
from moco.data.rgb import DEFAULT_DECODING, Decoding
from moco.errors import ConfigError, DataError
from moco.seeding import python_random, torch_generator

# (position in the stream, index of the record)
Draw = tuple[int, int]
_AnyDraw = TypeVar("_AnyDraw", bound=tuple)


class SampleDraw(NamedTuple):
    """All that is random about one training sample."""

    position: int  # in the stream
    index: int  # of the record
    short_edge: int  # pixels, see `Augmentation`
    flip: bool


@dataclass(frozen=True)
class Augmentation:
    """How a training image is drawn: INPUT.MIN_SIZE_TRAIN and its kin, in pixels.

    `mask_format` is INPUT.MASK_FORMAT, or None without MODEL.MASK_ON. `decoding` says how files
    become pixels.
    """

    short_edges: tuple[int, ...]
    sampling: str
    max_size: int
    flip: str
    channel_format: str
    mask_format: str | None = None
    decoding: Decoding = DEFAULT_DECODING

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Augmentation:
        """Raises: ConfigError for a sampling or flip that is not implemented."""
        edges, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        edges = (edges,) if isinstance(edges, int) else tuple(edges)
        if sampling not in ("choice", "range"):
            raise ConfigError(
                f"INPUT.MIN_SIZE_TRAIN_SAMPLING: {sampling!r} is given; allowed: choice, range"
            )
        if not edges or (sampling == "range" and len(edges) != 2):
            needed = "a smallest and a largest size" if sampling == "range" else "at least one size"
            raise ConfigError(f"INPUT.MIN_SIZE_TRAIN: {edges} is given; {needed} is needed")
        if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
            raise ConfigError(
                f"INPUT.RANDOM_FLIP: {cfg.INPUT.RANDOM_FLIP!r} is given; allowed: horizontal, none"
            )
        return cls(
            edges,
            sampling,
            cfg.INPUT.MAX_SIZE_TRAIN,
            cfg.INPUT.RANDOM_FLIP,
            cfg.INPUT.FORMAT,
            cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
            decoding_of(cfg),
        )

    def draw(self, seed: int, position: int) -> tuple[int, bool]:
        """(short edge in pixels, whether to flip) of the sample at this stream position."""
        random = python_random(seed, "detection-augment", position)
        if self.sampling == "choice":
            short_edge = random.choice(self.short_edges)
        else:
            short_edge = random.randint(*self.short_edges)
        return short_edge, random.random() < 0.5 and self.flip == "horizontal"


def filter_empty(records: Sequence[dict]) -> list[dict]:
    """The records with something to train on (DATALOADER.FILTER_EMPTY_ANNOTATIONS)."""
    return [record for record in records if trained_objects(record)]


def image_order(num_images: int, seed: int) -> Iterator[Draw]:
    """The endless stream of (position, record index): one permutation after another."""
    for number in itertools.count():
        generator = torch_generator(seed, "detection-order", number)
        order = torch.randperm(num_images, generator=generator).tolist()
        yield from enumerate(order, start=number * num_images)


def global_batches(
    stream: Iterable[_AnyDraw], is_wide: Sequence[bool] | None, batch_size: int
) -> Iterator[list[_AnyDraw]]:
    """Cut the stream into batches of all ranks together.

    Args:
        stream: `Draw`s, or any tuples with the index of the record in the second place.
        is_wide: for each record whether width > height, to batch wide and tall images apart;
            None batches in stream order.
    """
    buckets: tuple[list[_AnyDraw], list[_AnyDraw]] = ([], [])
    for draw in stream:
        bucket = buckets[is_wide is not None and is_wide[draw[1]]]
        bucket.append(draw)
        if len(bucket) == batch_size:
            yield bucket[:]
            bucket.clear()


def load_train_sample(record: dict, augmentation: Augmentation, seed: int, position: int) -> dict:
    """The training sample of one record at one stream position (form: see `train_loader`)."""
    return _load_drawn(record, augmentation, *augmentation.draw(seed, position))


def _load_drawn(record: dict, augmentation: Augmentation, short_edge: int, flip: bool) -> dict:
    image = _read_checked(record, augmentation.channel_format, augmentation.decoding)
    old_shape = image.shape[:2]
    new_shape = shortest_edge_shape(*old_shape, short_edge, augmentation.max_size)
    image = resize_image(image, *new_shape)
    moves = (old_shape, new_shape, flip)
    return {
        **_sample(record, flip_image(image) if flip else image),
        **_ground_truth(trained_objects(record), moves, augmentation.mask_format),
    }


def _ground_truth(annotations: Sequence[dict], moves: tuple, mask_format: str | None) -> dict:
    """gt_boxes, gt_classes and perhaps gt_masks of one image, moved with it; `moves` is
    (old shape, new shape, flip). Objects that are empty then are dropped."""
    bboxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    boxes = transform_boxes(bboxes, *moves)
    classes = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    kept = nonempty_boxes(boxes)
    truth = {}
    if mask_format is not None:
        masks = transform_masks([a["segmentation"] for a in annotations], mask_format, *moves)
        kept &= nonempty_masks(masks)
        truth["gt_masks"] = select_masks(masks, kept)
    truth["gt_boxes"] = torch.from_numpy(boxes[kept])
    truth["gt_classes"] = torch.from_numpy(classes[kept])
    return truth


def load_test_sample(record: dict, cfg: CfgNode) -> dict:
    """A test image, resized by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST.

    Returns: a dict as `train_loader`'s, without gt_boxes and gt_classes.
    Raises: DataError for an image that cannot be read.
    """
    image = _read_checked(record, cfg.INPUT.FORMAT, decoding_of(cfg))
    shape = shortest_edge_shape(*image.shape[:2], cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return _sample(record, resize_image(image, *shape))


def eval_loader(records: Sequence[dict], cfg: CfgNode, *, num_workers: int) -> Loader:
    """Lists of one `load_test_sample` each, in order, loaded ahead by `num_workers` processes.

    One image at a time, as in Detectron2: its detections do not depend on those beside it.
    Raises: DataError, while iterating, for an image that cannot be read.
    """
    load = functools.partial(_load_test, cfg=cfg)
    draws = [[index] for index in range(len(records))]
    return start_loader(records, load, draws, num_workers=min(num_workers, len(records)))


def train_loader(
    records: Sequence[dict],
    cfg: CfgNode,
    *,
    seed: int,
    start_iteration: int,
    rank: int,
    world_size: int,
    num_workers: int,
) -> Loader:
    """The endless training batches of one rank, from `start_iteration` (0-based) on.

    A batch of SOLVER.IMS_PER_BATCH images is formed for all ranks together; rank r gets its
    r-th part, so the number of ranks changes no batch, and the number of workers no pixel.

    Returns: an iterator of lists of IMS_PER_BATCH / world_size dicts:
        "image" uint8 [3, H, W] in INPUT.FORMAT order, "height" and "width" of the original,
        "image_id", "file_name", "gt_boxes" float32 [N, 4], "gt_classes" int64 [N] and, with
        MODEL.MASK_ON, "gt_masks" (`detection.data.masks.Masks`).
    Raises:
        ConfigError: the batch does not divide among the ranks, or an input key is out of range.
        DataError: no image with a box is left, or (while iterating) an image cannot be read.
    """
    share = batch_share(cfg, world_size)
    kept = usable_records(records, cfg)
    augmentation = Augmentation.from_config(cfg)
    order = image_order(len(kept), seed)
    batches = global_batches(order, wide_images(kept, cfg), cfg.SOLVER.IMS_PER_BATCH)
    own = slice(rank * share, (rank + 1) * share)
    drawn = (
        [SampleDraw(p, i, *augmentation.draw(seed, p)) for p, i in batch[own]]
        # Skipping draws indices only; no image is read.
        for batch in itertools.islice(batches, start_iteration, None)
    )
    num_filtered = len(records) - len(kept)
    return drawn_loader(
        kept, augmentation, drawn, num_workers=num_workers, num_filtered=num_filtered
    )


def batch_share(cfg: CfgNode, world_size: int) -> int:
    """Images of one rank in a batch. Raises: ConfigError where ranks would have unequal ones."""
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH: {batch_size} images do not divide among {world_size} "
            f"processes; give a multiple of {world_size}"
        )
    return batch_size // world_size


def usable_records(records: Sequence[dict], cfg: CfgNode) -> list[dict]:
    """The records that are trained with. Raises: DataError if there are none."""
    kept = filter_empty(records) if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else list(records)
    if not kept:
        account = training_account(records, cfg)
        raise DataError(f"{account.line()}; images with annotated objects are needed")
    return kept


def wide_images(records: Sequence[dict], cfg: CfgNode) -> list[bool] | None:
    """Whether each image is wide, to batch by it; None without ASPECT_RATIO_GROUPING."""
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return None
    return [record["width"] > record["height"] for record in records]


def drawn_loader(
    records: Sequence[dict],
    augmentation: Augmentation,
    batches: Iterable[list[SampleDraw]],
    *,
    num_workers: int,
    num_filtered: int = 0,
) -> Loader:
    """Load batches that are drawn already, in order, with `num_workers` processes.

    Samples are as `train_loader`'s. `batches` is iterated in this process, a few batches ahead.
    """
    load = functools.partial(_load_train, augmentation=augmentation)
    return start_loader(records, load, batches, num_workers=num_workers, num_filtered=num_filtered)


def _load_train(records: Sequence[dict], draw: SampleDraw, *, augmentation: Augmentation) -> dict:
    return _load_drawn(records[draw.index], augmentation, draw.short_edge, draw.flip)


def _load_test(records: Sequence[dict], index: int, *, cfg: CfgNode) -> dict:
    return load_test_sample(records[index], cfg)


def _read_checked(record: dict, channel_format: str, decoding: Decoding) -> np.ndarray:
    image = read_image(record["file_name"], channel_format, decoding)
    height, width = image.shape[:2]
    if (height, width) != (record["height"], record["width"]):
        raise DataError(
            f"{record['file_name']}: the image is {width} x {height}, its record says "
            f"{record['width']} x {record['height']}; it changed after the check, start again"
        )
    return image


def _sample(record: dict, image_HWC: np.ndarray) -> dict:
    return {
        "image": torch.from_numpy(np.array(image_HWC.transpose(2, 0, 1), order="C")),
        **{name: record[name] for name in ("height", "width", "image_id", "file_name")},
    }
