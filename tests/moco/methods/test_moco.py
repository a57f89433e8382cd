"""MoCo's step: order of operations, names, and what the queue holds."""

import pytest
import torch
import torch.nn.functional as F

from moco.config import load_pretrain_config
from moco.errors import ConfigError
from moco.methods import build_method
from moco.methods.moco import MoCo

TINY = {"arch": "resnet18", "dim": 8, "queue_size": 12, "width": 0.125, "stem": "cifar"}


def tiny(**options) -> MoCo:
    torch.manual_seed(0)
    return MoCo(**{**TINY, "mlp": True, "temperature": 0.2, **options})


def step(method, seed=1, momentum=0.9):
    generator = torch.Generator().manual_seed(seed)
    view_q, view_k = torch.randn(2, 4, 3, 8, 8, generator=generator)
    output = method(
        view_q, view_k, torch.arange(4), momentum=momentum, generator=generator
    )
    return view_q, view_k, output


def test_state_dict_has_the_references_names_and_order():
    names = list(MoCo(arch="resnet50", dim=8, mlp=True, queue_size=4, temperature=0.2,
                      width=0.125).state_dict())  # fmt: skip
    # Parameters and buffers of the module itself come first in a state dict.
    assert names[:2] == ["queue", "queue_ptr"]
    assert names[2] == "encoder_q.conv1.weight"
    half = (len(names) - 2) // 2
    assert names[2 + half] == "encoder_k.conv1.weight"
    assert names[2 + half - 4 : 2 + half] == [
        f"encoder_q.fc.{n}" for n in ("0.weight", "0.bias", "2.weight", "2.bias")
    ]


def test_v1_and_v2_differ_in_the_head_only():
    assert isinstance(tiny(mlp=False).encoder_q.fc, torch.nn.Linear)
    assert set(tiny(mlp=True).state_dict()) ^ set(tiny(mlp=False).state_dict()) == {
        f"encoder_{e}.fc.{n}"
        for e in "qk"
        for n in ("weight", "bias", "0.weight", "0.bias", "2.weight", "2.bias")
    }


def test_a_steps_own_keys_are_not_among_its_negatives():
    method = tiny()
    before = method.queue.clone()
    _, _, output = step(method)
    assert torch.equal(method.queue, before)  # forward only reads it
    output.loss.backward()
    method.after_step(output, torch.arange(4))
    assert torch.equal(method.queue[:, :4], output.keys_VBD[0].T)
    assert torch.equal(method.queue[:, 4:], before[:, 4:])
    assert method.queue_ptr.tolist() == [4]


def test_loss_is_info_nce_of_the_updated_key_encoder():
    method = tiny()
    with torch.no_grad():
        for p in method.encoder_q.parameters():
            p.add_(0.05)
    old_key = [p.clone() for p in method.encoder_k.parameters()]
    view_q, view_k, output = step(method)
    for k, old, q in zip(method.encoder_k.parameters(), old_key, method.encoder_q.parameters(),
                         strict=True):  # fmt: skip
        torch.testing.assert_close(k, 0.9 * old + 0.1 * q)
    method.eval()  # running statistics are not used: compare the keys by a fresh forward
    method.train()
    q = F.normalize(method.encoder_q(view_q), dim=1)
    k = F.normalize(method.encoder_k(view_k), dim=1)
    torch.testing.assert_close(output.keys_VBD[0], k, rtol=1e-4, atol=1e-5)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)


def test_only_the_query_encoder_gets_a_gradient():
    method = tiny()
    step(method)[2].loss.backward()
    gradients = [p.grad for p in method.encoder_q.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(p.grad is None for p in method.encoder_k.parameters())


def test_shuffling_changes_the_groups_that_split_batch_norm_sees():
    def keys(permutation_seed):
        method = tiny(bn_splits=2)
        view = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed(permutation_seed)
        return method(*view, torch.arange(4), momentum=0.9, generator=generator).keys_VBD

    permutations = {s: torch.randperm(4, generator=torch.Generator().manual_seed(s)).tolist()
                    for s in range(8)}  # fmt: skip
    groups = {s: {frozenset(p[0::2]), frozenset(p[1::2])} for s, p in permutations.items()}
    same = next(s for s in range(1, 8) if groups[s] == groups[0])
    other = next(s for s in range(1, 8) if groups[s] != groups[0])
    torch.testing.assert_close(keys(same), keys(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(keys(other), keys(0), atol=1e-3)


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="METHOD is 'byol'; allowed: moco"):
        build_method(load_pretrain_config(None, ["METHOD", "byol"]))


def test_a_queue_that_holds_no_whole_batch_is_refused():
    with pytest.raises(ConfigError, match="QUEUE_SIZE 128 does not hold the 256 keys of one step"):
        build_method(load_pretrain_config(None, ["MOCO.QUEUE_SIZE", "128"]))
