"""Other projects' weights files in one form: which encoder they hold, under canonical names.

Every name of a file is either mapped or dropped under a reported reason; the mapped ones are
exactly the tensors of a known network, in names and shapes. An unknown file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moco.errors import CheckpointError
from moco.training.layouts_detector import settings_of
from moco.training.layouts_file import find_source, read_weights
from moco.training.layouts_network import COUNTER, HEAD, Network, ResNet, ViT, read_network
from moco.training.layouts_table import LAYOUTS, SPELLINGS, WRAPPERS, Layout, Spelling
from moco.training.plain_content import as_plain

__all__ = [
    "COUNTER", "ENCODERS", "Backbone", "Network", "ResNet", "ViT", "find_source", "known_layouts",
    "named_tensors", "read_backbone", "read_weights", "recognise", "settings_of",
]  # fmt: skip

ENCODERS = ("query", "key")
_DROP = "--drop"  # of the command lines, as messages name it
# Number of heads of ViTs in MoCo v3 (its vits.py, and moco/models/vit.py); DeiT-S has 6.
_MOCO_V3_HEADS = {"vit_small": 12, "vit_base": 12, "vit_large": 16, "vit_huge": 16}


@dataclass(frozen=True)
class Backbone:
    """One encoder of a file, without its head.

    Attributes:
        layout, prefix: what the file is, and what the encoder's names in it begin with.
        encoder: "query" or "key".
        network: the architecture that the tensors are.
        state: canonical name -> tensor with the file's values, see `as_plain`.
        names: name in the file -> canonical name.
        dropped: reason -> names in the file. With `names` it covers the file.
        notes: lines worth printing.
    """

    layout: str
    prefix: str
    encoder: str
    network: Network
    state: dict[str, torch.Tensor]
    names: dict[str, str]
    dropped: dict[str, list[str]]
    notes: tuple[str, ...] = ()


class Recognised(NamedTuple):
    """A layout, and what stands in a file before the names of one encoder, and how those are
    spelled."""

    layout: Layout
    wrapper: str
    prefix: str  # without the wrapper
    spelling: Spelling

    @property
    def start(self) -> str:
        return self.wrapper + self.prefix

    @property
    def name(self) -> str:
        alone = self.layout.query == ("",) and not self.layout.beside
        return self.spelling.alone if alone else self.layout.name


def read_backbone(
    content: object,
    where: str = "checkpoint",
    *,
    encoder: str = "query",
    num_heads: int | None = None,
    drop: Sequence[str] = (),
) -> Backbone:
    """The backbone of an encoder in the content of a weights file.

    Args:
        where: what the content comes from, for messages.
        encoder: "query", or "key" for the momentum copy where the file has one.
        num_heads: of a ViT; None leaves it to what the file or its project says.
        drop: beginnings of names beside the encoder that may be left out though unknown.
    Raises: CheckpointError for an unknown layout, naming the first keys; a tensor that is neither
        mapped nor known to be dropped, missing, of another shape or not finite; an absent encoder;
        an entry of `drop` that nothing unknown begins with.
    """
    state = named_tensors(content, where)
    found = recognise(state, where)
    if encoder == "key":
        found = _key_encoder(state, found, where)
    if found.spelling.other_network:
        raise CheckpointError(f"{where}: {found.spelling.other_network}; give another checkpoint")
    _refuse_caffe_style(content, where)
    own: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    dropped: dict[str, list[str]] = {}
    for name, value in state.items():
        canonical = _canonical(name, found)
        if canonical is None:
            reason = _reason(name, found, encoder, where, drop)
            dropped.setdefault(reason, []).append(name)
        elif canonical.endswith(COUNTER) and not found.spelling.has_counters:
            dropped.setdefault(COUNTER, []).append(name)
        elif canonical.startswith(HEAD):
            dropped.setdefault(HEAD.rstrip("."), []).append(name)
        else:
            _check_tensor(name, canonical, value, where)
            if canonical in own:
                raise CheckpointError(f"{where}: two tensors stand for {canonical}; it is damaged")
            # Laid out alike whoever wrote them: sums of a convolution depend on it in the last bit.
            own[canonical], names[name] = as_plain(value.detach()), canonical
    unused = [start for start in drop if f"{_DROP} {start}" not in dropped]
    if unused:
        raise CheckpointError(
            f"{where}: {_DROP} {unused[0]}: no name that is unknown begins so; leave it out"
        )
    notes = _average_splits_(own, found.spelling)
    settings = settings_of(content)
    if settings is not None and found.name == "detectron2":
        notes += tuple(settings["notes"])
    arch, said_heads = _said_about(content, found, own)
    network = read_network(own, where, arch=arch, num_heads=num_heads or said_heads)
    if found.layout.cifar_stem and isinstance(network, ResNet) and network.stem == "cifar":
        raise CheckpointError(f"{where}: {found.layout.cifar_stem}; give another checkpoint")
    for name, canonical in names.items():
        if own[canonical].is_floating_point() and not torch.isfinite(own[canonical]).all():
            raise CheckpointError(f"{where}: {name!r} holds NaN or Inf; use an earlier checkpoint")
    assert len(names) + sum(map(len, dropped.values())) == len(state)
    return Backbone(
        layout=found.name,
        prefix=found.start,
        encoder=encoder,
        network=network,
        state={name: own[name] for name in network.tensor_shapes() if name in own},
        names=names,
        dropped=dropped,
        notes=notes,
    )


def named_tensors(content: object, where: str) -> dict[str, object]:
    """The names of all weights in the content of a file, with their values.

    Parts that a project keeps in separate dicts are joined: VISSL's trunk, heads and loss, DINO's
    student and teacher.
    Raises: CheckpointError where there is no dict of named tensors.
    """
    if isinstance(content, Mapping):
        vissl = _vissls_parts(content)
        if vissl:
            content = vissl
        elif all(isinstance(content.get(part), Mapping) for part in ("student", "teacher")):
            content = _joined({part: content[part] for part in ("student", "teacher")})
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f"{where}: holds no dict of named tensors; give a checkpoint of tools/pretrain.py or "
            "of a known layout (docs/CHECKPOINTS.md)"
        )
    return dict(content)


def recognise(state: Iterable[str], where: str) -> Recognised:
    """The layout of a file with these names, and its query encoder.

    Of the layouts that have an encoder there, the one that explains most names.
    Raises: CheckpointError, with the first names and the known layouts, where none has.
    """
    state = list(state)
    best: tuple[int, Recognised] | None = None
    for layout in LAYOUTS:
        for found in _encoders(state, layout, layout.query):
            unexplained = sum(
                _canonical(name, found) is None and _explain(name, found) is None for name in state
            )
            if best is None or unexplained < best[0]:
                best = unexplained, found
    if best is None:
        first = ", ".join(map(repr, state[:3])) or "none"
        raise CheckpointError(
            f"{where}: unknown layout, first keys: {first}; known layouts: {known_layouts()}; see "
            "docs/CHECKPOINTS.md"
        )
    return best[1]


def known_layouts() -> str:
    """The known layouts with a name in each, for messages."""
    return ", ".join(f"{layout.name} ({layout.example!r})" for layout in LAYOUTS)


def _encoders(
    state: Iterable[str], layout: Layout, prefixes: tuple[str, ...]
) -> Iterable[Recognised]:
    for prefix in prefixes:
        for wrapper in WRAPPERS:
            start = wrapper + prefix
            inner = {name.removeprefix(start) for name in state if name.startswith(start)}
            for spelling in SPELLINGS:
                if inner.issuperset(spelling.first):
                    yield Recognised(layout, wrapper, prefix, spelling)


def _canonical(name: str, found: Recognised) -> str | None:
    """Canonical name of a tensor of the encoder, or None where it is no tensor of it."""
    if not name.startswith(found.start):
        return None
    canonical = found.spelling.to_canonical(name.removeprefix(found.start))
    if canonical is None or canonical.partition(".")[0] not in found.spelling.parts:
        return None
    return canonical


def _explain(name: str, found: Recognised, encoder: str = "query") -> str | None:
    """What a name beside the encoder belongs to, if that is known."""
    for prefix in found.layout.query + found.layout.key:
        start = found.wrapper + prefix
        if prefix and prefix != found.prefix and name.startswith(start):
            return "key encoder" if encoder == "query" else "query encoder"
    beside = f"{name.removeprefix(found.wrapper)}."
    reasons = (why for start, why in found.layout.beside.items() if beside.startswith(f"{start}."))
    return next(reasons, None)


def _reason(
    name: str, found: Recognised, encoder: str, where: str, drop: Sequence[str]
) -> str:
    reason = _explain(name, found, encoder)
    if reason is not None:
        return reason
    inner = name.removeprefix(found.wrapper)
    for start in drop:
        if name.startswith(start) or inner.startswith(start):
            return f"{_DROP} {start}"
    beside = ", ".join(found.layout.beside) or "nothing"
    raise CheckpointError(
        f"{where}: {name!r} is neither part of the {encoder} encoder nor known to be left out; "
        f"allowed beside it in the layout {found.name}: {beside}; where the network's features do "
        f"not depend on it, add {_DROP} {inner.partition('.')[0]}, else give another checkpoint"
    )


def _key_encoder(state: Iterable[str], query: Recognised, where: str) -> Recognised:
    for found in _encoders(state, query.layout, query.layout.key):
        if found.wrapper == query.wrapper and found.prefix != query.prefix:
            return found
    looked_for = ", ".join(repr(query.wrapper + prefix) for prefix in query.layout.key)
    raise CheckpointError(
        f"{where}: holds no key encoder (layout {query.name}, looked for: {looked_for or 'none'}); "
        "take the query encoder"
    )


def _check_tensor(name: str, canonical: str, value: object, where: str) -> None:
    if not torch.is_tensor(value) or (
        not value.is_floating_point() and not canonical.endswith(COUNTER)
    ):
        raise CheckpointError(f"{where}: {name!r} is no tensor of floats; the file is damaged")


def _vissls_parts(content: Mapping) -> dict[str, object] | None:
    """Names of a VISSL checkpoint as the layout's row has them; None for another file."""
    parts: object = content
    for name in ("classy_state_dict", "base_model", "model"):
        parts = parts.get(name) if isinstance(parts, Mapping) else None
    if not isinstance(parts, Mapping):
        return None
    loss = content.get("loss")
    return _joined({**parts, "loss": loss if isinstance(loss, Mapping) else {}})


def _joined(parts: object, before: str = "", levels: int = 4) -> dict[str, object]:
    """Nested dicts and lists of tensors as one dict; names are joined by dots."""
    if isinstance(parts, Mapping) and levels:
        items = parts.items()
    elif isinstance(parts, list | tuple) and levels:
        items = enumerate(parts)
    else:
        return {before.removesuffix("."): parts}
    joined: dict[str, object] = {}
    for name, part in items:
        for full, value in _joined(part, f"{before}{name}.", levels - 1).items():
            if full in joined:
                raise CheckpointError(
                    f"checkpoint: two of its parts stand for {full!r}; it is damaged"
                )
            joined[full] = value
    return joined


def _said_about(
    content: object, found: Recognised, own: Mapping[str, torch.Tensor]
) -> tuple[str | None, int | None]:
    """Architecture and number of heads as the file says them, or the project always has them."""
    content = content if isinstance(content, Mapping) else {}
    arch, heads = content.get("arch"), content.get("num_heads")
    arch = arch if isinstance(arch, str) else None
    if re.fullmatch(r"[1-9][0-9]{0,3}", str(heads)):
        return arch, int(heads)
    if "cls_token" not in own or found.layout.name not in ("moco", "moco-v3"):
        return arch, None
    by_width = {384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge"}
    arch = arch or by_width.get(own["cls_token"].shape[-1])
    return arch, _MOCO_V3_HEADS.get(arch or "")


def _average_splits_(own: dict[str, torch.Tensor], spelling: Spelling) -> tuple[str, ...]:
    """lightly's SplitBatchNorm keeps statistics of each split, end to end, and evaluates with their
    mean (lightly/models/batchnorm.py); so does this, in place."""
    most = 1
    for name, tensor in own.items():
        norm, _, entry = name.rpartition(".")
        weight = own.get(f"{norm}.weight")
        if spelling.alone != "lightly" or not entry.startswith("running_") or weight is None:
            continue
        splits, rest = divmod(tensor.numel(), max(weight.numel(), 1))
        if splits > 1 and not rest and tensor.dim() == 1:
            own[name] = tensor.view(splits, -1).mean(0)
            most = splits
    if most == 1:
        return ()
    return (f"running statistics of {most} splits averaged, as lightly does to evaluate",)


def _refuse_caffe_style(content: object, where: str) -> None:
    """OpenMMLab's caffe style has the stride in the 1x1 convolution, which no tensor tells."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if isinstance(meta, Mapping):
        config = f"{meta.get('config', '')}{meta.get('cfg', '')}"
        if re.search(r"style['\"]?\s*[=:]\s*['\"]caffe", config):
            raise CheckpointError(
                f"{where}: its config says style='caffe': the stride is in another convolution "
                "than torchvision's; allowed: style='pytorch'"
            )
