"""facebookresearch/moco's own converter, run as it is, on a default run's checkpoint."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from default_runs import C4
from official_conversion import arrays_equal, official_conversion

from detection.config import load_detection_config
from detection.engines.embedded.faster_rcnn import build_model
from detection.weights import load_backbone_weights
from moco.training.checkpoint import latest_verified, read_torch_file


@pytest.mark.reference
def test_its_file_loads_as_our_converters_does(default_runs, tmp_path):
    if "MOCO_REFERENCE" not in os.environ:
        pytest.skip("MOCO_REFERENCE names no checkout of facebookresearch/moco at 7397dfe")
    script = Path(os.environ["MOCO_REFERENCE"]) / "detection/convert-pretrain-to-detectron2.py"
    source, out = latest_verified(default_runs.run)[0], tmp_path / "official.pkl"
    command = [sys.executable, "-W", "ignore", script, source, out]
    subprocess.run(command, check=True, capture_output=True)
    official = pickle.loads(out.read_bytes())
    expected = official_conversion(read_torch_file(source))
    assert arrays_equal(official.pop("model"), expected.pop("model")) and official == expected

    words = [str(word) for pair in C4.items() for word in pair]
    cfg = load_detection_config(None, [*words, "MODEL.RESNETS.NORM", "SyncBN",
                                       "MODEL.BACKBONE.FREEZE_AT", "0"])  # fmt: skip
    torch.manual_seed(0)
    theirs = build_model(cfg)
    torch.manual_seed(0)
    ours = build_model(cfg)
    report = load_backbone_weights(theirs, out)
    assert report.dropped == {"projection head": [
        "stem.fc.0.weight", "stem.fc.0.bias", "stem.fc.2.weight", "stem.fc.2.bias",
    ]}  # fmt: skip
    load_backbone_weights(ours, default_runs.converted)
    state, other = theirs.state_dict(), ours.state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert len(counters) == 53 and all(state[name] == 4 and other[name] == 0 for name in counters)
    rest = [name for name in state if name not in counters]
    assert all(torch.equal(state[name], other[name]) for name in rest)
