"""Compiled InfoNCE against float64; extremes; what is not a number is not hidden."""

import pytest
import torch
import torch.nn.functional as F

from moco.contrast.fused import fused_info_nce
from moco.contrast.info_nce import info_nce_logits, info_nce_loss
from moco.kernels.compiler import has_kernel
from moco.kernels.info_nce import info_nce


@pytest.fixture(autouse=True)
def needs_kernel():
    if not has_kernel("info_nce", "info_nce_float32"):
        pytest.skip("InfoNCE has no kernel on this processor")


def vectors(queries, dim, negatives, *, near=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries * 1000 + dim)
    q, k, queue = (
        F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1)
        for n in (queries, queries, negatives)
    )
    k = F.normalize(k + near * q, dim=1)
    return q.to(dtype), k.to(dtype), queue.T.contiguous().to(dtype)


def exact(q, k, queue, temperature):
    q = q.double().requires_grad_()
    loss = info_nce_loss(info_nce_logits(q, k.double(), queue.double(), temperature))
    loss.backward()
    return loss.detach(), q.grad


def compiled_loss(q, k, queue, temperature):
    q = q.clone().requires_grad_()
    loss = fused_info_nce(q, k, queue, temperature, compiled=True)
    loss.backward()
    return loss.detach(), q.grad


@pytest.mark.parametrize("queries", [1, 3, 16, 17, 64, 100])
@pytest.mark.parametrize(("dim", "negatives"), [(8, 1), (100, 301), (128, 4096), (13, 257)])
def test_equals_float64(queries, dim, negatives):
    for near in (0.0, 1.0):
        args = vectors(queries, dim, negatives, near=near)
        for temperature in (0.07, 0.2):
            loss, gradient = exact(*args, temperature)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                try:
                    found = compiled_loss(*args, temperature)
                    again = compiled_loss(*args, temperature)
                finally:
                    torch.set_num_threads(1)
                assert abs(found[0] - loss) < 1e-6 * loss
                assert (found[1] - gradient).abs().max() < 4e-6 * gradient.abs().max()
                assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    # Negative controls: another temperature, the positives of others, one negative less.
    if queries > 1 and negatives > 1:
        q, k, queue = args
        for changed in (
            (q, k, queue, 0.2001),
            (q, k.flip(0), queue, 0.2),
            (q, k, queue[:, 1:], 0.2),
        ):
            other = compiled_loss(*changed)[1]
            assert (other - gradient).abs().max() > 1e-5 * gradient.abs().max()


@pytest.mark.parametrize("temperature", [1e-3, 1e-4])
def test_does_not_overflow(temperature):
    args = vectors(11, 8, 301)
    loss, gradient = exact(*args, temperature)
    found = compiled_loss(*args, temperature)
    torch.testing.assert_close(found[0].double(), loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found[1].double(), gradient, rtol=0, atol=1e-3 * gradient.abs().max().item()
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_a_number_is_not_hidden(which, value):
    for place in (0, -1):
        args = vectors(20, 16, 300)
        args[which].view(-1)[place] = value
        assert info_nce(*args, 0.2)[0].isnan()


def test_scales_with_the_gradient_from_above_and_needs_contiguity_of_nobody():
    q, k, queue = vectors(5, 16, 40)
    loss, gradient = compiled_loss(q, k, queue, 0.2)
    strided = queue.T.contiguous().T
    assert not strided.is_contiguous()
    assert torch.equal(compiled_loss(q, k, strided, 0.2)[1], gradient)
    q.requires_grad_()
    (3 * fused_info_nce(q, k, queue, 0.2, compiled=True)).backward()
    torch.testing.assert_close(q.grad, 3 * gradient)


def test_another_default_type_changes_nothing():
    args = (*vectors(5, 16, 40), 0.2)
    expected = compiled_loss(*args)
    torch.set_default_dtype(torch.float64)
    try:
        found = compiled_loss(*args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_refuses_other_types_and_gradients_it_has_not():
    q, k, queue = vectors(5, 16, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes float32 on a CPU, got torch.float64"):
        info_nce(q, k, queue, 0.2)
    with pytest.raises(ValueError, match="no gradient to keys or negatives"):
        fused_info_nce(q, k, queue.requires_grad_(), 0.2, compiled=True)
