"""The symmetric loss: both directions against the same queue, both views' keys stored."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from moco.errors import ConfigError
from moco.methods import build_method
from moco.methods.moco import MoCo
from moco.methods.moco_symmetric import SymmetricMoCo


def built(kind, seed=0):
    torch.manual_seed(seed)
    return kind(arch="resnet18", dim=8, mlp=True, queue_size=12, temperature=0.2, width=0.125,
                stem="cifar")  # fmt: skip


def views():
    return torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def run(method, first, second, momentum=0.9):
    generator = torch.Generator().manual_seed(1)
    return method(first, second, torch.arange(4), momentum=momentum, generator=generator)


def test_it_is_the_sum_of_mocos_losses_of_both_directions():
    """Batch norm sees the whole batch, so that MoCo's two runs compute the same features."""
    first, second = views()
    output = run(built(SymmetricMoCo), first, second)
    there, back = run(built(MoCo), first, second), run(built(MoCo), second, first)
    torch.testing.assert_close(output.loss, there.loss + back.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.keys_VBD, torch.cat([back.keys_VBD, there.keys_VBD]),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    assert not torch.isclose(output.loss, 2 * there.loss, rtol=1e-4)  # negative control


def test_swapping_the_views_keeps_the_loss():
    first, second = views()
    losses = [run(built(SymmetricMoCo), *pair).loss for pair in ((first, second), (second, first))]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    one_way = [run(built(MoCo), *pair).loss for pair in ((first, second), (second, first))]
    assert not torch.isclose(*one_way, rtol=1e-4)  # negative control


def test_loss_from_the_features():
    method = built(SymmetricMoCo)
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(0.03)  # so that the key encoder differs
    first, second = views()
    queue = method.queue.clone()
    output = run(method, first, second, momentum=0.5)
    total = 0
    for query_view, key_view in ((first, second), (second, first)):
        q = F.normalize(method.encoder_q(query_view), dim=1)
        k = F.normalize(method.encoder_k(key_view), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
        total = total + F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(output.loss, total, rtol=1e-4, atol=1e-5)


def test_a_step_stores_both_views_and_moves_the_key_encoder_once():
    method = built(SymmetricMoCo)
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(0.05)
    old = [p.clone() for p in method.encoder_k.parameters()]
    output = run(method, *views())
    method.after_step(output, torch.arange(4))
    assert method.queue_ptr.tolist() == [8]
    assert torch.equal(method.queue[:, :8], output.keys_VBD.flatten(0, 1).T)
    for k, before, q in zip(method.encoder_k.parameters(), old, method.encoder_q.parameters(),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(k, 0.9 * before + 0.1 * q)


def test_the_queue_must_hold_both_views():
    with pytest.raises(ConfigError, match="QUEUE_SIZE 15 does not hold the 16 keys"):
        build_method(tiny.method_config("moco_symmetric", MOCO__QUEUE_SIZE=15))
    build_method(tiny.method_config("moco", MOCO__QUEUE_SIZE=15))
