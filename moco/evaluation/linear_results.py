"""The results of linear classification and fine-tuning: last epoch first, the best named apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moco.cfgnode import CfgNode
from moco.evaluation.results import (
    describe_data,
    describe_weights,
    markdown_table,
    versions,
    write_results,
)

if TYPE_CHECKING:
    from moco.evaluation.linear import LinearTrainer

METRIC = "top-1 and top-5 accuracy in percent, last epoch"


def labels_in_words(data: CfgNode) -> str:
    if data.LABELS_LIST:
        return f"the images of {data.LABELS_LIST}"
    if data.LABELS_FRACTION < 1:
        return f"{100 * data.LABELS_FRACTION:g} % of the labels (seed {data.LABELS_SEED})"
    return "all labels"


def protocol(cfg: CfgNode) -> str:
    """What was done, in a line."""
    kind = (
        "fine-tuning of backbone and linear classifier"
        if cfg.FINETUNE.ENABLED
        else "linear classification, frozen backbone in eval mode"
    )
    return f"{kind}, random resized crop and flip, {labels_in_words(cfg.DATA)}"


def collect(trainer: LinearTrainer) -> dict:
    """The content of results.json, of a finished run.

    Raises: CheckpointError where a frozen backbone has changed.
    """
    cfg, progress = trainer.cfg, trainer.progress
    last = progress.curve[-1]
    best = max(progress.curve, key=lambda record: record["top1"])  # the first of equals
    frozen = None if cfg.FINETUNE.ENABLED else trainer.check_backbone()
    return {
        "engine": "fine-tuning" if cfg.FINETUNE.ENABLED else "linear classification",
        "protocol": protocol(cfg),
        "versions": versions(trainer.process),
        "config_digest": trainer.identity.config_digest,
        "config": trainer.identity.config,
        **describe_data(trainer.source, trainer.test),
        "metric": METRIC,
        "weights": describe_weights(trainer.weights),
        "seed": cfg.SEED,
        "num_processes": trainer.process.world_size,
        "seconds": round(progress.seconds, 1),
        "status": "finished",
        "error": None,
        "top1": last["top1"],
        "top5": last["top5"],
        "test_loss": last["test_loss"],
        "epoch": last["epoch"],
        "best": {name: best[name] for name in ("epoch", "top1", "top5")},
        "backbone_unchanged": frozen,
        "curve": progress.curve,
    }


def write(output_dir: Path, results: dict) -> None:
    best, frozen = results["best"], results["backbone_unchanged"]
    scores = markdown_table(
        ["", "top-1", "top-5", "epoch"],
        [
            ["**last epoch** (the result)", results["top1"], results["top5"], results["epoch"]],
            ["best epoch, by the test images", best["top1"], best["top5"], best["epoch"]],
        ],
    )
    proof = (
        "The backbone was trained too."
        if frozen is None
        else f"Backbone unchanged: {frozen['tensors']} of {frozen['tensors']} tensors are bit for "
        f"bit those of the weights file (sha256 {frozen['sha256'][:16]})."
    )
    curve = markdown_table(
        ["epoch", "rate", "top-1", "top-5", "test loss"],
        [
            [r["epoch"], f"{r['lr']:g}", r["top1"], r["top5"], f"{r['test_loss']:.4f}"]
            for r in results["curve"]
        ],
    )
    write_results(output_dir, results, [scores, proof, curve])


def in_words(results: dict) -> str:
    """The line at the end of a run."""
    best, frozen = results["best"], results["backbone_unchanged"]
    proof = "" if frozen is None else f"; backbone unchanged, {frozen['tensors']} tensors bitwise"
    return (
        f"top-1 {results['top1']:.2f}, top-5 {results['top5']:.2f} after epoch {results['epoch']} "
        f"(best epoch {best['epoch']}: {best['top1']:.2f}){proof}"
    )
