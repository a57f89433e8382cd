"""float16: the factor moves as torch's GradScaler moves it, left-out steps, exact continuation."""

from __future__ import annotations

import pytest
import tiny
import torch
from support.device_runs import PROCESS, make_images
from support.pretend_cuda import DEVICE, pretend_cuda

from moco.data.images import find_images
from moco.errors import CheckpointError, NonFiniteError
from moco.methods import build_method
from moco.training import checkpoint as ckpt
from moco.training import loss_scale as module
from moco.training.acceleration import build_loss_scale, resolve
from moco.training.guard import StepGuard, skips_updates
from moco.training.loss_scale import LossScale
from moco.training.nonfinite import NonFiniteReport
from moco.training.optimizer import build_optimizer
from moco.training.step import train_step
from moco.training.trainer import Trainer

HALF = {"TRAIN__AMP": True, "TRAIN__AMP_DTYPE": "float16"}
CPU = torch.device("cpu")


def test_the_factor_moves_as_torchs(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 3)
    ours, factor, growth = LossScale(CPU), torch.full((1,), 2.0**16), torch.zeros(1).int()
    seen = set()
    for flag in (0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1):
        torch._amp_update_scale_(factor, growth, torch.tensor([float(flag)]), 2.0, 0.5, 3)
        ours.update_(torch.tensor(bool(flag)))
        assert ours.factor == factor and ours.good_steps == growth
        seen.add(float(factor))
    assert len(seen) > 3
    for _ in range(40):
        ours.update_(torch.tensor(True))
    assert ours.factor == 1
    for _ in range(200):
        ours.update_(torch.tensor(False))
    assert ours.factor == 2**24


def test_only_a_factor_above_one_excuses_a_gradient():
    scale = LossScale(CPU)
    bad, good = torch.tensor(float("inf")), torch.tensor(2.0)
    assert scale.overflows(bad) and scale.overflows(bad - bad) and not scale.overflows(good)
    scale.factor.fill_(1.0)
    assert not scale.overflows(bad)


class Steps:
    """Steps of a tiny method in float16 on the pretend GPU; open it inside `pretend_cuda()`."""

    def __init__(self, variant="moco", factor=None, delayed=True):
        cfg = tiny.method_config(variant, **HALF)
        self.cfg = resolve(cfg, DEVICE).cfg
        torch.manual_seed(0)
        self.method = build_method(self.cfg, 32).to(DEVICE).train()
        self.optimizer = build_optimizer(self.cfg, self.method)
        self.scale = build_loss_scale(self.cfg, DEVICE)
        if factor is not None:
            self.scale.factor.fill_(factor)
        assert skips_updates(self.optimizer, PROCESS)
        report = NonFiniteReport(self.method, PROCESS)
        self.guard = StepGuard(PROCESS, report, delayed=delayed)
        views = torch.randint(
            256, (2, 8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        self.batch = [t.to(DEVICE) for t in (*views, torch.arange(8))]

    def __call__(self, step, measure=False):
        return train_step(
            self.method, self.method, self.optimizer, self.batch, step=step, lr=0.1, momentum=0.9,
            cfg=self.cfg, process=PROCESS, guard=self.guard, loss_scale=self.scale,
            measure=measure,
        )  # fmt: skip

    def learned(self):
        own = {n: p for n, p in self.method.named_parameters() if p.requires_grad}
        own |= {str(n): s["momentum_buffer"] for n, s in enumerate(self.optimizer.state.values())
                if "momentum_buffer" in s}  # fmt: skip
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    def overflow(self):
        """From now on the gradient of a layer is beyond float16."""
        weight = self.method.encoder_q.conv1.weight
        return weight.register_hook(lambda gradient: gradient * float("inf"))


def alike(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def far(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_the_factor_changes_roundings_only_and_no_step_waits():
    with pretend_cuda() as record:
        states = []
        for factor in (2.0**14, 2.0**16):
            steps = Steps(factor=factor)
            steps(0)
            record.clear()
            steps(1)
            assert not record.waits
            states.append(steps.learned())
        other = Steps(factor=2.0**16)
        other(0)
        # Negative control: a step less. What differs is a gradient too small for float16.
        assert far(*states) < 0.01 * far(states[0], other.learned())


@pytest.mark.parametrize("variant", ["moco", "moco_v3", "moco_v3: ViT", "memory_bank"])
@pytest.mark.parametrize("measure", [False, True])
def test_a_step_that_overflows_is_left_out(variant, measure):
    with pretend_cuda():
        steps = Steps(variant, factor=16.0)
        steps(0)
        before, factor = steps.learned(), steps.scale.factor.item()
        if "ViT" in variant:  # its patches have no gradient
            weight = steps.method.encoder_q.fc[0].weight
            handle = weight.register_hook(lambda gradient: gradient * float("inf"))
        else:
            handle = steps.overflow()
        result = steps(1, measure=measure)
        handle.remove()
        assert alike(before, steps.learned())
        assert steps.scale.factor.item() == factor / 2 and steps.scale.good_steps.item() == 0
        if measure:
            assert result.metrics["loss_scale"].item() == factor / 2
            assert torch.isfinite(result.metrics["gradient_norm"])
        if variant == "moco":  # its keys are as good as ever
            assert steps.method.queue_ptr.item() == 16
        steps(2)
        steps.guard.settle()
        assert not alike(before, steps.learned())


def test_an_overflow_that_no_factor_explains_stops_the_run():
    with pretend_cuda():
        steps = Steps(factor=2.0)
        steps(0)
        steps.overflow()
        steps(1)  # halves it to 1
        before = steps.learned()
        steps(2)
        with pytest.raises(NonFiniteError, match="step 2: the gradient is not finite"):
            steps.guard.settle()
        assert alike(before, steps.learned())


@pytest.mark.parametrize("delayed", [False, True])
def test_a_loss_that_is_not_finite_stops_whatever_the_factor(delayed):
    with pretend_cuda():
        steps = Steps(delayed=delayed)
        steps(0)
        before = steps.learned()
        steps.method.encoder_q.register_forward_hook(lambda m, a, out: out * float("nan"))
        with pytest.raises(NonFiniteError, match="step 1: the loss is not finite"):
            steps(1)
            steps.guard.settle()
        assert alike(before, steps.learned())


def run(source, folder, resume=False, **keys):
    return Trainer(
        tiny.config(**{**HALF, "LOG__PERIOD": 1000, **keys}), source, folder, PROCESS,
        resume=resume, say=lambda line: None,
    )  # fmt: skip


def test_a_run_that_left_out_steps_is_continued_exactly(tmp_path, monkeypatch):
    """The factor begins so high that the first steps overflow by themselves."""
    monkeypatch.setattr(module, "_FIRST", 2.0**19)
    monkeypatch.setattr(module, "_PATIENCE", 3)
    source = find_images(str(make_images(tmp_path / "images") / "train"))
    left_out = []
    update = LossScale.update_

    def counted(self, overflow):
        left_out.append(bool(overflow))
        update(self, overflow)

    monkeypatch.setattr(LossScale, "update_", counted)
    with pretend_cuda():
        assert run(source, tmp_path / "whole").train() == 0
        assert 0 < sum(left_out) < len(left_out)
        for step in (1, 4):
            folder = tmp_path / str(step)
            assert run(source, folder, LOG__PERIOD=1).train([tiny.StopAfter(step)]) == 143
            assert run(source, folder, resume=True, LOG__PERIOD=1000).train() == 0
            found = [
                ckpt.read_torch_file(tmp_path / name / "checkpoint_0002.pth.tar")
                for name in ("whole", str(step))
            ]
            assert tiny.state_digest(found[0]) == tiny.state_digest(found[1])
            assert found[0]["extra"]["loss_scale"] == found[1]["extra"]["loss_scale"]


@pytest.mark.parametrize(
    "state", [None, {}, {"factor": 0.5, "good_steps": 0}, {"factor": 2.0, "good_steps": -1},
              {"factor": float("nan"), "good_steps": 0}, {"factor": "1", "good_steps": 0}]
)  # fmt: skip
def test_a_damaged_factor_is_refused(state):
    with pytest.raises(CheckpointError, match="x.pth.tar: its 'loss_scale' is"):
        LossScale(CPU).load(state, "x.pth.tar")


def test_files_of_bfloat16_are_as_they_were(tmp_path):
    """No new key in the file, no new digest: old runs go on."""
    source = find_images(str(make_images(tmp_path / "images") / "train"))
    one = Trainer(tiny.config(), source, tmp_path / "run", tiny.alone(), say=lambda line: None)
    assert one.loss_scale is None
    assert one.train() == 0
    content = ckpt.read_torch_file(tmp_path / "run/checkpoint_0002.pth.tar")
    assert "loss_scale" not in content["extra"]
