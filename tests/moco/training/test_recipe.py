from __future__ import annotations

import subprocess
import sys

import pytest
import tiny
import torch

from moco.config import load_pretrain_config
from moco.methods import build_method
from moco.models.backbone import build_backbone
from moco.training.recipe import estimate_memory, linear_lr, resolve_recipe, saved_bytes

PUBLISHED = "configs/pretrain/moco_v2_200ep.yaml"


def published(*overrides):
    return load_pretrain_config(PUBLISHED, overrides)


def warnings_of(cfg, **kw):
    return resolve_recipe(cfg, **{"num_images": 1_281_167, "world_size": 8, **kw}).warnings


def test_the_published_setting_has_no_warning_and_its_figures():
    recipe = resolve_recipe(published(), num_images=1_281_167, world_size=8)
    assert recipe.warnings == ()
    text = recipe.text()
    for figure in ("8 process(es) x 32", "5004 steps", "gives 0.03", "groups of 32", "256.0 steps"):
        assert figure in text
    # 5.0 GB were measured on V100s (paper, table 3), CUDA's own memory included.
    assert 2.5 < recipe.memory.total / 2**30 < 5.0


@pytest.mark.parametrize(
    "overrides, other, words",
    [
        (["TRAIN.LR", "0.06"], {}, "2.00 times what the linear rule gives"),
        (["TRAIN.BATCH_SIZE", "512"], {}, "0.50 times what the linear rule gives"),
        (["MODEL.NORM", "SyncBN"], {}, "sees the whole batch at once"),
        ([], {"world_size": 1}, "shuffle BN has no effect"),
        (["MODEL.BN_SPLITS", "8"], {}, "groups of 4 images"),
        (["MOCO.QUEUE_SIZE", "65000"], {}, "no multiple of the batch"),
        ([], {"num_images": 60_000}, "its own negative"),
        (["MOCO.QUEUE_SIZE", "256"], {"num_images": 300}, "44 of 300 images are left out"),
    ],
)
def test_departures_are_named(overrides, other, words):
    found = warnings_of(published(*overrides), **other)
    assert [w for w in found if words in w], found


def test_linear_rule():
    assert linear_lr(published("TRAIN.BATCH_SIZE", "128", "TRAIN.LR", "0.015")) == 0.015


def test_activations_on_the_meta_device_are_those_of_a_real_pass():
    network = build_backbone("resnet18", num_classes=8, width=0.25)
    images = torch.randn(4, 3, 48, 48)
    real = saved_bytes(network, images)
    # A convolution, the first, keeps its input and ReLU its output at least.
    assert real > 4 * 4 * (3 * 48 * 48 + 16 * 24 * 24)
    assert saved_bytes(network.to("meta"), images.to("meta")) == real
    assert saved_bytes(network, torch.empty(8, 3, 48, 48, device="meta")) > 1.9 * real


def test_weights_and_optimizer_are_those_of_the_method():
    cfg = tiny.config()
    method = build_method(cfg).to("meta")
    memory = estimate_memory(cfg, method, 8)
    assert memory.weights == sum(
        t.numel() * t.element_size() for t in (*method.parameters(), *method.buffers())
    )
    assert memory.gradients == 4 * sum(p.numel() for p in method.encoder_q.parameters())
    half = estimate_memory(tiny.config(TRAIN__AMP=True), method, 8)
    assert half.activations == memory.activations // 2


@pytest.mark.parametrize(
    "name, negatives",
    [
        ("moco_v1_200ep", 65536),
        ("moco_v2_symmetric_200ep", 65536),
        ("end_to_end_200ep", 1023),
        ("memory_bank_200ep", 65536),
        ("moco_v3_r50_800ep", 4095),
        ("moco_v3_vit_small_300ep", 4095),
    ],
)
def test_every_published_configuration_follows_its_rule(name, negatives):
    cfg = load_pretrain_config(f"configs/pretrain/{name}.yaml", ["DATA.SIZE", "64"])
    recipe = resolve_recipe(cfg, num_images=1_281_167, world_size=8)
    assert recipe.warnings == ()
    assert f"negatives: {negatives} a query" in recipe.text()


def test_dry_run_prints_the_recipe_and_leaves_nothing(image_folder, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "tools/pretrain.py", "--dry-run", "--data"]
    command += [str(image_folder), "--output-dir", str(run), "--device", "cpu", "--config-file"]
    done = subprocess.run(
        [*command, PUBLISHED, *tiny.overrides()], capture_output=True, text=True, check=True
    )
    assert "batch: 8 images = 1 process(es) x 8; 4 steps an epoch" in done.stdout
    assert "warning: TRAIN.LR 0.03 is 32.00 times" in done.stdout
    assert not run.exists()
