"""--elastic: 1, 2 or 4 processes go on with the same batches and pixels."""

import pytest
import torch
from elastic_runs import continued, joined, make_base, same, start_with_two, train_recorded
from pretrain_runs import arguments, pretrain
from processes import in_processes

from moco.errors import CheckpointError

# Relative, of losses over 8 steps where batch norm sees the same groups: rounding, which grows from
# step to step. Found: 2e-4; with other groups 8e-2.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("elastic"))


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
    in_processes(start_with_two, tmp_path, base / "images", tmp_path, changes, num=2)
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
        train_recorded(0, 1, base / "images", base / "whole", TRAIN__LR=0.1)
