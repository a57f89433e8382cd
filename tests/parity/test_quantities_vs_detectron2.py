"""Every quantity that passes through the detector, by name, against Detectron2 itself: bitwise.

Weights are lively here: ReLUs open and close from pixel to pixel (`cases.Case.gated`).
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("detectron2")

from parity import golden  # noqa: E402
from parity.cases import CASES, LIVELY_CASES  # noqa: E402
from parity.controls import CONTROLS  # noqa: E402
from parity.detectron2_side import Detectron2  # noqa: E402
from parity.observed import Embedded, Named, observe  # noqa: E402

pytestmark = pytest.mark.detectron2

_PHASES = [(name, phase) for name, case in LIVELY_CASES.items() for phase in case.phases]
IN_EVERY_IMAGE = {
    "detect": ("proposals", "boxes", "scores", "classes"),
    "train": ("anchor_labels", "anchor_targets", "proposals", "sampled_index", "sampled_boxes")
    + ("sampled_classes", "sampled_targets"),
}
IN_EVERY_PASS = ("padded_images", "res4", "anchors", "objectness_logits", "anchor_deltas")
IN_EVERY_PASS += ("res5", "class_logits", "box_deltas")
LOSSES = ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc")


@cache
def theirs(name: str, phase: str) -> Named:
    torch.manual_seed(0)
    return observe(Detectron2(LIVELY_CASES[name]), LIVELY_CASES[name], phase)


def differing(ours: Named, others: Named) -> list[str]:
    assert set(ours) == set(others)
    return [name for name in others if not torch.equal(ours[name], others[name])]


@pytest.mark.parametrize(("name", "phase"), _PHASES)
def test_every_quantity_is_equal(name, phase):
    torch.manual_seed(0)
    ours = observe(Embedded(LIVELY_CASES[name]), LIVELY_CASES[name], phase)
    assert differing(ours, theirs(name, phase)) == []


def test_the_quantities_are_all_there():
    detected = theirs("moco", "detect")
    for batch, count in (("0", 1), ("1", 1), ("2", 1), ("batch", 3)):
        wanted = {f"detect/{batch}/{quantity}" for quantity in IN_EVERY_PASS}
        for quantity in IN_EVERY_IMAGE["detect"]:
            wanted |= {f"detect/{batch}/{quantity}.{index}" for index in range(count)}
        assert wanted == {key for key in detected if key.startswith(f"detect/{batch}/")}
    trained = theirs("moco", "train")
    wanted = {f"train/{quantity}" for quantity in (*IN_EVERY_PASS, *LOSSES, "rng_state")}
    for quantity in IN_EVERY_IMAGE["train"]:
        wanted |= {f"train/{quantity}.{index}" for index in range(3)}
    others = set(trained) - wanted
    assert wanted <= set(trained)
    kinds = [golden.quantity(key) for key in others]
    assert (kinds.count("gradient"), kinds.count("statistics")) == (171, 108)
    assert len(others) == 171 + 108
    stepped = [golden.quantity(key) for key in theirs("moco", "steps")]
    # Weights and statistics are the 333 entries of the state dict.
    assert (stepped.count("weight") + stepped.count("statistics"), stepped.count("momentum")) == (
        333,
        171,
    )
    assert stepped.count("learning_rates") == 5 and "rng_state" in stepped


@pytest.mark.parametrize("name", LIVELY_CASES)
def test_the_cases_are_what_they_are_called(name):
    """Nothing is vacuous: there are detections, foreground regions and positive losses."""
    if "detect" in LIVELY_CASES[name].phases:
        detected = theirs(name, "detect")
        counts = [len(detected[f"detect/batch/scores.{i}"]) for i in range(3)]
        assert min(counts) >= 3
        scores = torch.cat([detected[f"detect/batch/scores.{i}"] for i in range(3)])
        distinct = torch.unique(scores).numel()
        assert (distinct <= 3) if name.startswith("tied") else (distinct > len(scores) // 2)
    trained = theirs(name, "train")
    assert all(trained[f"train/{loss}"] > 0 for loss in LOSSES)
    foreground = [int((trained[f"train/sampled_classes.{i}"] < 3).sum()) for i in range(3)]
    has_boxes = [bool(boxes) for boxes in LIVELY_CASES[name].boxes]
    assert [count > 0 for count in foreground] == has_boxes
    gradients = [t for key, t in trained.items() if golden.quantity(key) == "gradient"]
    assert sum(bool(gradient.any()) for gradient in gradients) >= len(gradients) - 3


@pytest.mark.parametrize("label", CONTROLS)
def test_negative_control_breaks_the_comparison(label):
    control = CONTROLS[label]
    case = LIVELY_CASES[control.case]
    torch.manual_seed(0)
    ours = observe(control.side(case), case, control.phase)
    others = theirs(control.case, control.phase)
    broken = [n for n in others if n not in ours or not torch.equal(ours[n], others[n])]
    assert control.quantity in {golden.quantity(name) for name in broken}


def test_the_goldens_are_what_detectron2_gives():
    """One case: `record_detectron2.py --check` does all."""
    case = CASES["class_agnostic"]
    torch.manual_seed(case.seed)
    named = observe(Detectron2(case), case, "train")
    rows = golden.compare(named, golden.load("class_agnostic"))
    rows = [row for row in rows if row.name.startswith("train/")]
    assert [row for row in rows if not row.difference <= golden.TOLERANCE] == []
    if not golden.platform_differences():
        assert all(row.bitwise for row in rows)
