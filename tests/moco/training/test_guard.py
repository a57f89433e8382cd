"""Findings of a step: read at once or a step later, updates left out, what is saved is finite."""

import pytest
import tiny
import torch

from moco.contrast.memory_bank import update_bank_
from moco.contrast.queue import enqueue_
from moco.data.images import find_images
from moco.errors import NonFiniteError
from moco.training import checkpoint as ckpt
from moco.training.guard import FINDINGS, Evidence, StepGuard, skips_updates
from moco.training.nonfinite import NonFiniteReport, not_finite_names
from moco.training.optimizer import LARS
from moco.training.step import train_step
from moco.training.trainer import Trainer

NAN = torch.tensor(float("nan"))
FINE = torch.tensor(1.0)


class Stopped(Exception):
    pass


def guard(delayed=False):
    seen = []

    def report(evidence, named):
        seen.append((evidence.step, named))
        raise Stopped

    return StepGuard(tiny.alone(), report, delayed=delayed), seen


def evidence(step, loss=FINE, keys=None):
    return Evidence(step, 0.1, loss, keys, torch.arange(2), redo=lambda: None)


@pytest.mark.parametrize(
    "loss, keys, norm, named",
    [
        (NAN, None, FINE, {FINDINGS[0]}),
        (FINE, torch.tensor([[[1.0], [torch.inf]]]), FINE, {FINDINGS[1]}),
        (FINE, torch.ones(1, 2, 1), -NAN, {FINDINGS[2]}),
        (torch.tensor(torch.inf), None, NAN, {FINDINGS[0], FINDINGS[2]}),
    ],
)
def test_at_once_the_bad_step_itself_stops(loss, keys, norm, named):
    watch, seen = guard()
    assert watch.check(evidence(0), FINE, stop=False) is None
    with pytest.raises(Stopped):
        watch.check(evidence(1, loss, keys), norm, stop=False)
    assert seen == [(1, named)]


def test_delayed_the_next_step_stops_and_the_bad_one_is_left_out():
    watch, seen = guard(delayed=True)
    assert not watch.check(evidence(0), FINE, stop=False)
    assert watch.check(evidence(1, NAN), FINE, stop=False)  # true: leave this update out
    assert seen == []
    with pytest.raises(Stopped):
        watch.check(evidence(2), FINE, stop=False)
    assert seen == [(1, {FINDINGS[0]})]


@pytest.mark.parametrize("how", ("wait", "settle"))
def test_delayed_findings_can_be_waited_for(how):
    watch, seen = guard(delayed=True)
    with pytest.raises(Stopped):
        assert watch.check(evidence(4, NAN), FINE, stop=False, wait=how == "wait")
        watch.settle()
    assert seen == [(4, {FINDINGS[0]})]
    watch.settle()  # nothing is left to read


def test_a_request_to_stop_is_read_with_its_step():
    now, later = guard()[0], guard(delayed=True)[0]
    now.check(evidence(0), FINE, stop=True)
    later.check(evidence(0), FINE, stop=True)
    assert now.stop_requested and not later.stop_requested
    later.check(evidence(1), FINE, stop=False)
    assert later.stop_requested


def test_only_a_gpus_fused_optimizer_is_read_late():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    fused = torch.optim.SGD(weight, 0.1, fused=True)
    lars = LARS(weight, lr=0.1, momentum=0.9, weight_decay=0.0)
    gpu = type(tiny.alone())(0, 1, 0, torch.device("cuda"))
    assert not skips_updates(fused, tiny.alone()) and not skips_updates(lars, tiny.alone())
    assert skips_updates(fused, gpu) and skips_updates(lars, gpu)
    assert not skips_updates(torch.optim.SGD(weight, 0.1), gpu)


def optimizers(weight):
    return {
        "sgd": torch.optim.SGD([weight], 0.1, momentum=0.9, weight_decay=0.1, fused=True),
        "adamw": torch.optim.AdamW([weight], 0.1, weight_decay=0.1, fused=True),
        "lars": LARS([weight], lr=0.1, momentum=0.9, weight_decay=0.1),
    }


@pytest.mark.parametrize("name", ("sgd", "adamw", "lars"))
def test_optimizers_leave_out_an_update_on_the_device(name):
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = optimizers(weight)[name]

    def step(found_inf, gradient):
        weight.grad = gradient
        optimizer.found_inf = found_inf
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        return [weight.detach().clone(), *(torch.as_tensor(t).clone() for t in state.values())]

    first = step(torch.tensor(0.0), torch.ones(4, 3))
    left_out = step(torch.tensor(1.0), torch.full((4, 3), float("nan")))
    assert all(torch.equal(a, b) for a, b in zip(first, left_out, strict=True))
    taken = step(torch.tensor(0.0), torch.ones(4, 3))
    assert not torch.equal(taken[0], first[0]) and bool(torch.isfinite(taken[0]).all())


def test_lars_moves_alike_with_and_without_the_flag():
    states = []
    for found_inf in (None, torch.tensor(0.0)):
        weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        optimizer = optimizers(weight)["lars"]
        for step in range(3):
            weight.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            optimizer.found_inf = found_inf
            optimizer.step()
        states.append(weight.detach())
    assert torch.equal(*states)


def test_queue_and_bank_leave_out_a_step():
    for skip, moves in ((torch.tensor(True), False), (torch.tensor(False), True)):
        queue, pointer = torch.zeros(2, 5), torch.tensor([4])
        enqueue_(queue, pointer, torch.ones(3, 2), skip)
        assert (pointer.item() == 2) == moves and (queue.sum().item() == 6) == moves
        bank = torch.eye(3)
        update_bank_(bank, torch.tensor([1]), torch.tensor([[1.0, 0.0, 0.0]]), 0.5, skip)
        assert (not torch.equal(bank, torch.eye(3))) == moves


@pytest.mark.parametrize("variant", ("moco", "moco_symmetric", "memory_bank"))
def test_a_delayed_step_that_is_bad_leaves_weights_and_store_alone(variant):
    cfg = tiny.method_config(variant)
    torch.manual_seed(0)
    from moco.methods import build_method

    method = build_method(cfg, num_images=32)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9, fused=True)
    watch = StepGuard(tiny.alone(), NonFiniteReport(method, tiny.alone()), delayed=True)
    views = torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8)

    def step(number, poison=False):
        handle = None
        if poison:
            handle = method.encoder_q.register_forward_hook(lambda m, a, out: out * NAN)
        train_step(
            method, method, optimizer, (*views, torch.arange(8)), step=number, lr=0.1,
            momentum=0.9, cfg=cfg, process=tiny.alone(), guard=watch, measure=False,
        )  # fmt: skip
        if handle is not None:
            handle.remove()

    def learned():
        own = dict(method.encoder_q.named_parameters()) | dict(method.named_buffers(recurse=False))
        own |= {str(n): s["momentum_buffer"] for n, s in enumerate(optimizer.state.values())}
        return {n: t.detach().clone() for n, t in own.items()}

    step(0)
    step(1)
    before = learned()
    step(2, poison=True)
    assert all(torch.equal(before[n], t) for n, t in learned().items())
    with pytest.raises(NonFiniteError, match="step 2: the loss is not finite"):
        step(3)
    assert all(torch.equal(before[n], t) for n, t in learned().items())


def test_a_state_that_is_not_finite_is_not_saved(image_folder, tmp_path):
    run = Trainer(
        tiny.config(), find_images(image_folder), tmp_path, tiny.alone(), say=lambda line: None
    )

    class Spoil:
        def on_step(self, record):
            if record.step == 7:  # the epoch's last step reads no statistics
                run.method.encoder_k.bn1.running_var[0] = float("inf")

        def on_epoch(self, record):
            pass

    with pytest.raises(NonFiniteError, match=r"step 8: .*\(rank 0: encoder_k.bn1.running_var\)"):
        run.train([Spoil()])
    assert [p.name for p in ckpt.checkpoint_files(tmp_path)] == ["checkpoint_0000.pth.tar"]


def test_not_finite_names_sees_single_values_and_no_overflow():
    big = torch.full((4,), 3e38)
    tensors = {
        "fine": torch.ones(3), "whole": torch.tensor([1]), "empty": torch.empty(0), "big": big,
        "nan": torch.tensor([1.0, float("nan")]), "inf": torch.tensor([[torch.inf]]), "step": 3,
        "both": torch.tensor([torch.inf, -torch.inf]),
    }  # fmt: skip
    assert not_finite_names(tensors) == ["nan", "inf", "both"]
    assert not_finite_names({"n": torch.tensor(1)}) == []


@pytest.mark.gpu
def test_no_step_but_a_logged_one_waits_for_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from moco.methods import build_method

    device = torch.device("cuda")
    process = type(tiny.alone())(0, 1, 0, device)
    cfg = tiny.config()
    method = build_method(cfg).to(device)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9, fused=True)
    report = NonFiniteReport(method, process)
    watch = StepGuard(process, report, delayed=skips_updates(optimizer, process))
    assert watch.delayed
    views = torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8).pin_memory()
    batch = (views[0], views[1], torch.arange(8).pin_memory())
    for step in range(4):
        # The first step sets up kernels and caches, which may wait.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            train_step(
                method, method, optimizer, batch, step=step, lr=0.1, momentum=0.9, cfg=cfg,
                process=process, guard=watch, measure=False,
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
    watch.settle()
