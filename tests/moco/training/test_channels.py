"""Runs on images of one and four channels: first convolution, monitor, resume, what reads them."""

from __future__ import annotations

import foreign_files
import four_bands
import linear_runs
import pytest
import tiny
import torch

from detection.convert import convert_checkpoint
from moco.data.images import find_images
from moco.data.whole_images import WholeImages
from moco.errors import CheckpointError, ConfigError, DataError
from moco.evaluation.cached import evaluate_cached
from moco.evaluation.knn_evaluation import KnnSettings, evaluate_knn
from moco.evaluation.monitor import build_knn_monitor
from moco.evaluation.weights import read_pretrained
from moco.reporting.pictures import nearest_neighbours, view_pairs
from moco.training import checkpoint as ckpt
from moco.training.export import export_backbone
from moco.training.layouts import read_backbone
from moco.training.trainer import Trainer

LAST = "checkpoint_0002.pth.tar"
# As `tools/pretrain.py` computes when nothing is said: what the machine is good at.
DEFAULTS = {"TRAIN__AMP": None, "TRAIN__CHANNELS_LAST": None, "TRAIN__COMPILE": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("bands")
    return {n: four_bands.make_folder(base / str(n), n) for n in (1, 4)}


def trainer(images, folder, channels, *, variant="moco", resume=False, **changes):
    cfg = tiny.method_config(variant, **{**four_bands.changes(channels), **changes})
    return Trainer(cfg, find_images(images), folder, tiny.alone(), resume=resume,
                   say=lambda line: None)  # fmt: skip


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """Runs with the default settings, and the figures of their monitors."""
    runs = {}
    for channels, images in folders.items():
        folder = tmp_path_factory.mktemp("run")
        run = trainer(images, folder, channels, **DEFAULTS)
        monitor = build_knn_monitor(run.cfg, str(images), run.source, run.process,
                                    lambda line: None)  # fmt: skip
        assert run.train([], monitor) == 0
        figure = monitor(run.method.transfer_encoder())["knn_top1"]
        runs[channels] = folder, run, figure
    return runs


@pytest.mark.parametrize("channels", [1, 4])
def test_the_first_convolution_fits_and_the_run_is_evaluated(folders, finished, channels):
    folder, run, figure = finished[channels]
    state = ckpt.read_torch_file(folder / LAST)["state_dict"]
    for encoder in ("encoder_q", "encoder_k"):
        assert state[f"module.{encoder}.conv1.weight"].shape == (8, channels, 3, 3)
    assert figure == 100  # the classes differ in the last channel
    results = evaluate_knn(
        KnnSettings(ks=(5,), temperatures=(0.1,)), str(folder), str(folders[channels]), None,
        tiny.alone(), batch_size=5, num_workers=0, say=lambda line: None,
    )  # fmt: skip
    assert results["top1"] == figure
    pretrained = read_pretrained(str(folder))
    assert pretrained.channels == channels and len(pretrained.pixel_statistics()[0]) == channels


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_the_report(folders, finished, channels):
    _, run, _ = finished[channels]
    assert view_pairs(run.cfg, run.source, 2).title == "Augmented views"
    encoder = run.method.transfer_encoder()
    nearest_neighbours(encoder, run.cfg, run.source, num_queries=1, num_neighbours=2)


@pytest.mark.parametrize("channels", [1, 4])
def test_detection_refuses_such_weights_by_name(finished, channels, tmp_path):
    found = f"takes images of {channels} channels; detection reads INPUT.FORMAT RGB or BGR, so 3"
    with pytest.raises(CheckpointError, match=found) as error:
        convert_checkpoint(finished[channels][0], tmp_path / "out.pth")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["pil", "opencv", "device"])
@pytest.mark.parametrize("channels", [1, 4])
def test_every_backend_trains_and_resumes_to_the_same_bits(folders, tmp_path, channels, backend):
    changes = {"AUGMENT__BACKEND": backend, "DATA__RECIPE": "v3", "TRAIN__EPOCHS": 1}
    name = "checkpoint_0000.pth.tar"
    whole = trainer(folders[channels], tmp_path / "whole", channels, **changes)
    assert whole.train() == 0
    stopped = trainer(folders[channels], tmp_path / "run", channels, **changes)
    assert stopped.train([tiny.StopAfter(2)]) == 143
    resumed = trainer(folders[channels], tmp_path / "run", channels, resume=True, **changes)
    assert resumed.first_step == 3 and resumed.train() == 0
    digests = {tiny.state_digest(ckpt.read_torch_file(tmp_path / f / name))
               for f in ("whole", "run")}  # fmt: skip
    assert len(digests) == 1
    other = {"AUGMENT__BACKEND": "opencv" if backend == "pil" else "pil"}  # negative control
    trainer(folders[channels], tmp_path / "other", channels, **{**changes, **other}).train()
    assert tiny.state_digest(ckpt.read_torch_file(tmp_path / "other" / name)) not in digests


@pytest.mark.parametrize("variant", ["moco_v3: ViT", "memory_bank", "end_to_end"])
def test_other_methods_take_four_channels(folders, tmp_path, variant):
    run = trainer(folders[4], tmp_path / "run", 4, variant=variant, TRAIN__EPOCHS=1)
    assert run.train() == 0
    first = run.method.transfer_encoder()
    convolution = first.patch_embed.proj if "ViT" in variant else first.conv1
    assert convolution.weight.shape[1] == 4
    assert read_pretrained(str(tmp_path / "run")).channels == 4


def test_weights_of_other_channels_are_no_start(folders, finished, tmp_path):
    run = trainer(folders[4], tmp_path / "a", 4, MODEL__WEIGHTS=finished[4][0])
    assert torch.equal(run.method.encoder_q.conv1.weight,
                       finished[4][1].method.encoder_q.conv1.weight)  # fmt: skip
    with pytest.raises(CheckpointError, match="takes images of 4 channels, DATA.CHANNELS is 1"):
        trainer(folders[1], tmp_path / "b", 1, MODEL__WEIGHTS=finished[4][0])


def test_an_image_without_a_fourth_band_ends_the_run_or_is_replaced(folders, tmp_path):
    images = four_bands.make_folder(tmp_path / "images", 4)
    (folders[1] / "train" / "a" / "00.png").rename(images / "train" / "a" / "00.png")
    with pytest.raises(DataError, match="it is of mode 'L'; DATA.CHANNELS 4 needs four bands"):
        trainer(images, tmp_path / "a", 4).train()
    replaced = trainer(images, tmp_path / "b", 4, DATA__MAX_BAD_FRACTION=0.1)
    assert replaced.train() == 0


@pytest.mark.parametrize("channels", [1, 4])
def test_the_backbone_is_exported_for_this_projects_network(folders, channels, tmp_path):
    trainer(folders[channels], tmp_path / "run", channels, TRAIN__EPOCHS=1).train()
    done = export_backbone(tmp_path / "run", tmp_path / "out.safetensors", form="safetensors")
    assert f"channels={channels})" in done.record["network"]
    assert done.record["self_check"]["bitwise_equal"]


@pytest.mark.parametrize("channels", [1, 4])
def test_linear_classification_and_whole_images(folders, finished, channels, tmp_path):
    weights, images = str(finished[channels][0]), folders[channels]
    run = linear_runs.trainer(images, weights, tmp_path / "run", TRAIN__EPOCHS=1)
    assert run.train() is None and run.pixels == read_pretrained(weights).pixel_statistics()
    cfg = linear_runs.config(CACHED__LRS=(0.1,), TRAIN__EPOCHS=1)
    results = evaluate_cached(cfg, weights, str(images), tmp_path / "cached", tiny.alone(),
                              say=lambda line: None)  # fmt: skip
    assert results["top1"] is not None
    view, *_ = WholeImages(find_images(images), 16, channels)[0]
    assert view.shape == (channels, 16, 16)
    with pytest.raises(ConfigError, match=rf"DATA.MEAN is .* for images of {channels} channels"):
        linear_runs.trainer(images, weights, tmp_path / "b", DATA__MEAN=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("build", [foreign_files.narrow_resnet, foreign_files.small_vit])
def test_files_for_other_numbers_of_channels_are_refused(build):
    state = build()
    name = "conv1.weight" if "conv1.weight" in state else "patch_embed.proj.weight"
    state[name] = torch.cat([state[name], state[name][:, :2]], dim=1)
    with pytest.raises(CheckpointError, match=f"'{name}' takes images of 5 channels; allowed: 1,"):
        read_backbone(state, "x")
