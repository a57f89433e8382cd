"""MoCo's training steps against the reference's: live where a copy is at hand, else its numbers.

`MOCO_REFERENCE=CHECKOUT pytest -m reference` runs the live tests (facebookresearch/moco at
7397dfe). The controls break one thing each and must be seen.
"""

from __future__ import annotations

import ast
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parity.moco_sides import (
    CASES,
    GOLDEN,
    Ours,
    Reference,
    differences,
    largest_differences,
    named_state,
    observe,
    reference_class,
    summary,
)
from processes import in_processes

import moco.methods.moco as ours
from moco.contrast.info_nce import info_nce_logits, unit_vectors
from moco.contrast.queue import enqueue_
from moco.distributed import all_gather_cat, batch_shuffle
from moco.methods import StepOutput
from moco.methods.moco import MoCo
from moco.models.backbone import build_backbone
from moco.models.momentum import ema_update_
from moco.training.schedule import learning_rate

GOLDEN_TOLERANCE = 1e-10  # float64; other sums and kernels move the numbers by 1e-13
BUFFERS = "batch-norm buffers"
live = pytest.mark.reference


@pytest.fixture
def reference_at_hand():
    if "MOCO_REFERENCE" not in os.environ:
        pytest.skip("MOCO_REFERENCE names no checkout of facebookresearch/moco at 7397dfe")


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# The live comparison, in float32: bitwise.


@live
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_the_references_bitwise(name, reference_at_hand, group_of_one):
    found = differences(observe(Ours(CASES[name])), observe(Reference(CASES[name])))
    assert len(found) == 10
    assert found == {group: (0.0, True) for group in found}


def _both_ways(rank):
    case = CASES["v2"]
    return {
        broadcast: differences(observe(Ours(case)), observe(Reference(case, broadcast)))
        for broadcast in (True, False)
    }


@live
def test_two_processes_are_the_references_bitwise(reference_at_hand, tmp_path):
    """Rank 1's batch-norm buffers: overwritten by rank 0's there, before each forward. Without
    that broadcast the reference's are ours."""
    ranks = in_processes(_both_ways, tmp_path)
    for rank, found in enumerate(ranks):
        for broadcast, groups in found.items():
            differing = {group for group, (_, bitwise) in groups.items() if not bitwise}
            expected = {g for g in groups if g.endswith(BUFFERS)} if rank and broadcast else set()
            assert differing == expected


@live
def test_a_seed_gives_the_references_initial_state(reference_at_hand):
    states = []
    for head in (False, True):
        case = CASES["v2" if head else "v1"]
        torch.manual_seed(5)
        built = MoCo.from_config(case.config())
        end = torch.get_rng_state()
        torch.manual_seed(5)
        encoder = lambda num_classes, case=case: build_backbone(  # noqa: E731
            case.arch, num_classes=num_classes, width=case.width, stem=case.stem
        )
        theirs = reference_class()(encoder, case.dim, 3 * case.batch, 0.99, 0.2, head)
        assert torch.equal(torch.get_rng_state(), end)
        states.append((built.state_dict(), theirs.state_dict()))
        assert [n for n, _ in built.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for built, theirs in states:
        assert list(built) == list(theirs)
        assert all(torch.equal(built[n], theirs[n]) for n in built)


@live
@pytest.mark.parametrize("cosine", [True, False])
def test_learning_rates_are_the_references(reference_at_hand, cosine):
    source = (Path(os.environ["MOCO_REFERENCE"]) / "main_moco.py").read_text()
    wanted = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "adjust_learning_rate"
    ]
    scope = {"math": __import__("math")}
    exec(compile(ast.Module(wanted, []), "main_moco.py", "exec"), scope)
    optimizer = types.SimpleNamespace(param_groups=[{}])
    args = types.SimpleNamespace(lr=0.03, cos=cosine, epochs=200, schedule=[120, 160])
    for epoch in range(200):
        scope["adjust_learning_rate"](optimizer, epoch, args)
        schedule = "cosine" if cosine else "step"
        rate = learning_rate(schedule, 0.03, epoch, 200, (120, 160))
        assert rate == optimizer.param_groups[0]["lr"]


# The reference's recorded numbers, in float64, and the controls.


class QueryFirst(MoCo):
    """The reference's order: query forward, EMA, keys. The forward reads nothing the EMA writes,
    so ours, EMA and keys first, gives the same numbers."""

    def prepare(self, view_q, view_k, *, momentum, generator, num_parts=1):
        return [(momentum, generator)]

    def contrast(self, view_q, view_k, index, part, measure):
        q = unit_vectors(self.encoder_q(view_q))
        with torch.no_grad():
            ema_update_(self.encoder_k, self.encoder_q, part[0])
            k = self._keys(view_k, part[1], 1)
        logits = info_nce_logits(q, k, self.queue, self.temperature)
        return StepOutput(ours.info_nce_loss(logits), keys_VBD=k[None])


class EmaAfterKeys(MoCo):
    """Keys of the encoder before its update."""

    def prepare(self, view_q, view_k, *, momentum, generator, num_parts=1):
        keys = super().prepare(view_q, view_k, momentum=1.0, generator=generator)
        ema_update_(self.encoder_k, self.encoder_q, momentum)
        return keys


class EnqueueFirst(MoCo):
    """The step's own keys enter the queue before the logits are made."""

    def prepare(self, view_q, view_k, *, momentum, generator, num_parts=1):
        [k] = super().prepare(view_q, view_k, momentum=momentum, generator=generator)
        enqueue_(self.queue, self.queue_ptr, all_gather_cat(k))
        return [k]

    def after_step(self, output, index, skip=None):
        pass


class NotUnshuffled(MoCo):
    """A permutation that is not undone: a query's positive is another image's key."""

    def _keys(self, view_k, generator, num_parts):
        num = len(view_k) * (dist.get_world_size() if dist.is_initialized() else 1)
        shuffled = batch_shuffle(view_k, torch.randperm(num, generator=generator))
        return unit_vectors(self.encoder_k(shuffled))


BROKEN = (EmaAfterKeys, EnqueueFirst, NotUnshuffled)


def golden(num: int, rank: int, name: str) -> dict[str, np.ndarray]:
    start = f"{num}/{rank}/{name}/"
    with np.load(GOLDEN) as file:
        return {key.removeprefix(start): file[key] for key in file if key.startswith(start)}


def against_golden(num, rank, name, method_class=MoCo, changes=()) -> dict[str, float]:
    """Largest differences; the buffers of rank 1 are left out, see the live test."""
    numbers = summary(observe(Ours(CASES[name], method_class, changes, torch.float64)))
    found = largest_differences(numbers, golden(num, rank, name))
    return {g: d for g, d in found.items() if rank == 0 or not g.endswith(BUFFERS)}


@pytest.mark.parametrize("name", CASES)
def test_one_process_gives_the_recorded_numbers(name):
    found = against_golden(1, 0, name)
    assert len(found) == 10 and max(found.values()) < GOLDEN_TOLERANCE, found


def test_the_order_of_ema_and_query_forward_is_free():
    both = [observe(Ours(CASES["v2"], kind)) for kind in (MoCo, QueryFirst)]
    found = differences(*both)
    assert found == {group: (0.0, True) for group in found}
    assert max(against_golden(1, 0, "v2", QueryFirst).values()) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_negative_control_in_one_process(broken):
    found = against_golden(1, 0, "v2", broken)
    for group in ("loss", "logits", "gradients", "queue", "query encoder, weights"):
        assert found[group] > 1e5 * GOLDEN_TOLERANCE, (group, found[group])


def _against_golden_of_two(rank):
    return {
        "v2": against_golden(2, rank, "v2"),
        "v1": against_golden(2, rank, "v1"),
        "not unshuffled": against_golden(2, rank, "v2", NotUnshuffled),
        "SyncBN": against_golden(2, rank, "v2", changes=("MODEL.NORM", "SyncBN")),
    }


def test_two_processes_give_the_recorded_numbers_and_controls_do_not(tmp_path):
    for rank, found in enumerate(in_processes(_against_golden_of_two, tmp_path)):
        for name in ("v2", "v1"):
            assert len(found[name]) == (8 if rank else 10)
            assert max(found[name].values()) < GOLDEN_TOLERANCE, (rank, name, found[name])
        for name in ("not unshuffled", "SyncBN"):
            assert found[name]["loss"] > 1e5 * GOLDEN_TOLERANCE, (rank, name)
            assert found[name]["queue"] > 1e5 * GOLDEN_TOLERANCE, (rank, name)


def test_named_state_depends_on_name_and_seed_alone():
    like = {name: torch.empty(3, 4) for name in ("queue", "a.weight", "b.weight")}
    first, again, other = named_state(like, 0), named_state(like, 0), named_state(like, 1)
    assert all(torch.equal(first[n], again[n]) for n in like)
    assert not torch.equal(first["a.weight"], first["b.weight"])
    assert not torch.equal(first["a.weight"], other["a.weight"])
