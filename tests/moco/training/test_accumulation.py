"""Gradient accumulation: what is refused, what it saves, and what the recipe says of it."""

import pytest
import tiny
import torch
from accumulated import BATCH, run

from moco.data.images import find_images
from moco.errors import ConfigError
from moco.methods import build_method
from moco.training import checkpoint as ckpt
from moco.training.batch import check_batch, sees_whole_batch
from moco.training.recipe import estimate_memory, resolve_recipe
from moco.training.step import train_step
from moco.training.trainer import Trainer


@pytest.mark.parametrize(
    "changes, world_size, message",
    [
        ({"TRAIN__ACCUMULATION_STEPS": 3}, 1, "STEPS 3 does not divide the 8 images of a process"),
        ({"TRAIN__ACCUMULATION_STEPS": 8}, 2, "STEPS 8 does not divide the 4 images of a process"),
        (
            {"TRAIN__ACCUMULATION_STEPS": 4, "MODEL__BN_SPLITS": 4}, 1,
            "BN_SPLITS 4 does not divide the 2 images of a micro-batch",
        ),
        (
            {"TRAIN__ACCUMULATION_STEPS": 2, "MODEL__NORM": "SyncBN", "MODEL__BN_SPLITS": 1}, 1,
            "SyncBN allows 1 only. It normalises over the global batch",
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(image_folder, changes, world_size, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_batch(tiny.config(**changes), find_images(image_folder), world_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ("end_to_end", "end_to_end: SimCLR"))
def test_negatives_with_a_gradient_cannot_be_accumulated(image_folder, tmp_path, variant):
    cfg = tiny.method_config(variant, TRAIN__ACCUMULATION_STEPS=2)
    with pytest.raises(ConfigError, match="METHOD end_to_end allows 1 only.*with gradient"):
        Trainer(cfg, find_images(image_folder), tmp_path, tiny.alone())


def test_values_below_1_are_refused():
    with pytest.raises(ConfigError, match="TRAIN.ACCUMULATION_STEPS is 0; allowed: 1 or more"):
        tiny.config(TRAIN__ACCUMULATION_STEPS=0)


def peak_of_saved_bytes(parts: int) -> int:
    """The most bytes that backward holds at one time during a step, weights left out."""
    cfg = tiny.config(
        TRAIN__BATCH_SIZE=16, MODEL__BN_SPLITS=1, TRAIN__ACCUMULATION_STEPS=parts,
        MOCO__QUEUE_SIZE=32,
    )  # fmt: skip
    torch.manual_seed(0)
    method = build_method(cfg)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), 0.1)
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    weights.add(method.queue.untyped_storage().data_ptr())
    held, peak = {}, [0]

    class Kept:
        """A tensor kept for backward; forgotten when the graph lets go of it."""

        def __init__(self, tensor):
            self.tensor = tensor
            self.storage = tensor.untyped_storage()
            if self.storage.data_ptr() not in weights:
                held[id(self)] = (self.storage.data_ptr(), self.storage.nbytes())
                peak[0] = max(peak[0], sum(dict(held.values()).values()))

        def __del__(self):
            held.pop(id(self), None)

    views = torch.randint(256, (2, 16, 3, 16, 16), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        train_step(
            method, method, optimizer, (*views, torch.arange(16)), step=0, lr=0.1, momentum=0.9,
            cfg=cfg, process=tiny.alone(), measure=False,
        )  # fmt: skip
    assert not held  # all were let go of, so the count above is right
    return peak[0]


def test_what_backward_keeps_drops_with_the_parts():
    whole, halves, quarters = (peak_of_saved_bytes(parts) for parts in (1, 2, 4))
    assert halves < 0.55 * whole and quarters < 0.3 * whole, (whole, halves, quarters)


def test_the_recipe_counts_micro_batches(image_folder):
    one, four = (
        tiny.config(TRAIN__ACCUMULATION_STEPS=parts, MODEL__BN_SPLITS=1) for parts in (1, 4)
    )
    whole, quarter = (estimate_memory(cfg, build_method(cfg).to("meta"), 8) for cfg in (one, four))
    assert 3.5 < whole.activations / quarter.activations < 4.5
    assert whole.logits == 4 * quarter.logits
    assert (whole.inputs, whole.weights) == (quarter.inputs, quarter.weights)
    text = resolve_recipe(four, num_images=32, world_size=1).text()
    assert "8 images = 1 process(es) x 4 micro-batches x 2; 4 steps an epoch" in text
    assert "groups of 2 images" in text
    assert sees_whole_batch(one, 1) and not sees_whole_batch(four, 1)


def test_metrics_are_means_of_the_micro_batches_and_all_keys_are_stored():
    cfg = tiny.config(TRAIN__ACCUMULATION_STEPS=2, MODEL__BN_SPLITS=1)
    torch.manual_seed(0)
    method = build_method(cfg)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), 0.0)
    views = torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8)
    seen = []
    original = method.contrast
    method.contrast = lambda *args: seen.append(original(*args)) or seen[-1]
    result = train_step(
        method, method, optimizer, (*views, torch.arange(8)), step=0, lr=0.0, momentum=0.9,
        cfg=cfg, process=tiny.alone(),
    )  # fmt: skip
    assert len(seen) == 2
    for name in ("acc1", "feature_std", "negative_similarity"):
        mean = (seen[0].metrics[name] + seen[1].metrics[name]) / 2
        torch.testing.assert_close(result.metrics[name], mean)
    torch.testing.assert_close(result.loss, (seen[0].loss + seen[1].loss) / 2)
    keys = torch.cat([output.keys_VBD[0] for output in seen])
    assert torch.equal(method.queue[:, :8], keys.T) and method.queue_ptr.item() == 8


def test_statistics_for_evaluation_take_in_every_micro_batch():
    """Virtual ranks share one batch norm here; the reference keeps rank 0's statistics."""
    cfg = tiny.config(TRAIN__ACCUMULATION_STEPS=4, MODEL__BN_SPLITS=1)
    method = build_method(cfg)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), 0.1)
    views = torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8)
    train_step(
        method, method, optimizer, (*views, torch.arange(8)), step=0, lr=0.1, momentum=0.9,
        cfg=cfg, process=tiny.alone(),
    )  # fmt: skip
    assert method.encoder_q.bn1.num_batches_tracked == 4
    assert method.encoder_k.bn1.num_batches_tracked == 4


def test_an_accumulating_run_resumes_exactly(image_folder, tmp_path):
    cfg = tiny.config(TRAIN__ACCUMULATION_STEPS=2, TRAIN__EPOCHS=2)

    def trainer(folder, resume=False):
        return Trainer(
            cfg, find_images(image_folder), folder, tiny.alone(), resume=resume,
            say=lambda line: None,
        )  # fmt: skip

    trainer(tmp_path / "whole").train()
    stopped = trainer(tmp_path / "stopped")
    stopped.total_steps = tiny.STEPS_PER_EPOCH
    stopped.train()
    resumed = trainer(tmp_path / "stopped", resume=True)
    assert resumed.first_step == tiny.STEPS_PER_EPOCH
    resumed.train()
    digests = [
        tiny.state_digest(ckpt.read_torch_file(folder / "checkpoint_0001.pth.tar"))
        for folder in (tmp_path / "whole", tmp_path / "stopped")
    ]
    assert digests[0] == digests[1]


def test_without_parts_a_step_is_the_one_it_always_was():
    """The same numbers whether the batch is prepared by the loop or by forward itself."""
    losses, learned = run("moco", parts=1, num_steps=1)
    cfg = tiny.method_config(
        "moco", TRAIN__BATCH_SIZE=BATCH, MODEL__BN_SPLITS=1, MOCO__QUEUE_SIZE=3 * BATCH + 4
    )
    torch.manual_seed(0)
    method = build_method(cfg)
    from moco.data.augment import normalize
    from moco.seeding import torch_generator

    draws = torch.Generator().manual_seed(0)
    views = torch.randint(256, (2, BATCH, 3, 16, 16), generator=draws, dtype=torch.uint8)
    generator = torch_generator(cfg.SEED, "method-step", 0)
    output = method(
        normalize(views[0]), normalize(views[1]), torch.arange(BATCH), momentum=0.9,
        generator=generator,
    )  # fmt: skip
    assert torch.equal(output.loss.detach(), losses[0])
    method.after_step(output, torch.arange(BATCH))
    assert torch.equal(method.queue, learned["queue"])
