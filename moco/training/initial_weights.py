"""MODEL.WEIGHTS: a run that starts from the encoder of a weights file instead of a random one.

Any file that `moco.training.layouts` reads will do. The query encoder is taken, and of MoCo's own
files the projection head and MoCo v3's predictor where they fit; the key encoder is a copy, as at
every start, and queue, bank and optimizer are fresh.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from moco import distributed
from moco.cfgnode import CfgNode
from moco.errors import CheckpointError
from moco.methods import Method
from moco.training.checkpoint import sha256_of
from moco.training.image_record import ImageRecord, Unknown, record_of
from moco.training.layouts import (
    COUNTER,
    HEAD,
    Backbone,
    ViT,
    find_source,
    named_tensors,
    read_backbone,
    read_weights,
)

KEY = "MODEL.WEIGHTS"
_WITH_HEAD = ("moco", "moco-v3")  # layouts whose `fc` is a projection head, not a classifier
_PREDICTOR = "predictor."
_VIT_HEADS = 12  # of this project's ViTs, whatever their width


@dataclass(frozen=True)
class Record:
    """What a run keeps of the file it started from, in its checkpoints and their manifests.

    Attributes:
        given: MODEL.WEIGHTS as it was written; file: the file it stood for.
        sha256, layout: of the file. taken: part -> number of tensors.
    """

    given: str
    file: str
    sha256: str
    layout: str
    taken: dict[str, int]


@dataclass
class Start:
    """Where a run's encoders began.

    Attributes:
        record: a `Record` as a dict, None where they began at random.
        images: on rank 0 of a run that begins, which images the file's weights have seen.
    """

    record: dict | None = None
    images: ImageRecord | Unknown | None = None


@dataclass(frozen=True)
class InitialWeights:
    """The tensors of a file under a method's names, which they fit in number and shape.

    images: which images they have seen. lines: what was taken, what was not and why.
    """

    record: Record
    images: ImageRecord | Unknown
    tensors: dict[str, torch.Tensor] = field(repr=False)
    lines: tuple[str, ...]

    @torch.no_grad()
    def copy_to(self, method: Method) -> None:
        """Write the tensors to the method's encoder, and the encoder to its key encoder."""
        state = method.state_dict()
        for name, tensor in self.tensors.items():
            state[name].copy_(tensor)
        if getattr(method, "encoder_k", None) is not None:
            method.encoder_k.load_state_dict(method.encoder_q.state_dict())


def start_from_weights(cfg: CfgNode, method: Method, say: Callable[[str], None]) -> Start:
    """Begin with what MODEL.WEIGHTS names, if anything; what was taken is said.

    The file is read on rank 0, whose state the others are given before training.
    Raises: CheckpointError, on all ranks, as `read_initial_weights`.
    """
    start = Start()

    def load() -> None:
        initial = read_initial_weights(cfg, method)
        initial.copy_to(method)
        start.record, start.images = asdict(initial.record), initial.images
        for line in initial.lines:
            say(line)

    if cfg.MODEL.WEIGHTS:
        distributed.on_main(load)
    return start


def read_initial_weights(cfg: CfgNode, method: Method) -> InitialWeights:
    """The weights that MODEL.WEIGHTS names, for `method`.

    Args:
        method: of this configuration; on the meta device it will do.
    Raises: CheckpointError for a file that is missing, damaged or of an unknown layout, or whose
        network, pixel mean or std is not the configuration's.
    """
    given = cfg.MODEL.WEIGHTS
    file, refused = find_source(os.path.expanduser(given))
    where = f"{KEY} {file}"
    content = read_weights(file)
    found = read_backbone(content, where)
    own = method.state_dict()
    _check_network(cfg, found, own, where)
    _check_pixels(cfg, content, where)
    encoder = {f"encoder_q.{name}": tensor for name, tensor in found.state.items()}
    head, why_no_head = _head(content, found, own, where)
    tensors, counts = {**encoder}, {"encoder": _count(encoder)}
    words = [f"encoder: {_count(encoder)} tensors of {file} ({found.layout})"]
    for part, prefix in (("head", f"encoder_q.{HEAD}"), ("predictor", _PREDICTOR)):
        needed = {name for name in own if name.startswith(prefix)}
        if not needed:
            continue
        given_part = {name: tensor for name, tensor in head.items() if name.startswith(prefix)}
        reason = _misfit(given_part, own, needed, where) if given_part else why_no_head
        if reason:
            words.append(f"{part}: {reason}, initialised")
            continue
        tensors.update(given_part)
        counts[part] = _count(given_part)
        words.append(f"{part}: {_count(given_part)} tensors of the same file")
    fresh = [name for name in ("queue", "bank") if name in own]
    words += [f"{' and '.join(fresh)}: fresh"] if fresh else []
    left_out = {why: len(names) for why, names in found.dropped.items()}
    for part in counts.keys() & {"head", "predictor"}:
        why = HEAD.rstrip(".") if part == "head" else part
        left_out[why] = left_out.get(why, 0) - sum(n.startswith(_prefix(part)) for n in tensors)
    listed = ", ".join(f"{why} ({number})" for why, number in left_out.items() if number > 0)
    lines = [f"refused: {reason}" for _, reason in refused]
    lines.append(f"{KEY}: {'; '.join(words)}; left out: {listed or 'nothing'}")
    lines += [f"{KEY}: {note}" for note in found.notes]
    record = Record(given, str(file), sha256_of(file), found.layout, counts)
    return InitialWeights(record, record_of(file, content), tensors, tuple(lines))


def is_record(value: object) -> bool:
    """Whether a checkpoint's value is a `Record` as a dict, as far as it is read."""
    names = ("given", "file", "sha256")
    return isinstance(value, Mapping) and all(isinstance(value.get(n), str) for n in names)


def weights_difference(given: str, record: Mapping | None) -> tuple[object, object] | None:
    """(then, now) where MODEL.WEIGHTS is not the file a run started from, by its content.

    A run that continues reads its checkpoint, so the file may be gone: then its path tells. A
    folder of a run stands for the checkpoint that was its newest when the run started.

    Args:
        given: MODEL.WEIGHTS now. record: of the checkpoint, a `Record` as a dict; None without one.
    """
    if not given and not record:
        return None
    if not record:
        return "", given
    then = f"{record['given']} (sha256 {record['sha256'][:16]})"
    if not given:
        return then, ""
    path = Path(os.path.expanduser(given))
    if given == record["given"] and (path.is_dir() or not path.exists()):
        path = Path(record["file"])
        if not path.is_file():
            return None
    if path.is_dir():
        path = find_source(path)[0]
    if not path.is_file():
        return then, f"{given} (there is no such file)"
    sha256 = _sha256_of(str(path), path.stat().st_mtime_ns)
    return None if sha256 == record["sha256"] else (then, f"{given} (sha256 {sha256[:16]})")


@functools.lru_cache(maxsize=1)
def _sha256_of(path: str, changed_ns: int) -> str:
    return sha256_of(path)


def _prefix(part: str) -> str:
    return f"encoder_q.{HEAD}" if part == "head" else _PREDICTOR


def _count(tensors: Mapping[str, object]) -> int:
    """Weights and statistics; the counters of batches, which nothing reads, are not counted."""
    return sum(not name.endswith(COUNTER) for name in tensors)


def _check_network(
    cfg: CfgNode, found: Backbone, own: Mapping[str, torch.Tensor], where: str
) -> None:
    network, model = found.network, cfg.MODEL
    backbone = {
        name.removeprefix("encoder_q."): tensor.shape
        for name, tensor in own.items()
        if name.startswith("encoder_q.") and not name.startswith(f"encoder_q.{HEAD}")
    }
    asked = f"the configuration asks for {model.ARCH}, WIDTH {model.WIDTH:g}, STEM {model.STEM}"
    if network.channels != cfg.DATA.CHANNELS:
        raise CheckpointError(
            f"{where}: takes images of {network.channels} channels, DATA.CHANNELS is "
            f"{cfg.DATA.CHANNELS}; give another file, or set DATA.CHANNELS, MEAN and STD to it"
        )
    if isinstance(network, ViT) and network.num_heads not in (None, _VIT_HEADS):
        raise CheckpointError(
            f"{where}: its {network.arch} has {network.num_heads} heads, the ViTs here have "
            f"{_VIT_HEADS}; give another file"
        )
    if isinstance(network, ViT) and network.num_heads is None:
        raise CheckpointError(
            f"{where}: does not say how many heads its {network.arch} has, and the tensors do not "
            "tell; give a checkpoint of tools/pretrain.py or of moco-v3"
        )
    missing = [n for n in backbone if n not in found.state and not n.endswith(COUNTER)]
    unknown = [name for name in found.state if name not in backbone]
    if missing or unknown:
        odd = (missing or unknown)[0]
        raise CheckpointError(
            f"{where}: holds {_named(network)}, {asked} (first difference: {odd}); set MODEL.ARCH, "
            "WIDTH and STEM to the file's, or give another file"
        )
    for name, tensor in found.state.items():
        if tensor.shape != backbone[name]:
            raise CheckpointError(
                f"{where}: holds {_named(network)}, {asked}, DATA.SIZE {cfg.DATA.SIZE}: {name} has "
                f"shape {tuple(tensor.shape)}, {tuple(backbone[name])} is needed; set these keys "
                "to the file's, or give another file"
            )


def _named(network: object) -> str:
    if isinstance(network, ViT):
        return f"{network.arch} for images of {network.image_size} pixels"
    return f"{network.arch}, WIDTH {network.planes / 64:g}, STEM {network.stem}"


def _check_pixels(cfg: CfgNode, content: object, where: str) -> None:
    """Mean and std of the pixels are part of what weights mean; a file of ours says them."""
    said = content
    for name in ("extra", "config", "DATA"):
        said = said.get(name) if isinstance(said, Mapping) else None
    for name in ("MEAN", "STD"):
        then = said.get(name) if isinstance(said, Mapping) else None
        if isinstance(then, list | tuple) and list(then) != list(cfg.DATA[name]):
            raise CheckpointError(
                f"{where}: was trained with DATA.{name} {tuple(then)}, the configuration has "
                f"{tuple(cfg.DATA[name])}; set DATA.MEAN and DATA.STD to the file's"
            )


def _head(
    content: object, found: Backbone, own: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, torch.Tensor], str]:
    """Head and predictor of the file under the method's names, and why there may be none."""
    if found.layout not in _WITH_HEAD:
        others = "fc" in found.dropped
        return {}, "the file's is a classifier" if others else "none in the file"
    tensors: dict[str, torch.Tensor] = {}
    wrapper = re.sub(r"(encoder_q|base_encoder)\.$", "", found.prefix)
    for name, tensor in named_tensors(content, where).items():
        if name.startswith(found.prefix):
            inner = re.sub(r"^head\.", HEAD, name.removeprefix(found.prefix))
            if inner.startswith(HEAD):
                tensors[f"encoder_q.{inner}"] = tensor
        elif name.startswith(wrapper + _PREDICTOR):
            tensors[name.removeprefix(wrapper)] = tensor
    return tensors, "none in the file"


def _misfit(
    given: Mapping[str, object], own: Mapping[str, torch.Tensor], needed: set[str], where: str
) -> str:
    """Why tensors are not those of the method's part, all or nothing; empty where they are."""
    absent = sorted(n for n in needed - given.keys() if not n.endswith(COUNTER))
    extra = sorted(given.keys() - needed)
    if absent or extra:
        what = f"lacks {absent[0]}" if absent else f"has {extra[0]} beside it"
        return f"the file's {what}"
    for name, tensor in given.items():
        if not torch.is_tensor(tensor) or tensor.shape != own[name].shape:
            shape = tuple(tensor.shape) if torch.is_tensor(tensor) else "no shape"
            return f"the file's {name} has {shape}, {tuple(own[name].shape)} is needed"
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: {name!r} holds NaN or Inf; use an earlier checkpoint")
    return ""
