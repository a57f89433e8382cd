"""Files made with fast settings are plain: any program can load them and train on.

What is looked at is found in a process that imports torch and nothing of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from default_runs import C4, as_before, tool
from scripts import ROOT

from detection.config import load_detection_config
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.solver import build_optimizer
from moco.training.checkpoint import latest_verified, read_torch_file
from moco.training.optimizer import plain_state
from moco.training.plain_content import as_plain


def asked(folder, **paths) -> dict:
    """What a plain program finds: tests/plain_program.py."""
    script = folder / "plain_program.py"
    script.write_text((ROOT / "tests/plain_program.py").read_text())
    words = {name: [str(path) for path in of] for name, of in paths.items()}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(words)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("modules") == []
    return found


@pytest.fixture(scope="module")
def linear_run(default_runs, tmp_path_factory):
    """Fine-tuning, so that momentum has four dimensions, and features that are kept."""
    out = tmp_path_factory.mktemp("linear")
    for name, flags in (("finetune", ["--finetune"]), ("cached", ["--cached-features"])):
        tool(
            "evaluate_linear", "--config-file", ROOT / "configs/evaluation/imagenet_linear.yaml",
            "--weights", default_runs.run, "--data", default_runs.images, "--output-dir",
            out / name, "--device", "cpu", *flags, "DATA.SIZE", 32, "DATA.NUM_WORKERS", 0,
            "TRAIN.EPOCHS", 1, "TRAIN.BATCH_SIZE", 8, "TRAIN.AMP", True, "TRAIN.CHANNELS_LAST",
            True,
        )  # fmt: skip
    return out


def test_every_writer_writes_plain_files(default_runs, linear_run, tmp_path):
    for name in ("w.pth", "w.pkl"):
        tool("convert_to_d2", default_runs.run, tmp_path / name)
    for name, form in (("e.pth", "torchvision"), ("e.safetensors", "safetensors")):
        tool("export", default_runs.run, tmp_path / name, "--format", form)
    files = [
        *default_runs.run.glob("*.pth.tar"), *default_runs.trials.glob("trial_*/*.pth"),
        *linear_run.rglob("*.pth.tar"), *linear_run.rglob("*.pt"),
        *(tmp_path / name for name in ("w.pth", "w.pkl", "e.pth", "e.safetensors")),
    ]  # fmt: skip
    kinds = {path.name.rstrip("0123456789") for path in files}
    assert len(files) >= 10 and {"model_final.pth", "checkpoint_0001.pth.tar"} <= kinds, files
    found = asked(tmp_path, odd=files)
    assert set(found) == set(map(str, files))
    assert not any(found.values()), {path: odd[:3] for path, odd in found.items() if odd}


def test_torchs_sgd_goes_on_from_a_default_run(default_runs, tmp_path):
    path, _, _ = latest_verified(default_runs.run)
    content = as_before(read_torch_file(path))  # negative control
    torch.save(content, tmp_path / "before.pth.tar")
    found = asked(tmp_path, step=[path, tmp_path / "before.pth.tar"])
    right, wrong = found.values()
    assert right == []
    convolutions = [
        n for n, t in content["state_dict"].items()
        if n.startswith("module.encoder_q") and t.dim() == 4 and t.shape[-1] > 1
    ]  # fmt: skip
    assert wrong == convolutions and len(wrong) == 17


@pytest.mark.parametrize("fused", [True, False])
def test_a_detectors_optimizer_is_plain_and_keeps_its_own_ways(fused):
    """Written without them, loaded with them: kernels, memory order, and the same values."""
    pairs = {**C4, "MODEL.COMPILE": "kernels" if fused else "eager"}
    cfg = load_detection_config(None, [str(word) for pair in pairs.items() for word in pair])
    model = build_model(cfg).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg, model)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) if weight.requires_grad else None
    optimizer.step()
    before = [s["momentum_buffer"] for s in optimizer.state.values()]
    state = as_plain(plain_state(optimizer))
    assert all(group["fused"] is None for group in state["param_groups"])
    assert all(s["momentum_buffer"].is_contiguous() for s in state["state"].values())
    assert not all(buffer.is_contiguous() for buffer in before)
    other = build_optimizer(cfg, model)
    other.load_state_dict(state)
    [own], [loaded] = optimizer.param_groups, other.param_groups
    assert (own["fused"], own["foreach"]) == ((True, None) if fused else (None, True))
    assert (loaded["fused"], loaded["foreach"]) == (own["fused"], own["foreach"])
    for old, (weight, new) in zip(before, other.state.items(), strict=True):
        assert torch.equal(old, new["momentum_buffer"])
        assert new["momentum_buffer"].stride() == weight.stride()
