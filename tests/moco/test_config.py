"""Every pretraining config loads; wrong values are named."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MOCO.QUEUE_SIZE", "128"], "QUEUE_SIZE 128 does not hold .*BATCH_SIZE 256"),
        (["MOCO.MOMENTUM", "1.0"], "MOCO.MOMENTUM is 1.0; allowed: 0 <= momentum < 1"),
        (["TRAIN.SCHEDULE", "linear"], "TRAIN.SCHEDULE is 'linear'; allowed: cosine, step"),
        (["TRAIN.EPOCHS", "0"], "TRAIN.EPOCHS is 0; allowed: 1 or more"),
        (["MOCO.TEMPERATURE", "0.0"], "MOCO.TEMPERATURE is 0.0; allowed: a number above 0"),
    ],
)
def test_values_out_of_range_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_pretrain_config(None, overrides)


def test_architecture_is_checked_when_built():
    with pytest.raises(ConfigError, match="MODEL.ARCH is 'vgg'; allowed: resnet18"):
        build_method(load_pretrain_config(None, ["MODEL.ARCH", "vgg"]))
