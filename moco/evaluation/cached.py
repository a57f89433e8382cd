"""Linear classifiers with many settings on features computed once, without augmentation.

Minutes instead of a day, to find a rate or to compare checkpoints. The protocol's classifier sees
a new crop of every image in every epoch, so the two are not comparable, and results say so.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from moco import cfgnode, distributed
from moco.cfgnode import CfgNode
from moco.data.images import ImageSource
from moco.data.sampler import epoch_order
from moco.devices import send, set_arithmetic
from moco.distributed import ProcessInfo
from moco.errors import ConfigError
from moco.evaluation.classifier import Scores, count_correct, new_classifier
from moco.evaluation.config import DIGEST_EXCLUDE
from moco.evaluation.feature_store import FeatureStore
from moco.evaluation.features import RateLines, encoder_function
from moco.evaluation.linear import learning_rate
from moco.evaluation.linear_data import choose_labels, pixel_statistics
from moco.evaluation.linear_results import labels_in_words
from moco.evaluation.results import (
    describe_data,
    describe_weights,
    markdown_table,
    versions,
    write_results,
)
from moco.evaluation.splits import find_splits, splits_in_words
from moco.evaluation.weights import Pretrained, read_pretrained

PROTOCOL = "linear classification on cached features, no augmentation"
_IN_FEATURES = ("SIZE", "RESIZE", "MEAN", "STD", "BACKEND")  # of DATA; what features depend on


@dataclass(frozen=True)
class Setting:
    """One classifier of the sweep."""

    lr: float
    weight_decay: float


def train_classifiers(
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    settings: list[Setting],
    cfg: CfgNode,
    *,
    num_classes: int,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> list[Scores | None]:
    """Train one linear classifier a setting, all at once on the same batches, by SGD.

    They are the rows of one matrix, so a batch is read once for all of them. Initial weights,
    batches and schedule are those of the protocol, and each classifier's updates are torch's SGD.

    Args:
        train, test: (features [N, D], labels int64 [N]) on the CPU.
    Returns: scores of the last epoch, None for a setting that diverged.
    """
    (features, labels), options = train, cfg.TRAIN
    features, labels = _on_device(features, device), labels.to(device)
    num, width = features.shape
    start = new_classifier(width, num_classes, options.INIT_STD, cfg.SEED).to(device)
    weight_SCD = start.weight.detach().repeat(len(settings), 1, 1)
    bias_SC = start.bias.detach().repeat(len(settings), 1)
    tensors = [weight_SCD.requires_grad_(), bias_SC.requires_grad_()]
    velocities = [torch.zeros_like(tensor) for tensor in tensors]
    decay_S = torch.tensor([setting.weight_decay for setting in settings], device=device)
    rate = RateLines("training on cached features", num * options.EPOCHS, say)
    for epoch in range(options.EPOCHS):
        rates = [learning_rate(setting.lr, epoch, options) for setting in settings]
        rate_S = torch.tensor(rates, device=device)
        for index in epoch_order(num, cfg.SEED, epoch).split(options.BATCH_SIZE):
            batch_BD = _rows(features, index, device, cfg.CACHED.NORMALIZE)
            label_B = labels[send(index, device)].repeat_interleave(len(settings))
            loss = F.cross_entropy(_logits(batch_BD, *tensors).flatten(0, 1), label_B)
            # The mean runs over batch and settings, that of one setting over the batch alone.
            gradients = torch.autograd.grad(loss * len(settings), tensors)
            _sgd_(tensors, gradients, velocities, rate_S, decay_S, options.SGD_MOMENTUM)
            rate.add(len(index))
    return _scores(test, *tensors, cfg, device)


def _on_device(features: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the GPU where there is room for it, else where it is."""
    if device.type != "cuda":
        return features
    free, _ = torch.cuda.mem_get_info(device)
    needed = features.numel() * features.element_size()
    return features.to(device) if needed < 0.7 * free else features.pin_memory()


def _rows(features, index: torch.Tensor, device: torch.device, unit: bool) -> torch.Tensor:
    rows = send(features[send(index, features.device)], device).float()
    return F.normalize(rows, dim=1) if unit else rows


def _logits(batch_BD: torch.Tensor, weight_SCD: torch.Tensor, bias_SC: torch.Tensor):
    settings, classes, width = weight_SCD.shape
    flat = F.linear(batch_BD, weight_SCD.view(-1, width), bias_SC.view(-1))
    return flat.view(-1, settings, classes)


@torch.no_grad()
def _sgd_(tensors, gradients, velocities, rate_S, decay_S, momentum: float) -> None:
    """torch.optim.SGD with each setting's own rate and decay: v <- momentum v + (g + decay w),
    w <- w - rate v. (There v starts as the first g, which is the same as from 0.)"""
    for values, gradient, velocity in zip(tensors, gradients, velocities, strict=True):
        each = (-1, *[1] * (values.dim() - 1))
        velocity.mul_(momentum).add_(gradient).addcmul_(values, decay_S.view(each))
        values.sub_(velocity * rate_S.view(each))


@torch.no_grad()
def _scores(test, weight_SCD, bias_SC, cfg: CfgNode, device) -> list[Scores | None]:
    features, labels = test
    found = []
    for index in torch.arange(len(features)).split(cfg.EVAL.BATCH_SIZE):
        label_B = send(labels[index], device)
        logits_BSC = _logits(
            _rows(features, index, device, cfg.CACHED.NORMALIZE), weight_SCD, bias_SC
        )
        of_settings = []
        for logits_BC in logits_BSC.unbind(1):
            loss = F.cross_entropy(logits_BC, label_B, reduction="sum")
            of_settings.append(torch.cat([count_correct(logits_BC, label_B), loss[None]]))
        found.append(torch.stack(of_settings))
    counts = torch.zeros(len(weight_SCD), 3, dtype=torch.float64)
    for of_batch in torch.stack(found).cpu().double():
        counts += of_batch
    num = len(features)
    return [
        Scores(100 * top1 / num, 100 * top5 / num, loss / num, num) if loss == loss else None
        for top1, top5, loss in counts.tolist()
    ]


def evaluate_cached(
    cfg: CfgNode,
    weights: str | Pretrained,
    data_dir: str,
    output_dir: str | Path,
    process: ProcessInfo,
    *,
    test_dir: str | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> dict | None:
    """Features of both splits, kept in `output_dir`/features, then the sweep over CACHED.LRS and
    CACHED.WEIGHT_DECAYS; writes results.json and results.md.

    Features that are there already are used; `resume` is taken for granted. All processes extract,
    the first alone trains.

    Returns: the content of results.json; None on the other processes.
    Raises: MocoError for what the user gave.
    """
    if cfg.FINETUNE.ENABLED:
        raise ConfigError(
            "FINETUNE.ENABLED is True with --cached-features: cached features cannot be "
            "fine-tuned; leave one of them out"
        )
    started, output_dir = time.monotonic(), Path(output_dir)
    weights = read_pretrained(weights) if isinstance(weights, str) else weights
    for note in weights.notes:
        say(note)
    train, test = find_splits(data_dir, test_dir, weights.decoding)
    whole, train = train, choose_labels(train, cfg.DATA)
    say(f"{PROTOCOL}: {splits_in_words(whole, train, test)}; {weights.path} ({weights.arch})")
    stores = _fill_stores(cfg, weights, train, test, output_dir, process, say)
    distributed.barrier()
    if not process.is_main:
        return None
    settings = [
        Setting(lr, decay)
        for lr, decay in itertools.product(cfg.CACHED.LRS, cfg.CACHED.WEIGHT_DECAYS)
    ]
    scores = train_classifiers(
        stores[0].load(),
        stores[1].load(),
        settings,
        cfg,
        num_classes=len(train.class_names),
        device=process.device,
        say=say,
    )
    results = _results(cfg, weights, train, test, process, settings, scores)
    results["seconds"] = round(time.monotonic() - started, 1)
    _write(output_dir, results)
    best = results["best"]
    say(
        f"{PROTOCOL}: best of {len(settings)} settings, by the test images: top-1 "
        f"{results['top1']:.2f} with lr {best['lr']:g}, weight decay {best['weight_decay']:g}"
        if best
        else f"{PROTOCOL}: all {len(settings)} settings diverged"
    )
    return results


def _fill_stores(cfg, weights, train, test, output_dir, process, say) -> list[FeatureStore]:
    encoder = weights.build_encoder(image_size=cfg.DATA.SIZE)
    memory_format = torch.channels_last if cfg.TRAIN.CHANNELS_LAST else torch.contiguous_format
    encoder.to(process.device, memory_format=memory_format)
    set_arithmetic(process.device)
    encode = encoder_function(encoder, "backbone", amp=cfg.TRAIN.AMP)
    mean, std = pixel_statistics(cfg, weights)
    stores = []
    for split, source in (("train", train), ("test", test)):
        store = FeatureStore(
            output_dir / "features",
            split,
            source,
            _identity(cfg, weights, source),
            dtype=getattr(torch, cfg.CACHED.DTYPE),
        )
        store.fill(
            encode,
            process,
            size=cfg.DATA.SIZE,
            resize=cfg.DATA.RESIZE or None,
            batch_size=cfg.EVAL.BATCH_SIZE,
            num_workers=cfg.DATA.NUM_WORKERS,
            mean=mean,
            std=std,
            channels_last=cfg.TRAIN.CHANNELS_LAST,
            backend=cfg.DATA.BACKEND,
            say=say,
        )
        stores.append(store)
    return stores


def _identity(cfg: CfgNode, weights: Pretrained, source: ImageSource) -> str:
    names = [*source.paths, weights.digest(), cfg.CACHED.DTYPE, str(cfg.TRAIN.AMP)]
    names += [str(tuple(v) if isinstance(v, list) else v) for v in map(cfg.DATA.get, _IN_FEATURES)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _results(cfg, weights, train, test, process, settings, scores) -> dict:
    rows = [
        {
            "lr": setting.lr,
            "weight_decay": setting.weight_decay,
            "top1": None if found is None else found.top1,
            "top5": None if found is None else found.top5,
            "test_loss": None if found is None else found.loss,
        }
        for setting, found in zip(settings, scores, strict=True)
    ]
    finished = [row for row in rows if row["top1"] is not None]
    best = max(finished, key=lambda row: row["top1"], default=None)
    return {
        "engine": "linear classification on cached features",
        "protocol": f"{PROTOCOL}, {labels_in_words(cfg.DATA)}",
        "versions": versions(process),
        "config_digest": cfgnode.digest(cfg, DIGEST_EXCLUDE),
        "config": cfgnode.to_dict(cfg),
        **describe_data(train, test),
        "metric": "top-1 and top-5 accuracy in percent, last epoch of the setting that is best "
        "on the test images",
        "weights": describe_weights(weights),
        "seed": cfg.SEED,
        "num_processes": process.world_size,
        "status": "finished",
        "error": None,
        "normalized": cfg.CACHED.NORMALIZE,
        "feature_dtype": cfg.CACHED.DTYPE,
        "top1": best and best["top1"],
        "top5": best and best["top5"],
        "best": best,
        "sweep": rows,
    }


def _write(output_dir: Path, results: dict) -> None:
    table = markdown_table(
        ["rate", "weight decay", "top-1", "top-5", "test loss"],
        [
            [f"{r['lr']:g}", f"{r['weight_decay']:g}", r["top1"], r["top5"], r["test_loss"]]
            for r in results["sweep"]
        ],
    )
    note = (
        f"**{results['protocol']}**: not comparable with the protocol's linear classification. "
        f"Features {'of unit length' if results['normalized'] else 'as they are'}, stored as "
        f"{results['feature_dtype']}. A dash: diverged."
    )
    write_results(output_dir, results, [note, table])
