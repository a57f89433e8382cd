"""The kNN monitor: what it uses of a large data set, computes with, and leaves alone."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn as nn

from moco.data.images import find_images
from moco.errors import ConfigError
from moco.evaluation import monitor as module
from moco.evaluation.monitor import build_knn_monitor
from moco.kernels.choose import use_kernels_
from moco.kernels.compiler import computes
from moco.methods import build_method


def build(images, said, **changes):
    source = find_images(images)
    return build_knn_monitor(tiny.config(**changes), str(images), source, tiny.alone(), said.append)


def encoder_of(cfg):
    torch.manual_seed(0)
    return build_method(cfg, 32).transfer_encoder()


def test_all_images_of_a_small_data_set(image_folder):
    said = []
    monitor = build(image_folder, said)
    assert monitor(encoder_of(tiny.config())).keys() == {"knn_top1"}
    assert said == [
        "kNN monitor: all 32 training images and all 8 test images, shared by 1 process(es), every "
        "1 epoch(s); their encoding computes about 31.2% of what an epoch's training does"
    ]


def test_a_share_of_each_class_of_a_large_one(image_folder):
    said = []
    monitor = build(image_folder, said, KNN__MAX_IMAGES=8)
    assert sorted(monitor.train.labels) == [0] * 4 + [1] * 4 and len(monitor.test) == 8
    assert monitor(encoder_of(tiny.config()))["knn_images"] == 8
    assert "8 of 32 training images and all 8 test images (KNN.MAX_IMAGES 8)" in said[0]
    assert monitor.train.paths == build(image_folder, [], KNN__MAX_IMAGES=8).train.paths
    assert len(build(image_folder, [], KNN__MAX_IMAGES=0).train) == 32


def test_a_stop_ends_it_between_batches(image_folder):
    asked = []

    def stop():
        asked.append(True)
        return len(asked) > 3

    monitor, encoder = build(image_folder, [], KNN__BATCH_SIZE=4), encoder_of(tiny.config())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert monitor(encoder, stop) is None and len(asked) < 8
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert encoder.training


def test_it_computes_by_the_kernels_that_train(image_folder):
    cfg = tiny.config(TRAIN__CHANNELS_LAST=True, TRAIN__COMPILE="kernels")
    encoder = encoder_of(cfg).to(memory_format=torch.channels_last)
    try:
        use_kernels_(encoder)
    except ConfigError as error:
        pytest.skip(str(error))
    monitor = build(
        image_folder, [], TRAIN__CHANNELS_LAST=True, TRAIN__COMPILE="kernels", KNN__PERIOD=1
    )
    used, norms = [], [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    reader = monitor._reader

    def watched(encode):
        def encode_and_look(images):
            used.append(all(computes(norm) for norm in norms))
            return encode(images)

        return reader(encode_and_look)

    monitor._reader = watched
    assert monitor(encoder)["knn_top1"] >= 0
    assert used and all(used)
    encoder.eval()
    with torch.no_grad():
        assert not any(computes(norm) for norm in norms)  # afterwards as before


def test_the_buffers_are_rank_0s_and_come_back(monkeypatch):
    norm = nn.BatchNorm2d(2)

    def from_main(network):
        network.running_mean.fill_(7)

    monkeypatch.setattr(module, "broadcast_buffers", from_main)
    with module._buffers_of_main(norm):
        assert norm.running_mean.tolist() == [7, 7]
    assert norm.running_mean.tolist() == [0, 0]
