"""Training with each augmentation backend resumes exactly."""

from __future__ import annotations

import signal

import pytest
import tiny

from moco.data.images import find_images
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer

BACKENDS = {
    "pil": {"AUGMENT__BACKEND": "pil"},
    "opencv": {"AUGMENT__BACKEND": "opencv"},
    "device": {"AUGMENT__BACKEND": "device"},
    "resident": {"AUGMENT__BACKEND": "device", "AUGMENT__RESIDENT": True},
}


def train(images, folder, backend, *, resume=False, stop=-1, **changes):
    cfg = tiny.config(DATA__RECIPE="v3", **BACKENDS[backend], **changes)
    trainer = Trainer(cfg, find_images(images), folder, tiny.alone(), resume=resume,
                      say=lambda line: None)  # fmt: skip
    return trainer.train([tiny.StopAfter(stop)])


def digest(folder):
    path, _, _ = ckpt.latest_verified(folder)
    return tiny.state_digest(ckpt.read_torch_file(path))


@pytest.mark.parametrize("backend", BACKENDS)
def test_stopped_and_resumed_equals_uninterrupted(image_folder, tmp_path, backend):
    assert train(image_folder, tmp_path / "whole", backend) == 0
    assert train(image_folder, tmp_path / "parts", backend, stop=5) == 128 + signal.SIGTERM
    assert train(image_folder, tmp_path / "parts", backend, resume=True, DATA__NUM_WORKERS=1) == 0
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    assert train(image_folder, tmp_path / "other", backend, SEED=1) == 0
    assert digest(tmp_path / "other") != digest(tmp_path / "whole")
