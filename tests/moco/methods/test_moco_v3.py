"""MoCo v3's step: heads, symmetric loss with its scale, key encoder, and the trainer's schedule."""

import math

import pytest
import tiny
import torch
import torch.nn as nn
import torch.nn.functional as F

from moco.data.images import find_images
from moco.errors import ConfigError
from moco.methods import build_method
from moco.methods.moco_v3 import MoCoV3
from moco.models.norm import SyncBatchNorm
from moco.training.trainer import Trainer


def built(temperature=0.2, norm="BN", **options) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(**{
        "dim": 8, "hidden_dim": 20, "projector_layers": 3, "predictor_layers": 2,
        "temperature": temperature, "arch": "resnet18", "width": 0.125, "stem": "cifar",
        "norm": norm, **options,
    })  # fmt: skip


def run(method, first, second, momentum=0.9):
    return method(first, second, torch.arange(len(first)), momentum=momentum,
                  generator=torch.Generator())  # fmt: skip


def views(num=5):
    return torch.randn(2, num, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def brute_force(queries, keys, temperature):
    """Algorithm 1's ctr(q, k), term by term."""
    total = 0.0
    for i, q in enumerate(queries.tolist()):
        powers = [math.exp(sum(a * b for a, b in zip(q, k, strict=True)) / temperature)
                  for k in keys.tolist()]  # fmt: skip
        total -= math.log(powers[i] / sum(powers))
    return 2 * temperature * total / len(queries)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_both_directions_by_brute_force(temperature):
    method = built(temperature)
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(0.03)  # so that the key encoder differs
    first, second = views()
    output = run(method, first, second, momentum=0.5)
    with torch.no_grad():
        both = (first, second)
        queries = [F.normalize(method.predictor(method.encoder_q(v)), dim=1) for v in both]
        keys = [F.normalize(method.encoder_k(v), dim=1) for v in both]
    expected = brute_force(queries[0], keys[1], temperature)
    expected += brute_force(queries[1], keys[0], temperature)
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    crossed = brute_force(queries[0], keys[0], temperature)
    crossed += brute_force(queries[1], keys[1], temperature)
    assert output.loss.item() != pytest.approx(crossed, rel=1e-3)  # negative control


def test_equal_outputs_give_4_tau_log_n():
    method = built(0.2)
    nn.init.zeros_(method.predictor[-2].weight)  # every query is the zero vector
    assert run(method, *views()).loss.item() == pytest.approx(4 * 0.2 * math.log(5), rel=1e-5)


def test_heads_have_norm_after_every_layer_and_relu_between():
    for norm, kind in (("BN", nn.BatchNorm1d), ("SyncBN", SyncBatchNorm)):
        method = built(norm=norm)
        for head, dims in (
            (method.encoder_q.fc, [64, 20, 20, 8]),
            (method.encoder_k.fc, [64, 20, 20, 8]),
            (method.predictor, [8, 20, 8]),
        ):
            layers = list(head)
            linear, norms = layers[0::3], layers[1::3]
            assert [m.in_features for m in linear] + [linear[-1].out_features] == dims
            assert all(m.bias is None for m in linear)
            assert all(type(m) is kind for m in norms)
            assert all(type(m) is nn.ReLU for m in layers[2::3])
            assert [m.affine for m in norms] == [True] * (len(norms) - 1) + [False]
        assert isinstance(method.encoder_q.bn1, SyncBatchNorm) == (norm == "SyncBN")


def test_key_encoder_follows_without_predictor_and_without_gradient():
    method = built()
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(0.05)
    old = [p.clone() for p in method.encoder_k.parameters()]
    run(method, *views()).loss.backward()
    for k, before, q in zip(method.encoder_k.parameters(), old, method.encoder_q.parameters(),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(k, 0.9 * before + 0.1 * q)
    trained = [*method.encoder_q.parameters(), *method.predictor.parameters()]
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in method.encoder_k.parameters())
    assert not any(name.startswith("encoder_k.predictor") for name in method.state_dict())


class Watched(MoCoV3):
    """Notes the momentum of each step."""

    def prepare(self, *args, momentum, **kwargs):
        self.__dict__.setdefault("seen", []).append(momentum)
        return super().prepare(*args, momentum=momentum, **kwargs)


def test_the_loop_raises_momentum_and_rate_by_step(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("moco.methods.BUILDERS", {"moco_v3": Watched.from_config})
    cfg = tiny.method_config("moco_v3", TRAIN__EPOCHS=2, TRAIN__WARMUP_EPOCHS=1)
    run = Trainer(cfg, find_images(image_folder), tmp_path, tiny.alone(), say=lambda line: None)
    rates = []

    class Rates:
        def on_step(self, record):
            rates.append(record.lr)

        def on_epoch(self, record):
            pass

    run.train([Rates()])
    expected = [1 - 0.01 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert run.method.seen == pytest.approx(expected)
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4] == 0.5 and rates[6] == pytest.approx(0.25)


def test_groups_of_batch_norm_are_refused():
    with pytest.raises(ConfigError, match="BN_SPLITS 2: METHOD moco_v3 has no shuffle BN"):
        build_method(tiny.method_config("moco_v3", MODEL__BN_SPLITS=2))
