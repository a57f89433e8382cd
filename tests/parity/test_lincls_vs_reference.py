"""Linear classification against the reference's: live where a copy is at hand, else its numbers.

`MOCO_REFERENCE=CHECKOUT pytest -m reference` runs the live tests (facebookresearch/moco at
7397dfe). The controls break one thing each and must be seen.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from parity.lincls_sides import (
    CASES,
    GOLDEN,
    differences,
    relative_differences,
    run_ours,
    run_reference,
)

from moco.errors import CheckpointError
from moco.training.checkpoint import read_torch_file

GROUPS = 9
GOLDEN_TOLERANCE = 1e-10  # float64, relative to a group's largest value


@pytest.fixture
def reference_at_hand():
    if "MOCO_REFERENCE" not in os.environ:
        pytest.skip("MOCO_REFERENCE names no checkout of facebookresearch/moco at 7397dfe")


def folders(tmp_path):
    for name in ("reference", "ours"):
        (tmp_path / name).mkdir()
        yield tmp_path / name


@pytest.mark.reference
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_the_references_bitwise(name, reference_at_hand, tmp_path):
    """Loss, logits, classifier, momentum, rates, accuracies of main_lincls.py, in float32."""
    one, other = folders(tmp_path)
    theirs, initial = run_reference(CASES[name], one)
    ours = run_ours(CASES[name], other, initial)
    found = differences(ours, theirs)
    assert len(found) == GROUPS and len(ours["loss"]) == 10
    assert max(found.values()) == 0.0, found


@pytest.mark.reference
def test_checkpoints_have_the_references_layout(reference_at_hand, tmp_path):
    one, other = folders(tmp_path)
    _, initial = run_reference(CASES["small"], one)
    run_ours(CASES["small"], other, initial)
    theirs = read_torch_file(one / "checkpoint.pth.tar")
    ours = read_torch_file(other / "run" / "checkpoint_0004.pth.tar")
    assert set(ours) == {*theirs, "extra"}
    assert ours["epoch"] == theirs["epoch"] and ours["arch"] == theirs["arch"]
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    for key, tensor in theirs["state_dict"].items():
        assert torch.equal(tensor, ours["state_dict"][key]), key
    assert float(theirs["best_acc1"]) == pytest.approx(ours["best_acc1"])


# The reference's recorded numbers, in float64, and the controls.


def golden(name: str) -> tuple[dict, dict]:
    with np.load(GOLDEN) as file:
        def part(which):
            start = f"{name}/{which}/"
            return {k.removeprefix(start): file[k] for k in file if k.startswith(start)}

        return part("steps"), {k: torch.from_numpy(v) for k, v in part("initial").items()}


def against_golden(name, folder, **changes) -> dict[str, float]:
    steps, initial = golden(name)
    ours = run_ours(CASES[name], folder, initial, torch.float64, **changes)
    return relative_differences(ours, steps)


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_numbers(name, tmp_path):
    found = against_golden(name, tmp_path)
    assert len(found) == GROUPS and max(found.values()) < GOLDEN_TOLERANCE, found


def train_mode(trainer):
    """Batch norm in train mode: other features, and statistics that move."""
    encoder = trainer.classifier.encoder
    forward = encoder.forward_features

    encoder.forward_features = lambda images: encoder.train() and forward(images)


def larger_start(trainer):
    """Weights ~ N(0, 0.02)."""
    with torch.no_grad():
        trainer.classifier.encoder.fc.weight.mul_(2)


def no_momentum_at_first(trainer):
    """Momentum that begins with a damped gradient, as some optimizers do."""
    trainer.optimizer.param_groups[0]["dampening"] = 0.1


CONTROLS = {
    "batch norm in train mode": {"change": train_mode},
    "other initial std": {"change": larger_start},
    "dampened momentum": {"change": no_momentum_at_first},
    "weight decay": {"changes": ("TRAIN.WEIGHT_DECAY", "1e-4")},
    "another schedule": {"changes": ("TRAIN.SCHEDULE", "cosine")},
}


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_control(control, tmp_path):
    found = against_golden("small", tmp_path, **CONTROLS[control])
    for group in ("loss", "logits", "classifier, weight", "classifier, bias"):
        assert found[group] > 1e3 * GOLDEN_TOLERANCE, (group, found)


def test_negative_control_a_moved_backbone_is_refused(tmp_path):
    _, initial = golden("small")
    initial = {name: tensor.float() for name, tensor in initial.items()}
    run_ours(CASES["small"], tmp_path, initial)  # the same without the change is accepted
    (tmp_path / "moved").mkdir()
    with pytest.raises(CheckpointError, match="tensors of the frozen backbone changed"):
        run_ours(CASES["small"], tmp_path / "moved", initial, change=train_mode)
