"""--elastic: 1, 2 or 4 processes go on with the same batches and pixels."""

import shutil

import pytest
import tiny
import torch
from pretrain_runs import arguments, make_images, pretrain
from processes import in_processes

from moco.data.images import find_images
from moco.distributed import ProcessInfo
from moco.errors import CheckpointError
from moco.training import trainer as trainer_module
from moco.training.trainer import Trainer

CHANGES = {"MODEL__BN_SPLITS": 1, "MODEL__NORM": "SyncBN", "CHECKPOINT__KEEP_LAST": 3}
# Relative, of losses over 8 steps where batch norm sees the same groups: rounding, which grows from
# step to step. Found: 2e-4; with other groups 8e-2.
TOLERANCE = 2e-3


def _train(rank, num, images, folder, **changes):
    """Train to the end. Returns: images' numbers and pixels of each step, losses, lines said."""
    steps, losses, said = [], [], []
    run = Trainer(
        tiny.config(**{**CHANGES, **changes}), find_images(images), folder,
        ProcessInfo(rank, num, rank, torch.device("cpu")),
        resume=True, elastic=True, say=said.append,
    )  # fmt: skip
    train_step = trainer_module.train_step

    def recording(model, method, optimizer, batch, **kwargs):
        view_q, view_k, index = batch[:3]
        steps.append((index.clone(), torch.stack([view_q, view_k], 1)))
        result = train_step(model, method, optimizer, batch, **kwargs)
        losses.append(result.loss)
        return result

    trainer_module.train_step = recording  # in a process of its own
    run.train()
    return {"steps": steps, "losses": torch.stack(losses), "said": said, "first": run.first_step}


def _work(rank, num, images, folder, changes):
    return _train(rank, num, images, folder, **changes)


def _start(rank, images, folder, changes):
    """Two processes for one epoch of three."""
    run = Trainer(
        tiny.config(**{**CHANGES, **changes}), find_images(images), folder / "whole",
        ProcessInfo(rank, 2, rank, torch.device("cpu")), say=lambda line: None,
    )  # fmt: skip
    run.train()
    return True


def joined(ranks, order=None):
    """Global batches of each step, the ranks' slices joined in rank order."""
    order = range(len(ranks)) if order is None else order
    return [
        tuple(torch.cat([ranks[rank]["steps"][step][i] for rank in order]) for i in (0, 1))
        for step in range(len(ranks[0]["steps"]))
    ]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)
    )


def continued(num, base, images, **changes):
    """What each of `num` processes records from the first epoch's checkpoint on."""
    folder = base / f"from_{num}_{len(changes)}"
    folder.mkdir()
    for path in (base / "whole").glob("checkpoint_0000.*"):
        shutil.copy(path, folder)
    ranks = in_processes(_work, base, num, images, folder, changes, num=num)
    assert [rank["first"] for rank in ranks] == [4] * num
    return ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "images").mkdir()
    make_images(folder / "images")
    in_processes(_start, folder, folder / "images", folder, {}, num=2)
    return folder


@pytest.fixture(scope="module")
def by_number(base):
    return {num: continued(num, base, base / "images") for num in (1, 2, 4)}


def test_every_global_batch_has_the_same_images_and_pixels(by_number):
    expected = joined(by_number[2])
    assert len(expected) == 8 and expected[0][1].shape == (8, 2, 3, 16, 16)
    for num in (1, 4):
        assert same(joined(by_number[num]), expected), num
    # Negative controls: slices in another order, another step's batch.
    assert not same(joined(by_number[2], order=[1, 0]), expected)
    assert not same(expected[1:], expected[:-1])


def test_losses_stay_close_where_the_groups_stay(by_number):
    losses = {num: torch.stack([r["losses"] for r in ranks]).mean(0)
              for num, ranks in by_number.items()}  # fmt: skip
    for num in (1, 4):
        torch.testing.assert_close(losses[num], losses[2], rtol=TOLERANCE, atol=0)
    # Negative control: another curve is further away than the tolerance.
    assert not torch.allclose(losses[2][1:], losses[2][:-1], rtol=TOLERANCE, atol=0)


def test_what_changes_is_said(by_number):
    for num in (1, 4):
        said = " ".join(by_number[num][0]["said"])
        assert f"was made with 2 processes, now there are {num}; batches, their order" in said
        assert "warning" not in said  # SyncBN: one group before and after
    assert "--elastic" not in " ".join(by_number[2][0]["said"])


def test_groups_of_batch_norm_by_process_need_accumulation_to_stay(base, tmp_path):
    """Without, another curve and a warning: also the control of the tolerance."""
    changes = {"MODEL__NORM": "BN"}
    in_processes(_start, tmp_path, base / "images", tmp_path, changes, num=2)
    two = continued(2, tmp_path, base / "images", **changes)
    one = continued(1, tmp_path, base / "images", **changes)
    parts = continued(1, tmp_path, base / "images", TRAIN__ACCUMULATION_STEPS=2, **changes)
    assert same(joined(one), joined(two)) and same(joined(parts), joined(two))
    said = " ".join(one[0]["said"])
    assert "batch norm saw groups of 4 images before and sees groups of 8 now" in said
    assert "TRAIN.ACCUMULATION_STEPS 2 keeps groups of 4" in said
    assert "warning" not in " ".join(parts[0]["said"])
    curves = [torch.stack([r["losses"] for r in ranks]).mean(0) for ranks in (two, one, parts)]
    assert not torch.allclose(curves[1], curves[0], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(curves[2], curves[0], rtol=TOLERANCE, atol=0)


def test_the_command_refuses_without_the_flag_and_goes_on_with_it(base, tmp_path):
    words = arguments(base / "images", tmp_path / "run", "--resume", TRAIN__EPOCHS=2)
    log = tmp_path / "log"
    assert pretrain(words, log, 2) == [0, 0]
    assert pretrain(words, log) == [2]
    refusal = (tmp_path / "log.0").read_text().splitlines()[-1]
    assert refusal.startswith("error: ") and "add --elastic" in refusal
    assert "was made with 2 processes, now there are 1" in refusal
    assert pretrain([*words[:6], "--elastic", *words[6:]], log) == [0]


def test_a_batch_that_does_not_divide_is_refused_before_anything(base, tmp_path):
    words = arguments(base / "images", tmp_path / "run", "--resume", "--elastic")
    assert pretrain(words, tmp_path / "log", 3) == [2, 2, 2]
    said = (tmp_path / "log.0").read_text()
    assert "TRAIN.BATCH_SIZE 8 (global) cannot be shared by 3 processes" in said
    assert not (tmp_path / "run").exists()


def test_elastic_still_refuses_another_configuration(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"another configuration \(TRAIN.LR 0.03 -> 0.1\)"):
        _train(0, 1, base / "images", base / "whole", TRAIN__LR=0.1)
