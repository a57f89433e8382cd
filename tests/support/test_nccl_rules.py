"""Every collective gives NCCL what it demands, in two processes that talk through gloo."""

from __future__ import annotations

import tiny
import torch
import torch.distributed as dist
from processes import in_processes

from moco import distributed
from moco.distributed import ProcessInfo
from moco.methods import build_method
from moco.training.acceleration import accelerate_, resolve
from moco.training.agreement import check_ranks
from moco.training.optimizer import build_optimizer
from moco.training.step import train_step
from support import nccl_rules


def _step(variant: str, process: ProcessInfo, **keys: object) -> None:
    cfg = resolve(tiny.method_config(variant, **keys), process.device).cfg
    torch.manual_seed(0)
    method = build_method(cfg, 32).train()
    accelerate_(method, cfg)
    optimizer = build_optimizer(cfg, method)
    distributed.broadcast_state(method)
    model = distributed.data_parallel(method, process)
    views = torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    train_step(
        model, method, optimizer, (*views, torch.arange(4) + 4 * process.rank), step=0, lr=0.1,
        momentum=0.9, cfg=cfg, process=process,
    )  # fmt: skip
    check_ranks(method, optimizer, 1, process.device)


def _all_methods(rank: int) -> dict:
    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))
    with nccl_rules.watch() as seen:
        for variant in tiny.VARIANTS:
            last = "ViT" not in variant
            keys = {"MODEL__NORM": "SyncBN"} if variant == "moco_v3" else {}
            _step(variant, process, TRAIN__CHANNELS_LAST=last, TRAIN__AMP=last, **keys)
        _step("moco", process)
    return {
        "violations": list(seen.violations),
        "collectives": sorted({name for name, _ in seen.calls}),
    }


def test_collectives_of_every_method(tmp_path):
    for found in in_processes(_all_methods, tmp_path):
        assert found["violations"] == []
        assert found["collectives"] == [
            "all_gather", "all_reduce", "all_to_all_single", "broadcast"
        ]  # fmt: skip


def _evaluations_and_detector(rank: int, images: str, weights: str, folder: str) -> list[str]:
    import linear_runs

    from detection.engines.embedded.norm import NaiveSyncBatchNorm2d
    from moco.evaluation.knn_evaluation import KnnSettings, evaluate_knn
    from moco.evaluation.linear import evaluate_linear

    process = ProcessInfo(rank, 2, rank, torch.device("cpu"))
    with nccl_rules.watch() as seen:
        for tuned in (False, True):
            cfg = linear_runs.config(FINETUNE__ENABLED=tuned, TRAIN__EPOCHS=1)
            evaluate_linear(
                cfg, weights, images, f"{folder}/{tuned}", process, say=lambda line: None
            )
        evaluate_knn(
            KnnSettings((5,), size=16), weights, images, None, process, num_workers=0,
            say=lambda line: None,
        )  # fmt: skip
        last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        NaiveSyncBatchNorm2d(3).train()(last.requires_grad_()).sum().backward()
    assert seen.calls
    return list(seen.violations)


def test_collectives_of_evaluations_and_of_the_detectors_norm(image_folder, tmp_path):
    import linear_runs

    args = str(image_folder), linear_runs.write_weights(tmp_path), str(tmp_path / "out")
    assert in_processes(_evaluations_and_detector, tmp_path, *args) == [[], []]


def _wrong_tensors(rank: int) -> list[str]:
    with nccl_rules.watch() as seen:
        dist.all_reduce(torch.zeros(2, dtype=torch.int16).to(torch.int32))
        wide = torch.zeros(4, 4)[:, ::2]
        with torch.inference_mode():
            frozen = torch.zeros(3)
        for tensor in (wide, frozen, torch.zeros(2, dtype=torch.complex64)):
            seen.look_at("all_reduce", tensor)
    return [one.split(" at ")[0] for one in seen.violations]


def test_negative_control_wrong_tensors_are_seen(tmp_path):
    wanted = [
        "all_reduce: strides (4, 2)", "all_reduce: an inference tensor",
        "all_reduce: torch.complex64",
    ]  # fmt: skip
    assert in_processes(_wrong_tensors, tmp_path) == [wanted, wanted]
