"""What each mechanism must do in one and the same loop: resume exactly, save all of its state."""

import signal

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import VARIANTS, method_config

from detection.convert import convert_state
from moco.data.images import find_images
from moco.methods import BUILDERS, build_method
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer

# What a method keeps besides encoders, and by which name; changing it must change the run.
STATE = {
    "moco": "module.queue",
    "moco_symmetric": "module.queue",
    "memory_bank": "module.bank",
    "moco_v3": "module.predictor.0.weight",
    "moco_v3: ViT": "module.encoder_k.cls_token",
    "end_to_end": "module.encoder_k.conv1.weight",
    "end_to_end: SimCLR": "module.encoder_q.conv1.weight",
}


def trainer(variant, images, folder, resume=False, **changes):
    return Trainer(
        method_config(variant, TRAIN__EPOCHS=2, **changes), find_images(images), folder,
        tiny.alone(), resume=resume, say=lambda line: None,
    )  # fmt: skip


def digest(folder):
    return tiny.state_digest(ckpt.read_torch_file(folder / "checkpoint_0001.pth.tar"))


def test_every_method_has_a_variant_here():
    assert {variant.partition(":")[0] for variant in VARIANTS} == set(BUILDERS)
    assert VARIANTS.keys() == STATE.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumes_exactly_and_its_state_matters(variant, image_folder, tmp_path):
    assert trainer(variant, image_folder, tmp_path / "whole").train() == 0
    expected = digest(tmp_path / "whole")
    folder = tmp_path / "stopped"
    code = trainer(variant, image_folder, folder).train([tiny.StopAfter(2)])
    assert code == 128 + signal.SIGTERM
    resumed = trainer(variant, image_folder, folder, resume=True)
    assert resumed.first_step == 3
    resumed.train()
    assert digest(folder) == expected
    # Negative control: a checkpoint whose state was touched leads elsewhere.
    folder = tmp_path / "touched"
    trainer(variant, image_folder, folder).train([tiny.StopAfter(2)])
    path, _, _ = ckpt.latest_verified(folder)
    content = ckpt.read_torch_file(path)
    content["state_dict"][STATE[variant]].neg_()
    ckpt.save_checkpoint(path, content, step=content["extra"]["step"])
    trainer(variant, image_folder, folder, resume=True).train()
    assert digest(folder) != expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_transfer_encoder_gives_features_and_head_outputs(variant):
    method = build_method(method_config(variant), num_images=32)
    encoder = method.transfer_encoder().eval()
    images = torch.randn(2, 3, 16, 16)
    features = encoder.forward_features(images)
    assert features.dim() == 2 and len(features) == 2
    assert torch.equal(encoder.fc(features), encoder(images))
    prefix = next(n for n, m in method.named_modules() if m is encoder)
    assert prefix == "encoder_q"  # where the converter looks


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "ViT" not in v])
def test_its_checkpoint_converts_to_a_detection_backbone(variant):
    cfg = method_config(variant, MODEL__ARCH="resnet50", MODEL__STEM="imagenet")
    state = build_method(cfg, num_images=4).state_dict()
    converted = convert_state({"state_dict": {f"module.{n}": t for n, t in state.items()}})
    assert len(converted.model) == 265
    assert torch.equal(converted.model["stem.conv1.weight"], state["encoder_q.conv1.weight"])
    assert len(converted.names) + sum(map(len, converted.dropped.values())) == len(state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_loss_stay_float32_under_autocast(variant, monkeypatch):
    torch.manual_seed(0)
    method = build_method(method_config(variant), num_images=32)
    seen, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: (
        seen.append(logits.dtype), cross_entropy(logits, labels))[1])  # fmt: skip
    views = torch.randn(2, 8, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(*views, torch.arange(8), momentum=0.9, generator=torch.Generator())
        assert (views[0].flatten(1) @ views[1].flatten(1).T).dtype == torch.bfloat16  # the control
    output.loss.backward()
    method.after_step(output, torch.arange(8))
    assert {*seen, output.loss.dtype} == {torch.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_steps_lower_the_loss_of_the_same_contrast(variant):
    torch.manual_seed(0)
    method = build_method(method_config(variant), num_images=32)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01, 0.9)
    views = torch.randn(2, 8, 3, 16, 16)
    losses = []
    for _ in range(6):  # the keys' encoder stands still and nothing is stored
        generator = torch.Generator().manual_seed(1)
        output = method(*views, torch.arange(8), momentum=1.0, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert {"acc1", "acc5"} <= output.metrics.keys()
