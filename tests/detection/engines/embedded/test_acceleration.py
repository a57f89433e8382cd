"""A detector by kernels (MODEL.COMPILE) against the same one by torch."""

import copy
import hashlib

import pytest
import torch
from training_runs import KERNELS

from detection.config import check_processes
from detection.engines.embedded import roi_heads, rpn
from detection.engines.embedded.acceleration import accelerate_
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.precise_bn import update_bn_statistics
from detection.engines.embedded.solver import build_optimizer, set_lr
from detection.run_folder import _YOUNGER_KEYS, NOT_IN_DIGEST, run_digest
from moco.cfgnode import digest
from moco.errors import ConfigError
from moco.kernels import convolution, residual
from moco.kernels.compiler import compile_kernels
from moco.training.optimizer import FusedSGD

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        compile_kernels()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel was asked for."""
    counts = {}

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **kw):
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **kw)

        monkeypatch.setattr(module, name, counted)

    count(residual, "residual")
    count(convolution, "by_kernels")
    count(roi_heads, "roi_align")
    count(rpn, "nms")
    return counts


def two_models(tiny_cfg, **changes):
    """(by torch, by kernels), of the same draws."""
    models = []
    for keys in ({**KERNELS, "MODEL__COMPILE": "eager"}, KERNELS):
        cfg = tiny_cfg(**{**keys, **changes})
        torch.manual_seed(0)
        models.append(build_model(cfg))
        accelerate_(models[-1], cfg, CPU)
    return models


def losses_and_gradients(model, batch):
    torch.manual_seed(5)
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {n: b for n, b in model.named_buffers() if "running" in n}
    return {n: t.detach().double() for n, t in {**losses, **gradients, **statistics}.items()}


def in_float64(model):
    """A copy whose losses are exact but for the last step, which the heads take in float32."""
    exact = copy.deepcopy(model).double()
    pooler = exact.roi_heads.pooler
    exact.roi_heads.pooler.forward = lambda x, rois: type(pooler).forward(pooler, x, rois.double())
    return exact


def distance(ours, expected):
    """The largest relative distance of tensors by name; those of nearly nothing are left out."""
    assert ours.keys() == expected.keys()
    largest = max(e.norm() for e in expected.values())
    return max(
        ((ours[n] - e).norm() / e.norm()).item()
        for n, e in expected.items()
        if e.norm() > 1e-5 * largest
    )


@pytest.fixture
def fixed_proposals(monkeypatch):
    """A fresh RPN's scores are nearly equal: rounding alone would choose other proposals."""
    propose = rpn.RPN.propose
    generator = torch.Generator().manual_seed(0)
    corners, sizes = (torch.rand(40, 2, generator=generator) * most for most in (80, 60))
    boxes = torch.cat([corners, corners + sizes], dim=1)

    def proposed(self, anchors, logits, deltas, image_sizes):
        propose(self, anchors, logits, deltas, image_sizes)
        return [boxes] * len(image_sizes)

    monkeypatch.setattr(rpn.RPN, "propose", proposed)


BASIC = {"MODEL__RESNETS__DEPTH": 18, "MODEL__RESNETS__RES2_OUT_CHANNELS": 32}


@pytest.mark.parametrize(
    "changes, num_blocks",
    [
        # 13 blocks in the backbone, 3 in the head.
        ({"MODEL__RESNETS__NORM": "BN"}, 16),
        ({"MODEL__RESNETS__NORM": "naiveSyncBN"}, 16),
        (BASIC, 8),
    ],
    ids=["BN", "naiveSyncBN", "depth 18"],
)
def test_losses_gradients_and_statistics(
    tiny_cfg, batch, calls, fixed_proposals, changes, num_blocks
):
    plain, fast = two_models(tiny_cfg, **changes)
    assert all(torch.equal(a, b) for a, b in zip(
        plain.state_dict().values(), fast.state_dict().values(), strict=True))  # fmt: skip
    assert list(plain.state_dict()) == list(fast.state_dict())
    expected = losses_and_gradients(in_float64(plain), batch)
    rounding = distance(losses_and_gradients(plain, batch), expected)
    assert calls == {}
    ours = losses_and_gradients(fast, batch)
    # The RPN's convolution; an RoIAlign; two images.
    assert calls == {"residual": num_blocks, "by_kernels": 1, "roi_align": 1, "nms": 2}
    assert distance(ours, expected) < 2 * rounding + 1e-5
    # Negative control: the other image's pixels.
    swapped = [{**one, "image": one["image"].flip(2)} for one in batch]
    other = losses_and_gradients(two_models(tiny_cfg, **changes)[1], swapped)
    assert distance(other, expected) > 0.05


def test_bfloat16_is_as_near_as_torchs(tiny_cfg, batch):
    plain, fast = two_models(tiny_cfg)
    expected = losses_and_gradients(copy.deepcopy(plain), batch)
    names = [name for name in expected if name.startswith("loss")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torchs, ours = (losses_and_gradients(model, batch) for model in (plain, fast))
    for name in names:
        off = [(found[name] - expected[name]).abs() for found in (ours, torchs)]
        assert off[0] < 2 * off[1] + 0.02 * expected[name], name


def test_detections(tiny_cfg, batch, calls):
    plain, fast = two_models(tiny_cfg, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0)
    torch.manual_seed(1)
    for model in (plain, fast):
        model.load_state_dict(plain.state_dict())
        model.eval()
    expected, ours = plain.inference(batch), fast.inference(batch)
    assert calls == {"residual": 16, "by_kernels": 1, "roi_align": 1, "nms": 2}
    for mine, theirs in zip(ours, expected, strict=True):
        assert len(mine["scores"]) == len(theirs["scores"]) > 5
        torch.testing.assert_close(mine["scores"], theirs["scores"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine["boxes"], theirs["boxes"], rtol=1e-3, atol=1e-2)


def test_precise_batch_norm_counts_every_layer(tiny_cfg, batch):
    """Its hooks count pixels; a layer they are not called on would keep its old statistics."""
    plain, fast = two_models(tiny_cfg)
    for model in (plain, fast):
        torch.manual_seed(2)
        update_bn_statistics(model, [batch] * 2, 2)
    expected, ours = (
        {n: b.double() for n, b in model.named_buffers() if "running" in n}
        for model in (plain, fast)
    )
    assert distance(ours, expected) < 1e-3
    untouched = {n: b.double() for n, b in two_models(tiny_cfg)[1].named_buffers() if n in ours}
    assert distance(untouched, expected) > 0.1  # negative control


def test_frozen_stages_and_no_norm_compute_too(tiny_cfg, batch, calls, fixed_proposals):
    for changes in (
        {"MODEL__BACKBONE__FREEZE_AT": 2},
        {"MODEL__RESNETS__NORM": "FrozenBN"},
        {"MODEL__RESNETS__NORM": "", "MODEL__ROI_HEADS__NAME": "Res5ROIHeads"},
        {"MODEL__RESNETS__WIDTH_PER_GROUP": 8},  # no multiple of 32: torch's
    ):
        calls.clear()
        plain, fast = two_models(tiny_cfg, **changes)
        expected = losses_and_gradients(in_float64(plain), batch)
        rounding = distance(losses_and_gradients(plain, batch), expected)
        found = distance(losses_and_gradients(fast, batch), expected)
        # Besides rounding, a ReLU may stand at its kink.
        assert found < 2 * rounding + 5e-3, changes
        assert calls["roi_align"] == 1


def test_optimizer_steps_are_sgds(tiny_cfg, batch):
    plain, fast = two_models(tiny_cfg)
    cfg = tiny_cfg(**KERNELS, SOLVER__NESTEROV=True, SOLVER__BIAS_LR_FACTOR=2.0)
    plain_cfg = tiny_cfg(
        **{**KERNELS, "MODEL__COMPILE": "eager"}, SOLVER__NESTEROV=True, SOLVER__BIAS_LR_FACTOR=2.0
    )
    optimizers = build_optimizer(plain_cfg, plain), build_optimizer(cfg, fast)
    assert isinstance(optimizers[1], FusedSGD) and not isinstance(optimizers[0], FusedSGD)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        gradients = [torch.randn(p.shape, generator=generator) for p in plain.parameters()]
        for model, optimizer in zip((plain, fast), optimizers, strict=True):
            set_lr(optimizer, cfg, step)
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()  # channels first: the hook puts it in order
            optimizer.step()
    for ours, expected in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def test_where_it_is_refused(tiny_cfg):
    with pytest.raises(ConfigError, match="MODEL.COMPILE is 'kernels'; allowed: eager with MODEL"):
        tiny_cfg(MODEL__COMPILE="kernels")
    with pytest.raises(ConfigError, match="MODEL.COMPILE is 'torch'.*'eager', 'kernels'"):
        tiny_cfg(MODEL__COMPILE="torch")
    with pytest.raises(ConfigError, match="for CPUs, on cuda; set MODEL.COMPILE eager"):
        check_processes(tiny_cfg(**KERNELS), 1, "cuda")
    check_processes(tiny_cfg(**KERNELS), 2, "cpu")


def test_on_a_gpu_a_detector_stays_torchs(tiny_cfg):
    cfg = tiny_cfg(**KERNELS)
    model = build_model(cfg)
    assert accelerate_(model, cfg, torch.device("cuda")) is None
    assert not any(getattr(module, "compiled", False) for module in model.modules())
    assert "layers (for this CPU" in accelerate_(model, cfg, CPU)


def test_runs_of_before_the_key_go_on(tiny_cfg):
    """Left at eager it is no part of a run's identity."""
    last = {k: v for k, v in KERNELS.items() if k != "MODEL__COMPILE"}
    without = tiny_cfg(**last).clone()
    without.defrost()
    for key in _YOUNGER_KEYS:  # what came with it or after it
        section, name = key.split(".")
        dict.pop(without[section], name)
    without.DATASETS.update(VOC_ROOT="", COCO_FILES=[])  # places, which the data stand for
    before = hashlib.sha256(f"{digest(without, NOT_IN_DIGEST)} None".encode()).hexdigest()[:16]
    eager, kernels = (run_digest(tiny_cfg(**k), None, "embedded") for k in (last, KERNELS))
    assert before == eager != kernels
