"""Figures of health against hand-worked values; warnings; and that watching changes nothing."""

import json
import math

import pytest
import tiny
import torch
import torch.nn.functional as F

from moco.contrast.figures import contrast_figures, feature_std, mean_similarities
from moco.data.images import find_images
from moco.methods import build_method
from moco.training import checkpoint as ckpt
from moco.training.health import Health, queue_age
from moco.training.progress import JsonLog
from moco.training.step import gradient_norm, train_step
from moco.training.trainer import Trainer

HEALTHY = {"feature_std": 0.9, "gradient_norm": 0.5, "acc1": 40.0}


# The figures.


def test_similarities_of_two_queries_by_hand():
    """q = x and y axis; positives at 60 and 0 degrees; negatives: the axes' sum and -x."""
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    k = torch.tensor([[0.5, math.sqrt(0.75)], [0.0, 1.0]])
    negatives = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [-1.0, 0.0]]).T
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives], 1) / 0.2
    positive, negative = mean_similarities(logits, torch.zeros(2, dtype=torch.long), 0.2)
    assert positive.item() == pytest.approx((0.5 + 1.0) / 2)
    assert negative.item() == pytest.approx((math.sqrt(0.5) - 1.0 + math.sqrt(0.5) + 0.0) / 4)


def test_similarities_leave_out_what_is_not_compared():
    logits = torch.tensor([[-torch.inf, 2.0, 6.0], [1.0, -torch.inf, 4.0]])
    positive, negative = mean_similarities(logits, torch.tensor([1, 2]), 0.5)
    assert positive.item() == pytest.approx((2 + 4) / 2 * 0.5)
    assert negative.item() == pytest.approx((6 + 1) / 2 * 0.5)


def test_feature_std_by_hand():
    """Four unit vectors along the axes: each dimension holds 1, -1, 0, 0."""
    axes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert feature_std(axes).item() == pytest.approx(math.sqrt(2 / 3) * math.sqrt(2))
    assert feature_std(axes[:1].expand(4, 2)).item() == 0.0
    one = contrast_figures(axes[:1], torch.tensor([[2.0]]), temperature=0.5)
    assert "feature_std" not in one and one["negative_similarity"].item() == 0.0
    sphere = F.normalize(torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    assert feature_std(sphere).item() == pytest.approx(1.0, abs=0.01)


def test_the_steps_figures_are_those_of_its_features():
    torch.manual_seed(0)
    method = build_method(tiny.config())
    views = torch.randn(2, 8, 3, 16, 16)
    queue = method.queue.clone()
    output = method(*views, torch.arange(8), momentum=0.9, generator=torch.Generator())
    q = F.normalize(method.encoder_q(views[0]), dim=1)
    figures = output.metrics
    close = dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        figures["positive_similarity"], (q * output.keys_VBD[0]).sum(1).mean(), **close
    )
    torch.testing.assert_close(figures["negative_similarity"], (q @ queue).mean(), **close)
    torch.testing.assert_close(
        figures["feature_std"], q.std(0).mean() * math.sqrt(8), **close
    )
    assert set(contrast_figures(q, q @ queue, temperature=1.0)) == set(figures)


def test_gradient_norm_by_hand():
    layer = torch.nn.Linear(2, 1)
    frozen = torch.nn.Linear(2, 1).requires_grad_(False)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    assert gradient_norm(torch.nn.Sequential(layer, frozen)).item() == pytest.approx(13.0)
    layer.bias.grad.fill_(float("inf"))
    assert not torch.isfinite(gradient_norm(layer))


@pytest.mark.parametrize(
    "step, mean, oldest, random",
    [
        (0, 0.0, 0.0, 1.0),
        (1, 1.0, 1.0, 0.6),  # 8 of 20 columns, of the step before
        (2, 1.5, 2.0, 0.2),
        (3, (8 * 1 + 8 * 2 + 4 * 3) / 20, 3.0, 0.0),  # full: the third step's keys fit in half
        (9, (8 * 1 + 8 * 2 + 4 * 3) / 20, 3.0, 0.0),
    ],
)
def test_queue_age_by_hand(step, mean, oldest, random):
    age = queue_age(step, queue_size=20, keys_per_step=8)
    assert age["queue_age_mean"] == pytest.approx(mean)
    assert (age["queue_age_max"], age["queue_random"]) == (oldest, pytest.approx(random))


def test_queue_age_is_that_of_a_queue_followed_key_by_key():
    born = [None] * 20
    pointer = 0
    for step in range(12):
        ages = [step - b for b in born if b is not None]
        age = queue_age(step, queue_size=20, keys_per_step=8)
        assert age["queue_age_max"] == max(ages, default=0)
        assert age["queue_age_mean"] == pytest.approx(sum(ages) / len(ages) if ages else 0)
        assert age["queue_random"] == pytest.approx(born.count(None) / 20)
        for _ in range(8):
            born[pointer], pointer = step, (pointer + 1) % 20


def chance_by_hand(variant):
    """With all features one vector every similarity is 1: log of the number of candidates."""
    batch, tau = 8, tiny.method_config(variant).MOCO.TEMPERATURE
    return {
        "moco": math.log(21),
        "moco_symmetric": 2 * math.log(21),
        "memory_bank": math.log(21),
        "end_to_end": math.log(batch),
        "end_to_end: SimCLR": math.log(2 * batch - 1),
        "moco_v3": 2 * tau * 2 * math.log(batch),
        "moco_v3: ViT": 2 * tau * 2 * math.log(batch),
    }[variant]


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_loss_of_equal_features_is_the_chance_loss(variant, monkeypatch):
    torch.manual_seed(0)
    method = build_method(tiny.method_config(variant), num_images=400)
    chance = method.chance_loss(8)
    assert chance == pytest.approx(chance_by_hand(variant))
    for name in ("queue", "bank"):
        if hasattr(method, name):
            getattr(method, name).fill_(8**-0.5)
    one_vector = lambda module, args, out: torch.ones_like(out) + 0 * out  # noqa: E731
    for name in ("encoder_q", "encoder_k", "predictor"):
        if getattr(method, name, None) is not None:
            getattr(method, name).register_forward_hook(one_vector)
    # Numbers of images that are not drawn as negatives.
    output = method(
        *torch.randn(2, 8, 3, 16, 16), torch.arange(8), momentum=0.9,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert output.loss.item() == pytest.approx(chance, rel=1e-4)
    assert output.metrics["positive_similarity"].item() == pytest.approx(1.0)
    assert output.metrics["negative_similarity"].item() == pytest.approx(1.0)
    assert output.metrics["feature_std"].item() == pytest.approx(0.0, abs=1e-6)


# Warnings.


def health(variant="moco", **options):
    method = build_method(tiny.method_config(variant), num_images=32)
    return Health(method, **{"global_batch": 8, "steps_per_epoch": 4, **options})


def warned(watch, step, **figures):
    return watch.warnings(step, {**HEALTHY, "loss_over_chance": 0.8, **figures})


def test_a_healthy_step_says_nothing():
    assert warned(health(), 100) == ()


def test_collapse_is_said_once():
    watch = health()
    [line] = warned(watch, 7, feature_std=0.019)
    assert "feature_std 0.019, below 0.02" in line and "collapse" in line
    assert warned(watch, 8, feature_std=0.001) == ()


def test_a_loss_at_chance_is_said_once_the_queue_is_full_and_an_epoch_is_over():
    for batch, epoch, first in ((8, 2, 3), (8, 9, 9), (4, 2, 5)):  # 20 columns
        watch = health(global_batch=batch, steps_per_epoch=epoch)
        assert warned(watch, first - 1, loss_over_chance=1.0) == ()
        assert warned(watch, first, loss_over_chance=0.98) == ()
        [line] = warned(watch, first, loss_over_chance=0.995)
        assert "0.995 times that of equal similarities (3.045): nothing is learned" in line
        assert warned(watch, first + 1, loss_over_chance=1.0) == ()


def test_a_gradient_of_zero_is_said_beside_other_ailments():
    lines = warned(health(), 50, gradient_norm=0.0, feature_std=0.0)
    assert len(lines) == 2 and "the gradient is 0" in lines[1]


# In the loop.


def trained(images, folder, period, observers=()):
    cfg = tiny.config(LOG__PERIOD=period)
    Trainer(cfg, find_images(images), folder, tiny.alone(), say=lambda line: None).train(observers)
    return tiny.state_digest(ckpt.read_torch_file(folder / "checkpoint_0002.pth.tar"))


def test_watching_changes_no_number_and_costs_nothing_in_other_steps(
    image_folder, tmp_path, monkeypatch
):
    log = JsonLog(tmp_path / "log.jsonl", 0)
    every = trained(image_folder, tmp_path / "every", 1, [log])
    log.close()
    calls = []
    original = contrast_figures
    monkeypatch.setattr(
        "moco.methods.moco.contrast_figures",
        lambda *args, **options: calls.append(1) or original(*args, **options),
    )
    assert trained(image_folder, tmp_path / "some", 5) == every
    assert len(calls) == 3  # after steps 5, 10 and 12, the last
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == 12
    assert set(steps[0]["metrics"]) == {
        "acc1", "acc5", "positive_similarity", "negative_similarity", "feature_std",
        "gradient_norm", "loss_over_chance", "queue_age_mean", "queue_age_max", "queue_random",
    }  # fmt: skip
    first, last = steps[0], steps[-1]
    assert first["metrics"]["queue_random"] == 1.0 and last["metrics"]["queue_random"] == 0.0
    assert last["metrics"]["loss_over_chance"] == pytest.approx(last["loss"] / math.log(21))


def test_a_collapsed_run_is_warned_of_in_the_log_and_on_the_console(image_folder, tmp_path, capsys):
    from moco.training.progress import ConsoleProgress

    run = Trainer(
        tiny.config(TRAIN__EPOCHS=1), find_images(image_folder), tmp_path, tiny.alone(),
        say=lambda line: None,
    )  # fmt: skip
    with torch.no_grad():  # a head that says the same of all images
        run.method.encoder_q.fc[2].weight.zero_()
        run.method.encoder_q.fc[2].bias.fill_(1.0)
    log = JsonLog(tmp_path / "log.jsonl", 0)
    run.train([log, ConsoleProgress(4, 0)])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    warnings = [line["warnings"] for line in lines if line["kind"] == "step"]
    assert ["collapse" in "".join(texts) for texts in warnings] == [True, False, False, False]
    said = capsys.readouterr().out
    assert said.count("warning: step 1: all features are nearly one vector") == 1
    assert "loss/chance" in said and "grad " in said and "std 0.0" in said


def test_without_measuring_a_step_computes_no_metric():
    cfg = tiny.config()
    torch.manual_seed(0)
    method = build_method(cfg)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), 0.1)
    views = torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8)
    for measure in (True, False):
        result = train_step(
            method, method, optimizer, (*views, torch.arange(8)), step=0, lr=0.1, momentum=0.9,
            cfg=cfg, process=tiny.alone(), measure=measure,
        )  # fmt: skip
        assert bool(result.metrics) == measure
