"""Ground-truth masks by hand; against Detectron2 in tests/parity/test_mask_head_vs_detectron2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detection.config import get_defaults
from detection.data.masks import (
    check_masks,
    decode_rle,
    encode_rle,
    nonempty_masks,
    rasterize_polygons,
    select_masks,
    transform_masks,
    transform_polygons,
)
from moco.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SQUARE = [1, 2, 5, 2, 5, 6, 1, 6]


def rle(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def test_polygons_by_hand():
    (moved,) = transform_polygons([SQUARE], (40, 60), (80, 90), flip=True)
    assert moved.dtype == np.float64
    # x * 1.5, then 90 - x; y * 2
    assert moved.tolist() == [88.5, 4, 82.5, 4, 82.5, 12, 88.5, 12]
    assert SQUARE[0] == 1  # the input is untouched
    assert transform_polygons([], (4, 4), (8, 8), False) == []


def test_rasterizing_by_hand():
    mask = rasterize_polygons([np.array(SQUARE, dtype=np.float64)], 8, 7)
    expected = np.zeros((8, 7), dtype=bool)
    expected[2:6, 1:5] = True
    assert np.array_equal(mask, expected)
    assert rasterize_polygons([], 3, 4).shape == (3, 4)


def test_both_formats_of_one_image():
    mask = np.zeros((8, 10), dtype=bool)
    mask[2:6, 1:5] = True
    shapes = ((8, 10), (16, 20))
    bits = transform_masks([[SQUARE], rle(mask)], "bitmask", *shapes, True)
    assert bits.shape == (2, 16, 20) and bits.dtype == torch.bool
    assert torch.equal(bits[0], bits[1])
    assert bits[0].nonzero().amin(0).tolist() == [4, 10]  # 20 - 2 * 5
    assert bits[0].nonzero().amax(0).tolist() == [11, 17]
    polygons = transform_masks([[SQUARE], []], "polygon", *shapes, True)
    assert nonempty_masks(polygons).tolist() == [True, False]
    assert len(select_masks(polygons, np.array([True, False]))) == 1
    none = transform_masks([], "bitmask", *shapes, False)
    assert none.shape == (0, 16, 20) and nonempty_masks(none).shape == (0,)
    bits[1] = False
    assert nonempty_masks(bits).tolist() == [True, False]
    assert torch.equal(select_masks(bits, np.array([True, False])), bits[:1])


def test_run_lengths_by_hand():
    masks = np.zeros((2, 3, 4), dtype=bool)
    masks[0, 1, 2] = True
    encoded = encode_rle(masks)
    assert [e["size"] for e in encoded] == [[3, 4], [3, 4]]
    assert [coco_mask.area(e) for e in encoded] == [1, 0]
    assert np.array_equal(decode_rle(encoded, 3, 4), masks)
    assert encode_rle(masks[:0]) == [] and decode_rle([], 3, 4).shape == (0, 3, 4)


def records(*segmentations: object, **more) -> list[dict]:
    annotations = [
        {"bbox": [0, 0, 1, 1], "category_id": 0, **more}
        | ({} if segmentation is None else {"segmentation": segmentation})
        for segmentation in segmentations
    ]
    return [{"file_name": "a.jpg", "height": 8, "width": 10, "annotations": annotations}]


def cfg(mask_format: str = "polygon", mask_on: bool = True):
    node = get_defaults()
    node.MODEL.MASK_ON, node.INPUT.MASK_FORMAT = mask_on, mask_format
    node.DATASETS.TRAIN = ("voc_2007_trainval",)
    return node


def test_good_masks_pass():
    mask = rle(np.eye(8, 10))
    check_masks(cfg(), records([SQUARE], [SQUARE, [0.5] * 6], []))
    check_masks(cfg("bitmask"), records([SQUARE], mask))
    check_masks(cfg(), records(mask, iscrowd=1) + records([SQUARE], iscrowd=0))
    check_masks(cfg(mask_on=False), records(None, "nonsense"))


def test_data_without_masks_is_a_configuration_error():
    with pytest.raises(ConfigError, match="none of the 2 .*'voc_2007_trainval'"):
        check_masks(cfg(), records(None, None))
    with pytest.raises(DataError, match=r"a.jpg: an object has no segmentation \(1 of 2"):
        check_masks(cfg(), records(None, [SQUARE]))


def test_run_lengths_need_the_bitmask_format():
    with pytest.raises(ConfigError, match="a.jpg has an object with an RLE.*MASK_FORMAT bitmask"):
        check_masks(cfg(), records(rle(np.eye(8, 10))))
