"""Linear classification, fine-tuning, kNN and cached features in two gloo processes."""

from __future__ import annotations

import signal

import linear_runs as runs
import pytest
import tiny
import torch
from processes import in_processes

from moco.distributed import ProcessInfo
from moco.evaluation.cached import evaluate_cached
from moco.evaluation.knn_evaluation import KnnSettings, evaluate_knn
from moco.evaluation.linear import evaluate_linear
from moco.training.checkpoint import read_torch_file


def process(rank, world_size=2):
    return ProcessInfo(rank, world_size, rank, torch.device("cpu"))


def quiet(line):
    pass


def _evaluate(rank, images, weights, folder, changes, resume):
    return evaluate_linear(
        runs.config(**changes), weights, images, folder, process(rank), resume=resume, say=quiet
    )


def evaluate(tmp_path, images, name, *, num=2, resume=False, **changes):
    args = (str(images), runs.write_weights(tmp_path), str(tmp_path / name), changes, resume)
    return in_processes(_evaluate, tmp_path, *args, num=num)


def weights_of(tmp_path, name):
    content = read_torch_file(tmp_path / name / "checkpoint_0002.pth.tar")
    momentum = content["optimizer"]["state"][0]["momentum_buffer"]
    return {**content["state_dict"], "momentum": momentum}


@pytest.fixture
def one_and_two(image_folder, tmp_path):
    one = evaluate_linear(
        runs.config(), runs.write_weights(tmp_path), str(image_folder), tmp_path / "one",
        process(0, 1), say=quiet,
    )  # fmt: skip
    return one, evaluate(tmp_path, image_folder, "two")


def test_two_processes_equal_one(one_and_two, tmp_path):
    """The same batches, the incomplete one (8 images: 4 and 4) included; sums in another order."""
    one, (first, second) = one_and_two
    assert first["num_processes"] == 2
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    for a, b in zip(one["curve"], first["curve"], strict=True):
        assert (a["epoch"], a["lr"], a["top1"]) == (b["epoch"], b["lr"], b["top1"])
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
    alone, together = weights_of(tmp_path, "one"), weights_of(tmp_path, "two")
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=1e-3, atol=1e-5)
    assert first["backbone_unchanged"] == one["backbone_unchanged"]


def test_an_uneven_last_batch_is_weighted_by_its_images(image_folder, tmp_path):
    """31 images in batches of 12: the last has 7, shared as 3 and 4."""
    next((image_folder / "train" / "a").iterdir()).unlink()
    one = evaluate_linear(
        runs.config(), runs.write_weights(tmp_path), str(image_folder), tmp_path / "one",
        process(0, 1), say=quiet,
    )  # fmt: skip
    two, _ = evaluate(tmp_path, image_folder, "two")
    assert two["curve"][-1]["test_loss"] == pytest.approx(one["curve"][-1]["test_loss"], rel=1e-3)
    alone, together = weights_of(tmp_path, "one"), weights_of(tmp_path, "two")
    torch.testing.assert_close(
        alone["module.fc.weight"], together["module.fc.weight"], rtol=1e-3, atol=1e-6
    )
    # Negative control: with the plain mean of each process it is another classifier.
    import moco.evaluation.classifier as classifier

    original = classifier.classify_step
    args = (str(image_folder), runs.write_weights(tmp_path), str(tmp_path / "plain"))
    in_processes(_evaluate_unweighted, tmp_path, *args)
    plain = weights_of(tmp_path, "plain")["module.fc.weight"]
    assert not torch.allclose(alone["module.fc.weight"], plain, rtol=1e-3, atol=1e-6)
    assert classifier.classify_step is original


def _evaluate_unweighted(rank, images, weights, folder):
    import moco.evaluation.linear as linear

    step = linear.classify_step

    def unweighted(*args, num_own, num_global, **options):
        return step(*args, num_own=1, num_global=2, **options)

    linear.classify_step = unweighted
    return _evaluate(rank, images, weights, folder, {}, False)


def test_fewer_images_than_processes_in_the_last_batch(image_folder, tmp_path):
    """25 images in batches of 12: the last has one, which the second process alone counts."""
    for file in sorted((image_folder / "train" / "a").iterdir())[:7]:
        file.unlink()
    one = evaluate_linear(
        runs.config(), runs.write_weights(tmp_path), str(image_folder), tmp_path / "one",
        process(0, 1), say=quiet,
    )  # fmt: skip
    two, _ = evaluate(tmp_path, image_folder, "two")
    assert two["curve"][-1]["test_loss"] == pytest.approx(one["curve"][-1]["test_loss"], rel=1e-3)


def _stop_and_resume(rank, images, weights, folder, finetune):
    options = {"FINETUNE__ENABLED": finetune}
    trainer = runs.trainer(images, weights, folder, process(rank), **options)
    stopped = trainer.train([tiny.StopAfter(4)] if rank == 1 else [])
    resumed = runs.trainer(images, weights, folder, process(rank), resume=True, **options)
    resumed.train()
    return stopped, resumed.total_steps


@pytest.mark.parametrize("finetune", [False, True])
def test_a_signal_to_one_process_stops_both_and_resume_is_exact(image_folder, tmp_path, finetune):
    from pathlib import Path

    whole = evaluate(tmp_path, image_folder, "whole", FINETUNE__ENABLED=finetune)
    args = (Path(image_folder), runs.write_weights(tmp_path), tmp_path / "cut", finetune)
    ranks = in_processes(_stop_and_resume, tmp_path, *args)
    # Process 0 learns of it from process 1.
    assert [stopped for stopped, _ in ranks] == [signal.SIGTERM, signal.SIGTERM]
    assert runs.digest(tmp_path / "cut") == runs.digest(tmp_path / "whole")
    assert whole[0]["status"] == "finished"


def test_fine_tuning_normalises_over_both_processes(image_folder, tmp_path):
    """SyncBN: as one process with the whole batch, up to the order of sums."""
    small = {"FINETUNE__ENABLED": True, "FINETUNE__BACKBONE_LR": 1e-4, "TRAIN__LR": 1e-4}
    one = evaluate_linear(
        runs.config(**small), runs.write_weights(tmp_path), str(image_folder), tmp_path / "one",
        process(0, 1), say=quiet,
    )  # fmt: skip
    two, _ = evaluate(tmp_path, image_folder, "two", **small)
    assert two["curve"][-1]["test_loss"] == pytest.approx(one["curve"][-1]["test_loss"], rel=1e-2)
    alone, together = weights_of(tmp_path, "one"), weights_of(tmp_path, "two")
    name = "module.layer1.0.bn1.running_mean"
    torch.testing.assert_close(alone[name], together[name], rtol=1e-3, atol=1e-4)


def _knn(rank, images, weights, features, world_size):
    settings = KnnSettings((1, 5, 32), (0.1, 0.5), features, size=16)
    return evaluate_knn(
        settings, weights, images, None, process(rank, world_size), batch_size=4, num_workers=0,
        say=quiet,
    )["sweep"]  # fmt: skip


@pytest.mark.parametrize("num", [2, 3])
def test_knn_of_several_processes_is_that_of_one(image_folder, tmp_path, num):
    """8 test and 32 training images in 3 processes: uneven shares."""
    weights = runs.write_weights(tmp_path)
    one = _knn(0, str(image_folder), weights, "backbone", 1)
    args = (str(image_folder), weights, "backbone", num)
    assert in_processes(_knn, tmp_path, *args, num=num) == [one] * num


def _cached(rank, images, weights, folder):
    cfg = runs.config(CACHED__LRS="(0.003, 0.0003)")
    results = evaluate_cached(cfg, weights, images, folder, process(rank), say=quiet)
    return results and results["sweep"]


def test_cached_features_of_two_processes_are_those_of_one(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("moco.evaluation.feature_store.PART", 10)
    weights = runs.write_weights(tmp_path)
    one = evaluate_cached(
        runs.config(CACHED__LRS="(0.003, 0.0003)"), weights, str(image_folder), tmp_path / "one",
        process(0, 1), say=quiet,
    )  # fmt: skip
    args = (str(image_folder), weights, str(tmp_path / "two"))
    assert in_processes(_cached, tmp_path, *args) == [one["sweep"], None]
