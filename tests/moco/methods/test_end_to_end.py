"""End-to-end contrast: which encoders learn, and the loss of the features they give."""

import pytest
import torch
import torch.nn.functional as F

from moco.methods.end_to_end import EndToEnd

TINY = {"arch": "resnet18", "dim": 8, "mlp": True, "width": 0.125, "stem": "cifar"}


def tiny(loss="info_nce", share_encoder=False, **options) -> EndToEnd:
    torch.manual_seed(0)
    return EndToEnd(loss=loss, share_encoder=share_encoder, temperature=0.2, **{**TINY, **options})


def step(method, shuffle_seed=1):
    generator = torch.Generator().manual_seed(shuffle_seed)
    views = torch.randn(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    output = method(*views, torch.arange(6), momentum=0.9, generator=generator)
    return views, output


def features(encoder, view):
    return F.normalize(encoder(view), dim=1)


def test_two_encoders_start_equal_and_both_learn():
    method = tiny()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            method.encoder_q.state_dict().values(), method.encoder_k.state_dict().values(),
            strict=True,
        )
    )  # fmt: skip
    step(method)[1].loss.backward()
    for encoder in (method.encoder_q, method.encoder_k):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    gradient_q, gradient_k = (e.conv1.weight.grad for e in (method.encoder_q, method.encoder_k))
    assert not torch.allclose(gradient_q, gradient_k)


@pytest.mark.parametrize("loss", ["info_nce", "nt_xent"])
@pytest.mark.parametrize("share", [False, True])
def test_loss_is_that_of_the_features(loss, share):
    method = tiny(loss, share)
    views, output = step(method)
    q = features(method.encoder_q, views[0])
    k = features(method.encoder_q if share else method.encoder_k, views[1])
    if loss == "info_nce":
        expected = F.cross_entropy(q @ k.T / 0.2, torch.arange(6))
    else:
        z = torch.cat([q, k])
        similarity = (z @ z.T / 0.2).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
        expected = F.cross_entropy(similarity, torch.cat([torch.arange(6, 12), torch.arange(6)]))
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    other = method(views[0], views[1].flip(0), torch.arange(6), momentum=0.9,
                   generator=torch.Generator())  # fmt: skip
    assert not torch.isclose(other.loss, expected, rtol=1e-3)  # negative control


def test_a_shared_encoder_is_one_set_of_weights():
    names = set(tiny(share_encoder=True).state_dict())
    assert names == {n for n in tiny().state_dict() if n.startswith("encoder_q.")}


def test_the_gradient_of_the_keys_reaches_the_shared_encoder():
    method = tiny(share_encoder=True)
    views, output = step(method)
    whole = torch.autograd.grad(output.loss, method.encoder_q.conv1.weight)[0]
    q, k = features(method.encoder_q, views[0]), features(method.encoder_q, views[1]).detach()
    loss = F.cross_entropy(q @ k.T / 0.2, torch.arange(6))
    stopped = torch.autograd.grad(loss, method.encoder_q.conv1.weight)[0]
    assert not torch.allclose(whole, stopped, rtol=0.1)


def test_shuffling_changes_the_groups_of_the_keys():
    losses = [step(tiny(bn_splits=3), shuffle_seed)[1].loss for shuffle_seed in (1, 2)]
    assert not torch.isclose(*losses, rtol=1e-4)
    torch.testing.assert_close(step(tiny(), 1)[1].loss, step(tiny(), 2)[1].loss)  # one group
