"""Pictures of a pretraining run: pairs of augmented views, nearest neighbours of its features."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence

import torch
from PIL import Image as Picture
from PIL import ImageDraw

from moco import seeding
from moco.cfgnode import CfgNode
from moco.config import OWN_VALUE
from moco.data.augment import (
    apply_pil,
    build_view_recipes,
    eval_pil,
    eval_resize,
    normalize,
    sample_parameters,
    to_uint8_CHW,
)
from moco.data.channels import open_planes
from moco.data.images import ImageSource
from moco.reporting.page import Image, Section

_CELL = 112  # pixels
_GAP, _PAPER, _MARK = 6, (255, 255, 255), (0, 120, 60)
_BATCH = 64


def view_pairs(cfg: CfgNode, source: ImageSource, num_images: int = 6) -> Section:
    """Images spread over the data set, each with the two views of its first epoch.

    Of four channels the first three are shown.
    """
    data = cfg.DATA
    recipes = build_view_recipes(
        data.RECIPE,
        channels=data.CHANNELS,
        size=data.SIZE,
        crop_scale=data.CROP_SCALE,
        blur_probability=None if data.BLUR_PROBABILITY == OWN_VALUE else data.BLUR_PROBABILITY,
    )
    rows = []
    for index in spread(len(source), num_images):
        image = open_planes(source, index, data.CHANNELS)[0]
        row = [_fitted(image)]
        for view, recipe in enumerate(recipes):
            rng = seeding.python_random(cfg.SEED, "augment", 0, index, view)
            parameters = sample_parameters(recipe, rng, *image.size)
            row.append(_fitted(apply_pil(image, parameters, recipe.size)))
        rows.append(row)
    sheet = _sheet(rows, ("image", "query view", "key view") * 2, rows_across=2)
    caption = f"recipe {data.RECIPE}: an image and its two views in epoch 1 (seed {cfg.SEED})"
    return Section("Augmented views", [Image("view_pairs", _png(sheet), caption)])


@torch.no_grad()
def nearest_neighbours(
    encoder: torch.nn.Module,
    cfg: CfgNode,
    source: ImageSource,
    *,
    num_queries: int = 5,
    num_neighbours: int = 7,
    most_images: int = 2000,
) -> Section:
    """Query images and the images of most similar backbone features (cosine), best first.

    Args:
        encoder: of the run, with `forward_features`.
        most_images: images searched, spread over the data set.
    """
    encoder.eval()
    indices = spread(len(source), most_images)
    planes = functools.partial(open_planes, source, channels=cfg.DATA.CHANNELS)
    size = cfg.DATA.SIZE
    resize = size if cfg.MODEL.STEM == "cifar" else eval_resize(size)
    features = []
    for start in range(0, len(indices), _BATCH):
        batch = [
            torch.cat([to_uint8_CHW(eval_pil(plane, size, resize)) for plane in planes(i)])
            for i in indices[start : start + _BATCH]
        ]
        inputs = normalize(torch.stack(batch), cfg.DATA.MEAN, cfg.DATA.STD)
        features.append(encoder.forward_features(inputs).float())
    features_ND = torch.nn.functional.normalize(torch.cat(features), dim=1)
    rows = []
    for query in spread(len(indices), num_queries):
        similarity = features_ND @ features_ND[query]
        similarity[query] = -2.0  # itself
        nearest = similarity.topk(min(num_neighbours, len(indices) - 1))
        row = [_fitted(planes(indices[query])[0], marked=True)]
        row += [_fitted(planes(indices[i])[0]) for i in nearest.indices.tolist()]
        rows.append(row)
    titles = ("query", *(str(i + 1) for i in range(num_neighbours)))
    caption = f"nearest neighbours by backbone features among {len(indices)} of the images"
    png = _png(_sheet(rows, titles, rows_across=1))
    return Section("Nearest neighbours", [Image("nearest_neighbours", png, caption)])


def spread(num: int, wanted: int) -> list[int]:
    """At most `wanted` numbers spread evenly over 0 .. num - 1."""
    wanted = min(num, wanted)
    return [i * num // wanted for i in range(wanted)]


def _fitted(image: Picture.Image, marked: bool = False) -> Picture.Image:
    """The image in a square cell; small ones are enlarged without smoothing."""
    scale = _CELL / max(image.size)
    filtering = Picture.Resampling.NEAREST if scale > 1 else Picture.Resampling.LANCZOS
    size = tuple(max(1, round(side * scale)) for side in image.size)
    cell = Picture.new("RGB", (_CELL, _CELL), _PAPER)
    cell.paste(image.resize(size, filtering), ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    if marked:
        ImageDraw.Draw(cell).rectangle((0, 0, _CELL - 1, _CELL - 1), outline=_MARK, width=3)
    return cell


def _sheet(
    rows: Sequence[Sequence[Picture.Image]], titles: Sequence[str], rows_across: int
) -> Picture.Image:
    width = max(map(len, rows)) * rows_across
    lines = -(-len(rows) // rows_across)
    step, top = _CELL + _GAP, 18
    sheet = Picture.new("RGB", (width * step + _GAP, top + lines * step + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(width):
        draw.text((_GAP + column * step, 3), titles[column], fill=(60, 60, 60))
    for number, row in enumerate(rows):
        line, across = divmod(number, rows_across)
        for place, cell in enumerate(row):
            column = across * (width // rows_across) + place
            sheet.paste(cell, (_GAP + column * step, top + line * step))
    return sheet


def _png(picture: Picture.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
