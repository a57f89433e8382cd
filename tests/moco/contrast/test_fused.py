"""The one-pass loss against the reference's form: values, gradients, extremes, memory."""

import pytest
import torch
import torch.nn.functional as F

from moco.contrast.fused import fused_info_nce
from moco.contrast.info_nce import info_nce_logits, info_nce_loss


def unit(rows, dim, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return F.normalize(drawn, dim=1).to(dtype)


def both(loss_of, q, k, queue, temperature):
    """Loss and gradient to the queries."""
    q = q.clone().requires_grad_()
    loss = loss_of(q, k, queue, temperature)
    loss.backward()
    return loss.detach(), q.grad


def reference_form(q, k, queue, temperature):
    return info_nce_loss(info_nce_logits(q, k, queue, temperature))


def vectors(dtype, num=11, negatives=301):
    q, queue = unit(num, 8, 0, dtype), unit(negatives, 8, 2, dtype).T.contiguous()
    return q, F.normalize(unit(num, 8, 1, dtype) + q, dim=1), queue


@pytest.mark.parametrize("temperature", [0.2, 0.07, 1.0])
@pytest.mark.parametrize("block", [1, 64, 301, 1000, None])
def test_equals_the_references_form(temperature, block):
    def fused(*args):
        return fused_info_nce(*args, block=block)

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        args = (*vectors(dtype), temperature)
        for ours, expected in zip(both(fused, *args), both(reference_form, *args), strict=True):
            scale = expected.abs().max()
            assert (ours - expected).abs().max() <= 4 * tolerance * scale
    # Negative controls: another temperature, another positive, one negative less.
    q, k, queue = vectors(torch.float64)
    _, expected = both(reference_form, q, k, queue, temperature)
    for changed in ((q, k, queue, temperature * 1.001), (q, k.flip(0), queue, temperature),
                    (q, k, queue[:, 1:], temperature)):  # fmt: skip
        _, gradient = both(fused, *changed)
        assert (gradient - expected).abs().max() > 1e-6 * expected.abs().max()


def test_gradient_by_finite_differences():
    q, k, queue = vectors(torch.float64, num=3, negatives=40)
    function = torch.autograd.gradcheck
    assert function(lambda q: fused_info_nce(q, k, queue, 0.2, block=7), q.requires_grad_())


@pytest.mark.parametrize("temperature", [1e-3, 1e-4])
def test_does_not_overflow(temperature):
    """Logits of +-1e4: their exponentials have no place in any floating-point type."""
    exact = both(reference_form, *vectors(torch.float64), temperature)
    ours = both(fused_info_nce, *vectors(torch.float32), temperature)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(ours[1]).all()


def test_nan_is_not_hidden():
    q, k, queue = vectors(torch.float32)
    queue[3, 200] = torch.nan
    loss, gradient = both(fused_info_nce, q, k, queue, 0.2)
    assert loss.isnan() and gradient.isnan().any()


def test_scales_with_the_gradient_from_above():
    args = (*vectors(torch.float64), 0.2)
    _, once = both(fused_info_nce, *args)
    _, thrice = both(lambda *args: 3 * fused_info_nce(*args), *args)
    torch.testing.assert_close(thrice, 3 * once)


def test_full_precision_under_autocast():
    args = (*vectors(torch.float32), 0.2)
    plain = both(fused_info_nce, *args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = both(fused_info_nce, *args)
    assert torch.equal(plain[0], under[0]) and torch.equal(plain[1], under[1])


def test_keeps_the_queries_gradient_only():
    """Bytes autograd keeps for backward: B x D here, more than B x (1 + K) in the other form."""

    def kept(loss_of):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        )
        q, k, queue = vectors(torch.float32)
        with hooks:
            loss_of(q.requires_grad_(), k, queue, 0.2)
        return sum(sizes)

    assert kept(fused_info_nce) == 11 * 8
    assert kept(reference_form) > 11 * 302


@pytest.mark.parametrize("which", [1, 2])
def test_refuses_what_it_has_no_gradient_for(which):
    args = [*vectors(torch.float32)]
    args[which].requires_grad_()
    with pytest.raises(ValueError, match="no gradient to keys or negatives"):
        fused_info_nce(*args, 0.2)
