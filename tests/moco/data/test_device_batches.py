"""Loaders of all backends, and what `to_inputs` makes of their batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from augment_distance import Distance
from PIL import Image

from moco.benchmarks.pictures import natural_jpeg, natural_picture
from moco.config import load_pretrain_config
from moco.data import device_crops
from moco.data.augment import build_recipe, build_view_recipes, normalize, to_inputs
from moco.data.augment_device import NUM_COLUMNS, apply_batch, table_row
from moco.data.backends import draw_views
from moco.data.decode import decode_plain_jpeg
from moco.data.device_crops import GpuDecoder, ResidentImages
from moco.data.images import find_images
from moco.data.loader import build_pretrain_loader
from moco.data.two_views import TwoTablesAndFile, TwoViews
from moco.errors import ConfigError, DataError
from moco.training.batch import build_loader

SIZE, SEED = 32, 5
RECIPES = build_view_recipes("v3", size=SIZE)
NEAR = (0.5, 4, 12)  # `Distance` between backends


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six JPEG files of different sizes, a PNG and a CMYK file."""
    root = tmp_path_factory.mktemp("images")
    for number in range(6):
        (root / f"{number}.jpg").write_bytes(natural_jpeg(number, 70 + 9 * number, 64))
    Image.fromarray(natural_picture(6, 50, 40)).save(root / "6.png")
    Image.fromarray(natural_picture(7, 50, 40)).convert("CMYK").save(root / "7.jpg")
    return find_images(root)


@pytest.fixture(scope="module")
def small_images(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    for number in range(8):
        Image.fromarray(natural_picture(number, SIZE, SIZE)).save(root / f"{number}.png")
    return find_images(root)


def loader(source, recipe=RECIPES, **changes):
    arguments = dict(
        seed=SEED, global_batch=4, rank=0, world_size=1, first_step=0, last_step=4, num_workers=0,
        pin_memory=False,
    )  # fmt: skip
    return build_pretrain_loader(source, recipe, **{**arguments, **changes})


def inputs(batches, cfg=None):
    """The batches' views after `to_inputs`, back in levels of 0 .. 255: [B, 3, H, W] each."""
    cfg = cfg or tiny.config(DATA__MEAN="(0.0, 0.0, 0.0)", DATA__STD="(1.0, 1.0, 1.0)")
    for batch in batches:
        *views, _ = to_inputs(batch, cfg, torch.device("cpu"))
        yield from ((view * 255).round().numpy() for view in views)


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for tensor, other_tensor in zip(batch, other, strict=True):
            assert torch.equal(tensor, other_tensor)


@pytest.mark.parametrize("backend", ["opencv", "device"])
def test_backends_give_the_same_views(source, backend):
    """Decoding, draws, crops, operations, both views: all of a batch but its rounding."""
    pils = list(inputs(loader(source, backend="pil")))
    ours = list(inputs(loader(source, backend=backend)))
    assert Distance.of(ours, pils).within(NEAR)
    for changes in ({"seed": 6}, {"recipe": RECIPES[::-1]}, {"first_step": 2, "last_step": 6}):
        others = list(inputs(loader(source, **{"backend": backend, **changes})))
        assert not Distance.of(others, pils).within(NEAR)


def test_all_backends_draw_the_same_parameters(source, monkeypatch):
    seen = {}
    for backend in ("pil", "opencv", "device"):
        drawn = seen[backend] = []

        def record(*arguments, drawn=drawn):
            drawn.append(draw_views(*arguments))
            return drawn[-1]

        monkeypatch.setattr("moco.data.two_views.draw_views", record)
        list(loader(source, backend=backend))
    assert seen["pil"] == seen["opencv"] == seen["device"] and len(seen["pil"]) == 16


def test_device_batches_hold_crops_and_tables(source):
    keys = [(0, 3), (2, 7)]
    crop_q, crop_k, index, *tables = TwoViews(source, RECIPES, SEED, "device").batch(keys)
    assert crop_q.shape == crop_k.shape == (2, 3, SIZE, SIZE) and crop_q.dtype == torch.uint8
    assert index.tolist() == [3, 7] and index.dtype == torch.int64
    for row, (epoch, number) in enumerate(keys):
        size = source.open(number).size
        for view, p in enumerate(draw_views(RECIPES, SEED, epoch, number, *size)):
            assert torch.equal(tables[view][row], torch.tensor(table_row(p)))
            assert tables[view].shape == (2, NUM_COLUMNS)


def test_a_workers_batch_lies_in_shared_memory(source, monkeypatch):
    dataset = TwoViews(source, RECIPES, SEED)
    alone = dataset.batch([(0, 1), (0, 2)])
    assert not alone[0].is_shared()
    monkeypatch.setattr("moco.data.two_views.get_worker_info", lambda: "a worker")
    shared = dataset.batch([(0, 1), (0, 2)])
    assert shared[0].is_shared() and shared[0].is_contiguous()
    assert_same([alone], [shared])


def test_what_follows_the_crop_is_left_to_the_device(source):
    """A crop of the device backend is the view of a recipe that only crops."""
    plain = dict(jitter_probability=0, grey_probability=0, blur_probability=0, flip_probability=0)
    crops = list(loader(source, backend="device", last_step=2))
    views = list(loader(source, build_recipe("v2", size=SIZE, **plain), last_step=2))
    for batch, other in zip(crops, views, strict=True):
        assert_same([batch[:3]], [other])


def test_workers_and_ranks_change_nothing(source, small_images):
    for images, changes in ((source, {}), (small_images, {"resident": True})):
        changes["backend"] = "device"
        batches = list(loader(images, **changes))
        assert_same(batches, loader(images, **changes, num_workers=2))
        assert_same(batches[3:], loader(images, **changes, first_step=3))
        parts = [list(loader(images, **changes, rank=r, world_size=2)) for r in (0, 1)]
        joined = [[torch.cat(pair) for pair in zip(*step, strict=True)]
                  for step in zip(*parts, strict=True)]  # fmt: skip
        assert_same(batches, joined)


def test_resident_images_give_the_workers_views(small_images):
    cropped = list(loader(small_images, backend="device"))
    resident = list(loader(small_images, backend="device", resident=True))
    assert [len(batch) for batch in resident] == [5] * 4
    for batch, other in zip(resident, cropped, strict=True):
        assert_same([batch[2:]], [other[2:]])
    crops = [[view.numpy() for b in batches for view in b[:2]] for batches in (resident, cropped)]
    assert Distance.of(*crops).within((0.05, 1, 2))
    assert Distance.of(list(inputs(resident)), list(inputs(cropped))).within(NEAR)
    assert not Distance.of(list(inputs(resident[::-1])), list(inputs(cropped))).within(NEAR)


def test_images_that_cannot_be_resident(source, small_images, monkeypatch):
    with pytest.raises(DataError, match=r"1\.jpg: has 79 x 64 pixels, other images 70 x 64"):
        loader(source, backend="device", resident=True)
    monkeypatch.setattr(device_crops, "MAX_RESIDENT_BYTES", 8 * 3 * SIZE * SIZE - 1)
    with pytest.raises(DataError, match="8 images of 32 x 32 need .* set it False"):
        ResidentImages(small_images, SIZE, torch.device("cpu"))


@pytest.fixture
def decoder_without_gpu(monkeypatch, source):
    """GpuDecoder with libjpeg in the place of nvJPEG."""

    def decode(self, files):
        images = [decode_plain_jpeg(file.numpy().tobytes()) for file in files]
        if any(image is None for image in images):
            raise RuntimeError("damaged")
        return [torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1) for image in images]

    monkeypatch.setattr(GpuDecoder, "_decode", decode)
    decoder = object.__new__(GpuDecoder)
    decoder.source, decoder.size, decoder.device = source, SIZE, torch.device("cpu")
    return decoder


def test_files_decoded_by_the_device_give_the_workers_views(source, decoder_without_gpu):
    keys = [(1, index) for index in range(8)]
    files = TwoTablesAndFile(source, RECIPES, SEED).batch(keys)
    assert [file.ndim for file in files[0]] == [1] * 6 + [3, 3]  # PNG and CMYK: by the worker
    batch, other = decoder_without_gpu(files), TwoViews(source, RECIPES, SEED, "device").batch(keys)
    assert_same([batch[2:]], [other[2:]])
    pairs = [[view.numpy() for view in b[:2]] for b in (batch, other)]
    assert Distance.of(*pairs).within((0.2, 1, 2))
    assert not Distance.of(pairs[0], pairs[1][::-1]).within((0.2, 1, 2))


def test_a_file_the_device_cannot_decode_is_one_line(source, decoder_without_gpu):
    files, *rest = TwoTablesAndFile(source, RECIPES, SEED).batch([(1, 2), (1, 4)])
    files[1][40:] = 0
    with pytest.raises(DataError) as caught:
        decoder_without_gpu((files, *rest))
    message = str(caught.value)
    assert message.startswith(f"{source.path(4)}: cannot be read") and "\n" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_decoding_without_a_gpu_is_refused(source):
    for device in ("cpu", "cuda"):
        with pytest.raises(ConfigError) as caught:
            loader(source, backend="device", decode="gpu", device=device)
        message = str(caught.value)
        assert "AUGMENT.DECODE is gpu" in message and "\n" not in message
        assert "set AUGMENT.DECODE cpu" in message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_gpu_decoding_is_near_the_cpus(source, num_workers):
    options = dict(backend="device", num_workers=num_workers, pin_memory=True)
    ours = list(loader(source, decode="gpu", device="cuda", **options))
    cpus = list(loader(source, **options))
    pairs = [[view.cpu().numpy() for b in batches for view in b[:2]] for batches in (ours, cpus)]
    assert Distance.of(*pairs).within((3, 40, 120))
    assert_same([b[2:] for b in ours], [b[2:] for b in cpus])


def test_inputs_are_normalised_views(source):
    cfg = tiny.config()
    for backend in ("opencv", "device"):
        batch = next(iter(loader(source, backend=backend)))
        before = [tensor.clone() for tensor in batch]
        view_q, view_k, index = to_inputs(batch, cfg, torch.device("cpu"))
        views = batch[:2]
        if backend == "device":  # each view by itself
            views = [apply_batch(batch[v], batch[3 + v]) for v in (0, 1)]
        for ours, view in ((view_q, views[0]), (view_k, views[1])):
            assert torch.equal(ours, normalize(view, cfg.DATA.MEAN, cfg.DATA.STD))
            assert ours.is_contiguous()
        assert torch.equal(index, batch[2])
        assert_same([before], [batch])
        again = to_inputs(batch, cfg, torch.device("cpu"))
        assert_same([again], [(view_q, view_k, index)])
        last = to_inputs(batch, tiny.config(TRAIN__CHANNELS_LAST=True), torch.device("cpu"))
        assert_same([last], [(view_q, view_k, index)])
        assert last[0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(view_q, view_k)


def test_configuration_chooses_the_loader(small_images):
    changes = dict(DATA__SIZE=SIZE, DATA__RECIPE="v3", TRAIN__BATCH_SIZE=4, SEED=SEED)
    for augment, options in (
        ({}, {}),
        ({"AUGMENT__BACKEND": "pil"}, {"backend": "pil"}),
        ({"AUGMENT__BACKEND": "device"}, {"backend": "device"}),
        ({"AUGMENT__BACKEND": "device", "AUGMENT__RESIDENT": True},
         {"backend": "device", "resident": True}),
    ):  # fmt: skip
        cfg = tiny.config(**changes, **augment)
        recipes = build_view_recipes("v3", size=SIZE, crop_scale=cfg.DATA.CROP_SCALE)
        configured = build_loader(cfg, small_images, tiny.alone(), first_step=0, last_step=4)
        assert_same(configured, loader(small_images, recipes, **options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["AUGMENT.BACKEND", "dali"], "AUGMENT.BACKEND is 'dali'; allowed: pil, opencv, device"),
        (["AUGMENT.DECODE", "gpu"], "AUGMENT.DECODE is 'gpu'; allowed: cpu with AUGMENT.BACKEND"),
        (["AUGMENT.RESIDENT", "True"], "AUGMENT.RESIDENT is True; allowed: False with AUGMENT"),
        (["AUGMENT.BACKEND", "device", "AUGMENT.RESIDENT", "True", "AUGMENT.DECODE", "gpu"],
         "AUGMENT.DECODE is 'gpu'; allowed: cpu with AUGMENT.RESIDENT True"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError) as caught:
        load_pretrain_config(None, changes)
    assert message in str(caught.value)
    load_pretrain_config(None, ["AUGMENT.BACKEND", "device", "AUGMENT.DECODE", "gpu"])


def test_an_unknown_backend_is_refused(source):
    with pytest.raises(ConfigError, match="'dali' is unknown; allowed: pil, opencv, device$"):
        TwoViews(source, RECIPES, SEED, "dali")


def test_tables_hold_every_parameter():
    """Views that differ in one parameter have different rows."""
    p = draw_views(RECIPES, SEED, 0, 0, 100, 80)[0]
    rows = {tuple(table_row(p))}
    changes = dict(
        top=p.top + 1, left=p.left + 1, height=p.height + 1, width=p.width + 1, grey=not p.grey,
        grey_first=not p.grey_first, blur_sigma=0.5, flip=not p.flip, solarize=not p.solarize,
        jitter=(("hue", 0.1), ("contrast", 0.5)),
    )  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(p)}
    for name, value in changes.items():
        rows.add(tuple(table_row(dataclasses.replace(p, **{name: value}))))
    for jitter in ((("hue", 0.1), ("contrast", 0.6)), (("contrast", 0.5), ("hue", 0.1))):
        rows.add(tuple(table_row(dataclasses.replace(p, jitter=jitter))))
    assert len(rows) == len(changes) + 3 and {len(row) for row in rows} == {NUM_COLUMNS}
    assert np.isfinite(list(rows)).all()
