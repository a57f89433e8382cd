"""Optimizer groups, learning rates and the synchronised norm against Detectron2's, bitwise."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

detectron2 = pytest.importorskip("detectron2")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import get_norm  # noqa: E402
from detectron2.modeling import build_model as build_theirs  # noqa: E402
from detectron2.solver import build_lr_scheduler  # noqa: E402
from detectron2.solver import build_optimizer as build_their_optimizer  # noqa: E402

from detection.config import load_detection_config  # noqa: E402
from detection.engines.embedded.faster_rcnn import build_model  # noqa: E402
from detection.engines.embedded.norm import NaiveSyncBatchNorm2d  # noqa: E402
from detection.engines.embedded.solver import build_optimizer, lr_at  # noqa: E402

pytestmark = pytest.mark.detectron2

TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "SOLVER.BASE_LR": 0.02,
}


def configs(settings: dict):
    """Our node and Detectron2's, from the same pairs."""
    pairs = [item for pair in {**TINY, **settings}.items() for item in pair]
    theirs = get_cfg()
    theirs.merge_from_list(pairs)
    return load_detection_config(None, pairs), theirs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"SOLVER.WEIGHT_DECAY_NORM": 0.001},
        {"SOLVER.WEIGHT_DECAY_BIAS": 0.0, "SOLVER.BIAS_LR_FACTOR": 2.0, "SOLVER.NESTEROV": True},
    ],
)
def test_optimizer_groups_are_equal(settings):
    our_cfg, their_cfg = configs(settings)
    torch.manual_seed(0)
    ours, theirs = build_model(our_cfg), build_theirs(their_cfg)
    named = []
    for model, optimizer in (
        (ours, build_optimizer(our_cfg, ours)),
        (theirs, build_their_optimizer(their_cfg, theirs)),
    ):
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = [
            {**group, "params": [names[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        named.append([{k: v for k, v in g.items() if k != "initial_lr"} for g in groups])
    assert named[0] == named[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"SOLVER.STEPS": (1800, 2200), "SOLVER.WARMUP_ITERS": 100},
        {"SOLVER.STEPS": (1800, 2399), "SOLVER.WARMUP_METHOD": "constant"},
        {"SOLVER.STEPS": (50, 2200), "SOLVER.RESCALE_INTERVAL": True},
        {"SOLVER.STEPS": (100,), "SOLVER.WARMUP_ITERS": 9000},
        {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR_END": 0.001},
        {"SOLVER.STEPS": (), "SOLVER.WARMUP_ITERS": 0},
    ],
)
def test_learning_rates_are_equal_at_every_iteration(settings):
    our_cfg, their_cfg = configs({"SOLVER.MAX_ITER": 2400, **settings})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = build_lr_scheduler(their_cfg, optimizer)
    for iteration in range(2400):
        assert lr_at(our_cfg, iteration) == optimizer.param_groups[0]["lr"], iteration
        optimizer.step()
        scheduler.step()


def _compare_sync_norms(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(2 + rank, 5, 4, 3 + rank, generator=generator)
    results = []
    for norm in (NaiveSyncBatchNorm2d(5), get_norm("naiveSyncBN", 5)):
        values = x.clone().requires_grad_()
        out = norm(values)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append(
            {"out": out, "x": values.grad, "w": norm.weight.grad, "b": norm.bias.grad}
            | norm.state_dict()
        )
    ours, theirs = results
    theirs["num_batches_tracked"] = ours["num_batches_tracked"]
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    dist.destroy_process_group()


def test_naive_sync_batch_norm_is_equal_on_two_unequal_ranks(tmp_path):
    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(_compare_sync_norms, args=(rendezvous,), nprocs=2)
