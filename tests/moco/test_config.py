"""Every pretraining config loads; wrong values are named."""

from pathlib import Path

import pytest

from moco.cfgnode import flatten, to_dict
from moco.config import load_pretrain_config
from moco.errors import ConfigError
from moco.methods import build_method

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("pretrain/*.yaml"), CONFIGS / "demo/pretrain.yaml"])


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_loads_and_is_headed_by_its_command(path):
    load_pretrain_config(str(path))
    head = path.read_text().split("METHOD")[0]
    assert "tools/pretrain.py" in head and "Hardware" in head


def test_v1_and_v2_hold_the_papers_values():
    v2 = load_pretrain_config(str(CONFIGS / "pretrain/moco_v2_200ep.yaml"))
    v1 = load_pretrain_config(str(CONFIGS / "pretrain/moco_v1_200ep.yaml"))
    assert (v2.MOCO.TEMPERATURE, v2.MODEL.HEAD, v2.TRAIN.SCHEDULE, v2.DATA.RECIPE) == (
        0.2, "mlp", "cosine", "v2")  # fmt: skip
    assert (v1.MOCO.TEMPERATURE, v1.MODEL.HEAD, v1.TRAIN.SCHEDULE, v1.DATA.RECIPE) == (
        0.07, "linear", "step", "v1")  # fmt: skip
    assert v1.TRAIN.MILESTONES == (120, 160)
    assert v1.DATA.BLUR_PROBABILITY == 0.0
    for cfg in (v1, v2):
        assert (cfg.MOCO.QUEUE_SIZE, cfg.MOCO.MOMENTUM) == (65536, 0.999)
        assert (cfg.TRAIN.LR, cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.WEIGHT_DECAY) == (0.03, 256, 1e-4)
    long = load_pretrain_config(str(CONFIGS / "pretrain/moco_v2_800ep.yaml"))
    assert long.TRAIN.EPOCHS == 800


def test_mechanisms_in_v1s_protocol_differ_from_it_in_the_mechanism_only():
    v1 = flatten(to_dict(load_pretrain_config(str(CONFIGS / "pretrain/moco_v1_200ep.yaml"))))
    changed = {"end_to_end": {"METHOD", "TRAIN.BATCH_SIZE", "TRAIN.LR"}, "memory_bank": {"METHOD"}}
    for name, keys in changed.items():
        other = load_pretrain_config(str(CONFIGS / f"pretrain/{name}_200ep.yaml"))
        other = flatten(to_dict(other))
        assert {key for key in v1 if v1[key] != other[key]} == keys
        assert other["TRAIN.LR"] == 0.03 * other["TRAIN.BATCH_SIZE"] / 256


def test_v3_holds_the_papers_values():
    r50, small, base = (
        load_pretrain_config(str(CONFIGS / f"pretrain/moco_v3_{name}.yaml"))
        for name in ("r50_800ep", "vit_small_300ep", "vit_base_300ep")
    )
    for cfg in (r50, small, base):
        assert (cfg.METHOD, cfg.MODEL.DIM, cfg.MODEL.NORM) == ("moco_v3", 256, "SyncBN")
        assert (cfg.DATA.RECIPE, cfg.TRAIN.BATCH_SIZE) == ("v3", 4096)
        assert (cfg.MOCO_V3.HIDDEN_DIM, cfg.MOCO_V3.PROJECTOR_LAYERS) == (4096, 3)
        assert cfg.MOCO.MOMENTUM_SCHEDULE == "cosine"
    assert (r50.MOCO.TEMPERATURE, r50.MOCO.MOMENTUM) == (1.0, 0.996)
    assert (r50.TRAIN.OPTIMIZER, r50.TRAIN.WEIGHT_DECAY) == ("lars", 1.5e-6)
    assert r50.TRAIN.LR == pytest.approx(0.3 * 4096 / 256)
    for cfg in (small, base):
        assert (cfg.MOCO.TEMPERATURE, cfg.MOCO.MOMENTUM) == (0.2, 0.99)
        assert (cfg.TRAIN.OPTIMIZER, cfg.TRAIN.WEIGHT_DECAY) == ("adamw", 0.1)
        assert cfg.TRAIN.LR == pytest.approx(1.5e-4 * 4096 / 256)
        assert cfg.TRAIN.WARMUP_EPOCHS == 40 and cfg.MODEL.FREEZE_PATCHES
    assert (small.MODEL.ARCH, base.MODEL.ARCH) == ("vit_small", "vit_base")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MOCO.MOMENTUM", "1.0"], "MOCO.MOMENTUM is 1.0; allowed: 0 <= momentum < 1"),
        (["TRAIN.SCHEDULE", "linear"], "is 'linear'; allowed: cosine, step, cosine_by_step"),
        (["TRAIN.EPOCHS", "0"], "TRAIN.EPOCHS is 0; allowed: 1 or more"),
        (["MOCO.TEMPERATURE", "0.0"], "MOCO.TEMPERATURE is 0.0; allowed: a number above 0"),
        (["TRAIN.WARMUP_EPOCHS", "2"], "WARMUP_EPOCHS is 2; allowed: .* 0 unless TRAIN.SCHEDULE"),
    ],
)
def test_values_out_of_range_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_pretrain_config(None, overrides)


def test_architecture_is_checked_when_built():
    with pytest.raises(ConfigError, match="MODEL.ARCH is 'vgg'; allowed: resnet18"):
        build_method(load_pretrain_config(None, ["MODEL.ARCH", "vgg"]))
