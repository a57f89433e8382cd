"""The kNN monitor in two processes: each encodes its share, and the figure is one process's."""

from __future__ import annotations

import pytest
import tiny
import torch
from processes import in_processes

from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.evaluation import knn_search
from moco.evaluation.monitor import build_knn_monitor
from moco.methods import build_method


def _evaluate(rank, images, num_processes, stop_on=None, say=lambda line: None):
    """The figures, how many images this process encoded, its own statistics afterwards."""
    process = ProcessInfo(rank, num_processes, rank, torch.device("cpu"))
    cfg = tiny.config(KNN__BATCH_SIZE=3)
    torch.manual_seed(0)
    encoder = build_method(cfg, 32).transfer_encoder()
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(0.1 * rank)  # batch-norm statistics are each process's own
    monitor = build_knn_monitor(cfg, images, find_images(images), process, say)
    encoded, rate = [], knn_search.RateLines.add
    knn_search.RateLines.add = lambda self, num: encoded.append(num) or rate(self, num)
    figures = monitor(encoder, lambda: rank == stop_on and len(encoded) > 2)
    mean = next(b for n, b in encoder.named_buffers() if n.endswith("running_mean"))
    return figures, sum(encoded), mean[0].item()


@pytest.fixture
def alone(image_folder, tmp_path):
    return in_processes(_evaluate, tmp_path, str(image_folder), 1, num=1)[0]


def test_two_processes_share_the_work_and_give_the_same_figure(image_folder, tmp_path, alone):
    figures, num_encoded, _ = alone
    assert num_encoded == 40 and 0 <= figures["knn_top1"] <= 100
    ranks = in_processes(_evaluate, tmp_path, str(image_folder), 2)
    assert [rank[:2] for rank in ranks] == [(figures, 20), (figures, 20)]
    assert [rank[2] for rank in ranks] == pytest.approx([0.0, 0.1])


def test_a_stop_on_one_process_ends_it_on_all(image_folder, tmp_path):
    ranks = in_processes(_evaluate, tmp_path, str(image_folder), 2, 1)
    assert [figures for figures, *_ in ranks] == [None, None]
    assert ranks[1][1] < 20


def _unreadable(rank, images):
    said = []
    return _evaluate(rank, images, 2, say=said.append)[0], said[-1]


def test_an_error_of_one_process_ends_it_on_all(image_folder, tmp_path):
    (image_folder / "train" / "b" / "15.png").write_bytes(b"no image")  # of the second process
    first, second = in_processes(_unreadable, tmp_path, str(image_folder))
    assert first == second and first[0] == {}
    assert "kNN monitor off from now on" in first[1] and "15.png" in first[1]
