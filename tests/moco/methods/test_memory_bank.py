"""The memory bank as a method: where positives come from, and what a step stores."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from moco.contrast.memory_bank import draw_negatives
from moco.data.images import find_images
from moco.errors import ConfigError
from moco.methods import build_method
from moco.methods.memory_bank import MemoryBank
from moco.training import checkpoint as ckpt
from moco.training.trainer import Trainer


def bank_of(num_images=20, **options) -> MemoryBank:
    torch.manual_seed(0)
    return MemoryBank(**{
        "num_images": num_images, "num_negatives": 12, "bank_momentum": 0.5, "temperature": 0.2,
        "arch": "resnet18", "dim": 8, "mlp": False, "width": 0.125, "stem": "cifar", **options,
    })  # fmt: skip


INDEX = torch.tensor([7, 0, 19, 3])


def step(method, seed=3):
    views = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    return views, method(*views, INDEX, momentum=0.9, generator=generator)


def test_loss_reads_the_images_own_rows_and_the_drawn_ones():
    method = bank_of()
    views, output = step(method)
    q = F.normalize(method.encoder_q(views[0]), dim=1)
    negatives = draw_negatives(20, 12, torch.Generator().manual_seed(3))
    logits = q @ torch.cat([method.bank[INDEX], method.bank[negatives]]).T / 0.2
    terms = []
    for row, image in enumerate(INDEX.tolist()):
        kept = [4 + n for n, negative in enumerate(negatives.tolist()) if negative != image]
        terms.append(torch.logsumexp(logits[row, [row, *kept]], 0) - logits[row, row])
    torch.testing.assert_close(output.loss, torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(step(method, seed=4)[1].loss, output.loss, rtol=1e-3)


def test_a_step_stores_the_features_of_its_images_after_the_update():
    method = bank_of()
    before = method.bank.clone()
    _, output = step(method)
    assert torch.equal(method.bank, before)  # forward only reads it
    output.loss.backward()
    method.after_step(output, INDEX)
    mixed = 0.5 * before[INDEX] + 0.5 * output.keys_VBD[0]
    torch.testing.assert_close(method.bank[INDEX], F.normalize(mixed, dim=1))
    others = [i for i in range(20) if i not in INDEX]
    assert torch.equal(method.bank[others], before[others])
    assert not output.keys_VBD.requires_grad and not method.bank.requires_grad


def test_the_second_view_changes_nothing():
    method = bank_of()
    views, output = step(method)
    other = method(views[0], views[1] + 1, INDEX, momentum=0.0,
                   generator=torch.Generator().manual_seed(3))  # fmt: skip
    torch.testing.assert_close(other.loss, output.loss)


def test_rows_belong_to_the_data_sets_images(image_folder, tmp_path):
    """After an epoch every row that was visited has changed, and the bank is in the checkpoint."""
    cfg = tiny.method_config("memory_bank", TRAIN__EPOCHS=1)
    run = Trainer(cfg, find_images(image_folder), tmp_path, tiny.alone(), say=lambda line: None)
    before = run.method.bank.clone()
    assert len(before) == 32
    run.train()
    saved = ckpt.read_torch_file(tmp_path / "checkpoint_0000.pth.tar")["state_dict"]["module.bank"]
    assert torch.equal(saved, run.method.bank)
    assert (saved != before).any(dim=1).all()
    torch.testing.assert_close(saved.norm(dim=1), torch.ones(32))


def test_the_number_of_images_is_needed():
    with pytest.raises(ConfigError, match="memory_bank: needs the number of images"):
        build_method(tiny.method_config("memory_bank"))
