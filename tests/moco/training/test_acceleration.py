"""What the machine decides, what the user decides, and that it ends in the run's identity."""

import re

import pytest
import tiny
import torch
import torch.nn as nn

from moco.config import load_pretrain_config
from moco.data.images import find_images
from moco.errors import CheckpointError, ConfigError
from moco.kernels import compiler as kernels
from moco.methods import build_method
from moco.training import acceleration
from moco.training.acceleration import accelerate_, cpu_bf16_flag, resolve
from moco.training.optimizer import build_optimizer
from moco.training.step import train_step
from moco.training.trainer import Trainer

CPU = torch.device("cpu")
LEFT_OPEN = {"TRAIN__AMP": None, "TRAIN__CHANNELS_LAST": None, "TRAIN__COMPILE": None}


def decided(cfg, device=CPU):
    train = resolve(cfg, device).cfg.TRAIN
    return train.AMP, train.CHANNELS_LAST, train.COMPILE


@pytest.fixture
def with_bf16(monkeypatch):
    monkeypatch.setattr(acceleration, "cpu_bf16_flag", lambda text: "avx512_bf16")


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr(acceleration, "cpu_bf16_flag", lambda text: None)


def needs_compiler():
    try:
        kernels.compile_kernels()
    except ConfigError as error:
        pytest.skip(str(error))


def test_the_flag_of_the_processor():
    flags = "processor : 0\nflags\t\t: fpu avx512f avx512_bf16 avx512_vnni"
    assert cpu_bf16_flag(flags) == "avx512_bf16"
    assert cpu_bf16_flag(f"{flags} amx_bf16") == "amx_bf16"
    assert cpu_bf16_flag("flags : fpu avx512f avx512_bf16x") is None


def test_a_cpu_decides(with_bf16):
    needs_compiler()
    resolved = resolve(load_pretrain_config(None), CPU)
    assert decided(load_pretrain_config(None)) == (True, True, "kernels")
    assert "bfloat16 (the CPU has avx512_bf16)" in resolved.text
    assert re.search("kernels .for this CPU, compiled (in|before)", resolved.text)
    again = resolve(resolved.cfg, CPU)
    assert again.cfg == resolved.cfg and "bfloat16 (TRAIN.AMP)" in again.text


def test_a_cpu_without_bfloat16(without_bf16):
    resolved = resolve(load_pretrain_config(None), CPU)
    assert resolved.cfg.TRAIN.AMP is False
    assert "float32 (the CPU has none of amx_bf16, avx512_bf16)" in resolved.text


def test_a_cpu_without_a_compiler(monkeypatch, with_bf16):
    def fail():
        raise ConfigError("no C++ compiler was found")

    monkeypatch.setattr(kernels, "compile_kernels", fail)
    resolved = resolve(load_pretrain_config(None), CPU)
    assert resolved.cfg.TRAIN.COMPILE == "eager"
    assert "eager (no C++ compiler was found)" in resolved.text


@pytest.mark.parametrize(("capability", "amp"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_decides_by_its_capability(monkeypatch, capability, amp):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert decided(load_pretrain_config(None), torch.device("cuda", 0)) == (amp, True, "eager")


def test_the_user_decides():
    words = ["TRAIN.AMP", "False", "TRAIN.CHANNELS_LAST", "False", "TRAIN.COMPILE", "eager"]
    assert decided(load_pretrain_config(None, words)) == (False, False, "eager")
    # Left open: kernels need channels last, which was refused; a ViT has no batch norm.
    assert decided(load_pretrain_config(None, words[:4]))[2] == "eager"
    vit = load_pretrain_config(None, ["MODEL.ARCH", "vit_small", "METHOD", "moco_v3"])
    assert decided(vit)[1:] == (False, "eager")


def test_reference_overrides_everything():
    words = "TRAIN.REFERENCE True TRAIN.AMP True TRAIN.CHANNELS_LAST True TRAIN.COMPILE kernels "
    words += "AUGMENT.BACKEND device AUGMENT.RESIDENT True"
    cfg = resolve(load_pretrain_config(None, words.split()), CPU).cfg
    assert (cfg.TRAIN.AMP, cfg.TRAIN.CHANNELS_LAST, cfg.TRAIN.COMPILE) == (False, False, "eager")
    assert (cfg.AUGMENT.BACKEND, cfg.AUGMENT.DECODE, cfg.AUGMENT.RESIDENT) == ("pil", "cpu", False)
    method = build_method(tiny.config(TRAIN__REFERENCE=True))
    assert not method.fused and build_method(tiny.config()).fused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("TRAIN.COMPILE kernels TRAIN.CHANNELS_LAST False", "CHANNELS_LAST False on cpu; allowed"),
        ("TRAIN.COMPILE kernels MODEL.NORM SyncBN", "MODEL.NORM SyncBN"),
        ("TRAIN.COMPILE torch MODEL.NORM SyncBN", "cannot be compiled; set TRAIN.COMPILE eager"),
    ],
)
def test_what_cannot_be_had_together(words, message):
    with pytest.raises(ConfigError, match=message):
        resolve(load_pretrain_config(None, words.split()), CPU)


@pytest.mark.parametrize("key", ["TRAIN.AMP", "TRAIN.CHANNELS_LAST", "TRAIN.COMPILE"])
def test_values_are_checked(key):
    with pytest.raises(ConfigError, match=f"{key} is 'perhaps'; allowed: None"):
        load_pretrain_config(None, [key, "perhaps"])


def test_a_run_does_not_change_its_arithmetic_on_another_machine(
    tmp_path, image_folder, monkeypatch
):
    cfg = tiny.config(TRAIN__AMP=None, TRAIN__EPOCHS=1, KNN__PERIOD=0)
    source = find_images(image_folder)
    monkeypatch.setattr(acceleration, "cpu_bf16_flag", lambda text: "avx512_bf16")
    Trainer(cfg, source, tmp_path, tiny.alone()).train()
    Trainer(cfg, source, tmp_path, tiny.alone(), resume=True)
    monkeypatch.setattr(acceleration, "cpu_bf16_flag", lambda text: None)
    with pytest.raises(CheckpointError, match="TRAIN.AMP True -> False"):
        Trainer(cfg, source, tmp_path, tiny.alone(), resume=True)


def losses_of(cfg, num_steps=4):
    cfg = resolve(cfg, CPU).cfg
    torch.manual_seed(0)
    method = build_method(cfg).train()
    accelerate_(method, cfg)
    optimizer = build_optimizer(cfg, method)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(num_steps):
        shape = (2, 8, 3, 16, 16)
        views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        result = train_step(
            method, method, optimizer, (*views, torch.arange(8)), step=step, lr=0.03,
            momentum=0.9, cfg=cfg, process=tiny.alone(), measure=step % 2 == 0,
        )  # fmt: skip
        losses.append(result.loss.item())
    return losses


@pytest.mark.parametrize("method", ["moco", "moco_symmetric"])
def test_fast_float32_steps_are_the_references_up_to_rounding(method):
    needs_compiler()
    changes = {"METHOD": method, "MODEL__BN_SPLITS": 2}
    reference = losses_of(tiny.config(**changes, TRAIN__REFERENCE=True))
    fast = tiny.config(**changes, **{**LEFT_OPEN, "TRAIN__AMP": False})
    assert decided(fast) == (False, True, "kernels")
    assert losses_of(fast) == pytest.approx(reference, rel=2e-4)
    # Negative controls: other groups of batch norm, and bfloat16, which is rounding by another
    # thousand times.
    other = losses_of(tiny.config(METHOD=method, MODEL__BN_SPLITS=4, TRAIN__REFERENCE=True))
    assert other != pytest.approx(reference, rel=2e-4)
    half = losses_of(tiny.config(**changes, **{**LEFT_OPEN, "TRAIN__AMP": True}))
    assert half != pytest.approx(reference, rel=2e-4) and half == pytest.approx(reference, rel=0.05)


def test_kernels_in_float32_change_rounding_only():
    needs_compiler()
    last = {"TRAIN__CHANNELS_LAST": True}
    eager = losses_of(tiny.config(**last))
    assert losses_of(tiny.config(**last, TRAIN__COMPILE="kernels")) == pytest.approx(
        eager, rel=1e-4
    )


class _Encoders(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder_q = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_torch_compile_changes_rounding_only():
    needs_compiler()  # inductor wants one on a CPU
    plain, compiled = _Encoders(), _Encoders()
    accelerate_(compiled, tiny.config(TRAIN__COMPILE="torch"))
    accelerate_(plain, tiny.config())
    assert list(plain.state_dict()) == list(compiled.state_dict())
    x = torch.randn(2, 3, 6, 6)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    a, b = plain.encoder_q(x), compiled.encoder_q(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
