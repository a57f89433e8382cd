"""The mask head must give what Detectron2 gave when golden/mask_head.npz was recorded.

Masks, run lengths and the random state exactly; floats bit for bit on the recording machine's
kind of CPU, within 1e-5 of the largest value elsewhere.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity import mask_golden

from detection.engines.embedded import mask_head

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(mask_golden.GOLDEN) as content:
        return dict(content)


def differing(ours: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> list[str]:
    """Names whose arrays are not equal (integers) or not close (floats)."""
    assert ours.keys() == golden.keys()
    names = []
    for name, wanted in golden.items():
        limit = TOLERANCE * np.abs(wanted).max() if wanted.dtype.kind == "f" else 0
        same_kind = (ours[name].shape, ours[name].dtype) == (wanted.shape, wanted.dtype)
        if not same_kind or np.abs(ours[name].astype(float) - wanted).max() > limit:
            names.append(name)
    return names


def test_the_mask_head_equals_the_recording(golden):
    assert len(golden) == 20
    assert differing(mask_golden.embedded(), golden) == []


def test_negative_control_another_class_s_mask(golden, monkeypatch):
    own = mask_head._of_class
    monkeypatch.setattr(mask_head, "_of_class", lambda x, c: own(x, (c + 1) % 3))
    wrong = differing(mask_golden.embedded(), golden)
    assert {"loss", "probabilities", "gradient:features"} <= set(wrong)
    assert not {"targets", "pasted", "initial:deconv.weight"} & set(wrong)


def test_negative_control_targets_without_the_least_side(golden, monkeypatch):
    monkeypatch.setattr(mask_head, "_MIN_SIDE", 0.01)
    assert "targets" in differing(mask_golden.embedded(), golden)


def test_negative_control_another_threshold(golden, monkeypatch):
    paste = mask_head.paste_mask
    monkeypatch.setattr(
        mask_head, "paste_mask", lambda *args, **kw: paste(*args, **kw, threshold=0.4)
    )
    assert differing(mask_golden.embedded(), golden) == ["rle_counts"]


def test_negative_control_another_initialisation(golden, monkeypatch):
    kaiming = torch.nn.init.kaiming_normal_
    monkeypatch.setattr(
        torch.nn.init, "kaiming_normal_", lambda w, **kw: kaiming(w, **{**kw, "mode": "fan_in"})
    )
    assert "initial:mask_fcn1.weight" in differing(mask_golden.embedded(), golden)


@pytest.mark.detectron2
def test_the_recording_is_detectron2_s_and_ours_to_the_last_bit():
    pytest.importorskip("detectron2")
    from parity.mask_golden_detectron2 import record

    ours, theirs = mask_golden.embedded(), record()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
    with np.load(mask_golden.GOLDEN) as golden:
        assert differing(dict(golden), theirs) == []
