from __future__ import annotations

import pytest
import torch
from torch import nn

from moco.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from moco.errors import NonFiniteError
from moco.evaluation.features import evaluation_mode, extract_features


def make_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5))
    model[1].eval()  # a frozen layer inside a model in train mode
    return model


def make_batches():
    torch.manual_seed(1)
    return [
        (torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8), torch.arange(size), None)
        for size in (3, 2)
    ]


def extract(encode):
    return extract_features(encode, make_batches(), "cpu", IMAGENET_MEAN, IMAGENET_STD)


def test_features_and_labels():
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluation_mode(model):
        features, labels = extract(model)
        raw = model(normalize(torch.cat([images for images, _, _ in make_batches()])))
    assert features.shape == (5, 5) and features.dtype == torch.float32
    torch.testing.assert_close(features, raw / raw.norm(dim=1, keepdim=True))
    assert labels.tolist() == [0, 1, 2, 0, 1] and labels.dtype == torch.int64
    assert not features.is_inference() and not features.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modes_come_back_also_after_an_error():
    model = make_model()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, *[True] * 4]


def test_train_mode_is_refused():
    model = make_model()
    for encode in (model, model.forward):
        with pytest.raises(AssertionError, match="eval mode"):
            extract(encode)


def test_non_finite_features_are_an_error():
    with pytest.raises(NonFiniteError, match="images 3 to 4"):
        extract(lambda x: x.mean(dim=(2, 3)) / (0 if len(x) == 2 else 1))
