"""Images of one and four channels: what is read, and that only colours are changed as colours."""

from __future__ import annotations

import io
from dataclasses import replace

import four_bands
import numpy as np
import pytest
import torch
from PIL import Image

from moco import seeding
from moco.config import load_pretrain_config
from moco.data.augment import build_view_recipes, sample_parameters
from moco.data.augment_device import apply_batch, table_row
from moco.data.backends import choose_backend
from moco.data.channels import decode_four, read_grey
from moco.data.images import find_images
from moco.data.loader import OneView
from moco.data.two_views import TwoViews
from moco.errors import ConfigError, DataError

FOUR = four_bands.noise(4, (31, 23), 0)


def encoded(image: np.ndarray, kind: str, mode=None, **options) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(file, kind, **options)
    return file.getvalue()


FILES = {
    "PNG": encoded(FOUR, "PNG"),
    "WebP": encoded(FOUR, "WEBP", lossless=True, exact=True),
    "TIFF": encoded(FOUR, "TIFF"),
    "TIFF, LZW": encoded(FOUR, "TIFF", compression="tiff_lzw"),
    "TIFF, deflate": encoded(FOUR, "TIFF", compression="tiff_adobe_deflate"),
    **{f"TIFF, extra sample {kind}": four_bands.tiff(FOUR, kind) for kind in (None, 0, 1, 2, 999)},
}


@pytest.mark.parametrize("kind", FILES)
def test_four_bands_are_read_as_they_are_stored(kind):
    assert np.array_equal(decode_four(FILES[kind], "x"), FOUR)


def test_negative_control_pil_alone_loses_bands():
    """What DATA.CHANNELS 4 would read without OpenCV's help, and 3 does read."""
    assert Image.open(io.BytesIO(FILES["TIFF, extra sample 0"])).mode == "RGB"
    associated = np.asarray(Image.open(io.BytesIO(FILES["TIFF, extra sample 1"])))
    assert not np.array_equal(associated, FOUR)


@pytest.mark.parametrize("extra", [None, 0, 1, 2])
def test_sixteen_bits_keep_their_high_byte(extra):
    wide = np.random.default_rng(1).integers(0, 2**16, (9, 7, 4), dtype=np.uint16)
    assert np.array_equal(decode_four(four_bands.tiff(wide, extra), "x"), wide >> 8)


@pytest.mark.parametrize(
    "data, reason",
    [
        (encoded(FOUR[..., :3], "PNG"), "it is of mode 'RGB'; DATA.CHANNELS 4 needs four bands"),
        (encoded(FOUR[..., 0], "PNG"), "it is of mode 'L'"),
        (encoded(FOUR, "PNG", "LA"), "it is of mode 'LA'"),
        (encoded(FOUR[..., :3], "PNG", "P"), "it is of mode 'P'"),
        (encoded(FOUR, "TIFF", "CMYK"), "it is of mode 'CMYK'"),
        (encoded(FOUR[..., :3], "JPEG"), "it is none of PNG, TIFF, WEBP"),
        (encoded(FOUR, "PNG")[:200], "x: cannot be read as an image"),
        (four_bands.tiff(FOUR, 0)[:300], "x: cannot be read as an image"),
        (b"", "it is empty"),
        (b"no image", "no known image format"),
    ],
)
def test_other_files_are_unreadable(data, reason):
    with pytest.raises(DataError, match="cannot be read as an image") as error:
        decode_four(data, "x")
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("bands")
    return {n: four_bands.make_folder(base / str(n), n) for n in (1, 3, 4)}


def test_grey_is_the_files_own_values(folders, tmp_path):
    source = find_images(folders[1])
    stored = np.asarray(Image.open(source.path(5)))
    assert np.array_equal(read_grey(source, 5)[..., 0], stored)
    for name in ("pil", "opencv"):
        image = choose_backend(name, 1).read(source, 5)
        assert np.array_equal(np.asarray(image[0] if name == "pil" else image[..., 0]), stored)
    colour = find_images(folders[3])  # by PIL's weights, within rounding
    expected = np.asarray(colour.open(2).convert("L")).astype(int)
    assert np.abs(read_grey(colour, 2)[..., 0].astype(int) - expected).max() <= 1


def views(folder, channels, backend, recipe="v2", **options):
    """The first view of twelve images, all operations included: float [12, C, 16, 16]."""
    options = {"jitter_probability": 1.0, "blur_probability": 0.7, **options}
    recipes = build_view_recipes(recipe, channels=channels, size=16, **options)
    two = TwoViews(find_images(folder), recipes, 0, backend, channels=channels)
    view_q, _, _, *tables = two.batch([(0, index) for index in range(12)])
    if tables:
        view_q = apply_batch(view_q, tables[0])
    return view_q.float()


@pytest.mark.parametrize("recipe", ["v1", "v2", "v3"])
@pytest.mark.parametrize("channels", [1, 4])
def test_backends_agree_up_to_rounding(folders, channels, recipe):
    found = {b: views(folders[channels], channels, b, recipe) for b in ("pil", "opencv", "device")}
    for backend in ("opencv", "device"):
        assert found[backend].shape == (12, channels, 16, 16)
        distance = (found[backend] - found["pil"]).abs()
        # Of noise, whose hue is in the last bits, single values of RGB differ by more.
        assert distance.mean() < 0.6 and distance[:, -1].max() <= 4
    # Negative control: another jitter is far away.
    other = views(folders[channels], channels, "opencv", recipe, jitter=(0.8, 0.8, 0.0, 0.0))
    assert (other - found["pil"]).abs().mean() > 2


@pytest.mark.parametrize("backend", ["pil", "opencv", "device"])
def test_the_first_three_are_rgb_and_the_fourth_is_no_colour(folders, backend, tmp_path):
    """The first three are the view of the RGB file, bit for bit; the fourth knows no jitter, no
    conversion to grey and no solarising, but crop, blur and flip."""
    for split in ("rgb", "grey"):
        (tmp_path / split).mkdir()
    for i, path in enumerate(find_images(folders[4]).paths[:12]):
        four = np.asarray(Image.open(f"{folders[4]}/train/{path}"))
        Image.fromarray(four[..., :3]).save(tmp_path / "rgb" / f"{i:02d}.png")
        Image.fromarray(four[..., 3]).save(tmp_path / "grey" / f"{i:02d}.png")
    all_four = views(folders[4], 4, backend, "v3")
    assert torch.equal(all_four[:, :3], views(tmp_path / "rgb", 3, backend, "v3"))
    plain = views(tmp_path / "grey", 1, backend, "v3", jitter=(0.0, 0.0, 0.0, 0.0))
    assert torch.equal(all_four[:, 3:], plain)
    jittered = views(tmp_path / "grey", 1, backend, "v3")
    assert (all_four[:, 3:] - jittered).abs().mean() > 2  # negative control


def test_solarising_leaves_the_fourth_alone():
    [recipe, _] = build_view_recipes("v2", size=16)
    rng = seeding.python_random(0, "x")
    p = replace(sample_parameters(recipe, rng, 24, 24), solarize=True, grey=True, jitter=())
    crops = torch.from_numpy(four_bands.noise(4, (16, 16), 3)).permute(2, 0, 1)[None].contiguous()
    table = torch.tensor([table_row(p)])
    solarised = apply_batch(crops, table)
    table = torch.tensor([table_row(p.geometry())])
    assert torch.equal(solarised[:, 3], apply_batch(crops, table)[:, 3])
    assert not torch.equal(solarised[:, :3], apply_batch(crops, table)[:, :3])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_the_evaluation_view(folders, channels, backend):
    source = find_images(folders[channels])
    view, label, index = OneView(source, 24, 24, backend, channels)[3]
    stored = np.atleast_3d(np.asarray(Image.open(source.path(3)))).transpose(2, 0, 1)
    assert np.array_equal(view.numpy(), stored) and (label, index) == (0, 3)


def test_grey_recipes_have_no_colour_operation_and_the_same_crops():
    grey, colour = (build_view_recipes("v2", channels=n)[0] for n in (1, 3))
    assert colour == build_view_recipes("v2")[0] == build_view_recipes("v2", channels=4)[0]
    drawn = [
        sample_parameters(r, seeding.python_random(0, "x"), 300, 200) for r in (grey, colour)
    ]
    assert not any(o in ("hue", "saturation") for o, _ in drawn[0].jitter)
    assert replace(drawn[0], jitter=(), grey=False) == replace(drawn[1], jitter=(), grey=False)
    assert [p for p in drawn[1].jitter if p[0] in ("brightness", "contrast")] == list(
        drawn[0].jitter
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["DATA.CHANNELS", "2"], "DATA.CHANNELS is 2; allowed: 1, 3, 4"),
        (["DATA.CHANNELS", "4"], "DATA.MEAN is .*four numbers, as DATA.CHANNELS is 4"),
        (["DATA.CHANNELS", "1", "DATA.MEAN", "(0.5,)"], "DATA.STD is .*one number above 0, as"),
        (["DATA.MEAN", "(0.5,)"], r"DATA.MEAN is \(0.5,\); allowed: three numbers$"),
    ],
)
def test_mean_and_std_have_as_many_numbers(words, message):
    with pytest.raises(ConfigError, match=message):
        load_pretrain_config(None, words)


@pytest.mark.parametrize("key", ["AUGMENT.DECODE", "AUGMENT.RESIDENT"])
def test_what_gives_rgb_only_is_refused_by_name(key):
    value = {"AUGMENT.DECODE": "gpu", "AUGMENT.RESIDENT": "True"}[key]
    words = ["DATA.CHANNELS", "1", "DATA.MEAN", "(0.5,)", "DATA.STD", "(0.2,)",
             "AUGMENT.BACKEND", "device", key, value]  # fmt: skip
    with pytest.raises(ConfigError, match=f"{key} is .* with DATA.CHANNELS 1"):
        load_pretrain_config(None, words)
