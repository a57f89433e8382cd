"""How other projects' files name an encoder: a table of facts, each with the file it was read from.

A name in a file is wrapper + prefix + inner name. The wrapper is DistributedDataParallel's or
torch.compile's, the prefix says which encoder (`LAYOUTS`), the inner name which tensor
(`SPELLINGS`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from moco.training.layouts_network import HEAD

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_RESNET = ("conv1", "bn1", *_STAGES, HEAD.rstrip("."))
_VIT = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm", HEAD.rstrip("."))
WRAPPERS = ("module.", "", "_orig_mod.", "module._orig_mod.")


class Layout(NamedTuple):
    """Where a project keeps its encoders.

    example: a name in such a file. query, key: prefixes of the encoder that is trained by gradient
    and of its momentum copy, the first that fits counts. beside: beginnings of all other names ->
    what they are. cifar_stem: why a network with a 3x3 first convolution is another one there.
    """

    name: str
    example: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    beside: Mapping[str, str]
    cifar_stem: str = ""


class Spelling(NamedTuple):
    """How a project calls a network's tensors.

    alone: name of the layout of a file that holds nothing else. first: inner names that only this
    spelling has together. parts: first parts of canonical names. to_canonical: an inner name ->
    canonical name, head included; None where the spelling has no such name. other_network: why the
    tensors, though of the same shapes, are another network's. has_counters: whether batch counters
    are read; frozen norms have none.
    """

    alone: str
    first: Collection[str]
    parts: Collection[str]
    to_canonical: Callable[[str], str | None]
    other_network: str = ""
    has_counters: bool = True


def _of_generator(inner: str) -> str:
    return re.sub(r"^linear\.", HEAD, inner).replace(".shortcut.", ".downsample.")


def _of_numbered(inner: str) -> str | None:
    """Of `nn.Sequential(*resnet.children())`: positions for names, 2 and 3 have no tensors."""
    number, _, rest = inner.partition(".")
    child = dict(zip("014567", ("conv1", "bn1", *_STAGES), strict=True)).get(number)
    return child and f"{child}.{rest}"


_HUGGING_FACE = re.compile(
    r"(?:embedder\.embedder|encoder\.stages\.(?P<stage>[0-3])\.layers\.(?P<block>[0-9]{1,4})\."
    r"(?:shortcut|layer\.(?P<unit>[0-2])))\.(?P<kind>convolution|normalization)\.(?P<entry>\w+)"
)


def _of_hugging_face(inner: str) -> str | None:
    match = _HUGGING_FACE.fullmatch(inner)
    if match is None:
        return None
    is_norm, entry = match["kind"] == "normalization", match["entry"]
    at = "" if match["stage"] is None else f"layer{int(match['stage']) + 1}.{match['block']}."
    if at and match["unit"] is None:
        return f"{at}downsample.{int(is_norm)}.{entry}"
    return f"{at}{'bn' if is_norm else 'conv'}{int(match['unit'] or 0) + 1}.{entry}"


_DETECTRON2 = re.compile(
    r"(?:stem|res(?P<stage>[2-5])\.(?P<block>[0-9]{1,4}))\."
    r"(?P<unit>conv[123]|shortcut)\.(?P<norm>norm\.)?(?P<entry>\w+)"
)


def _of_detectron2(inner: str) -> str | None:
    """A converted backbone's names; a detector has them behind `backbone.` and `roi_heads.`."""
    match = _DETECTRON2.fullmatch(re.sub(r"^(backbone\.(?!res5)|roi_heads\.(?=res5))", "", inner))
    if match is None:
        return None
    at = "" if match["stage"] is None else f"layer{int(match['stage']) - 1}.{match['block']}."
    if match["unit"] == "shortcut":
        return f"{at}downsample.{1 if match['norm'] else 0}.{match['entry']}"
    return f"{at}{'bn' if match['norm'] else 'conv'}{match['unit'][-1]}.{match['entry']}"


SPELLINGS = (
    # lightly-ai/lightly, lightly/models/resnet.py: a CIFAR stem, and two names that differ.
    Spelling("lightly", {"conv1.weight", "layer2.0.shortcut.0.weight"}, _RESNET, _of_generator),
    Spelling("torchvision", {"conv1.weight"}, _RESNET, lambda name: name),
    # lightly's examples: nn.Sequential(*list(resnet.children())[:-1]).
    Spelling("lightly", {"0.weight", "7.0.conv1.weight"}, _RESNET, _of_numbered),
    # The same of lightly's own ResNet (examples/pytorch_lightning/smog.py, its CIFAR benchmark).
    Spelling(
        "lightly",
        {"0.weight", "2.0.conv1.weight"},
        _RESNET,
        lambda name: None,
        "the children of lightly's ResNetGenerator in nn.Sequential are a network without the ReLU "
        "after bn1, which is a function there; no ResNet of torchvision's gives its features",
    ),
    # huggingface/transformers, models/resnet/modeling_resnet.py.
    Spelling(
        "huggingface",
        {"embedder.embedder.convolution.weight"},
        _RESNET,
        _of_hugging_face,
    ),
    # facebookresearch/detectron2, modeling/backbone/resnet.py, modeling/roi_heads/roi_heads.py
    # (Res5ROIHeads); here detection/keymap.py and the embedded engine.
    Spelling(
        "detectron2",
        {"stem.conv1.weight", "res5.0.conv1.weight"},
        _RESNET,
        _of_detectron2,
        has_counters=False,
    ),
    Spelling(
        "detectron2",
        {"backbone.stem.conv1.weight", "roi_heads.res5.0.conv1.weight"},
        _RESNET,
        _of_detectron2,
        has_counters=False,
    ),
    # timm/models/vision_transformer.py; moco-v3's vits.py derives from it. Our own ViT calls the
    # head `fc`, theirs is `head`.
    Spelling(
        "timm",
        {"cls_token", "patch_embed.proj.weight"},
        _VIT,
        lambda name: re.sub(r"^head\.", HEAD, name),
    ),
)


def _beside(*names: str, **described: str) -> Mapping[str, str]:
    """Beginnings of names, without the dot -> description; `names` describe themselves."""
    return MappingProxyType({**{name: name for name in names}, **described})


_ONCE_MORE = "query encoder once more, with its neck"
_OF_SOLO_LEARN = _beside(
    "projector", "momentum_projector", "predictor", "predictor2", "classifier",
    "momentum_classifier", "prototypes", "head", "momentum_head", "queue", "queue_y", "queue_ptr",
    "queue_index", "local_memory_index", "local_memory_embeddings", "dino_loss_func",
    "transformer_encoder", "pos_enc", "whitening",
)  # fmt: skip

_SOLO_LEARNS_CIFAR_STEM = (  # solo/methods/base.py
    "solo-learn pads its 3x3 first convolution (CIFAR) by 2 pixels, other ResNets by 1, so its "
    "features are another network's"
)

# fmt: off
# Of two layouts that explain a file equally well the first is taken.
LAYOUTS = (
    # facebookresearch/moco, moco/builder.py; and tools/pretrain.py here. Lightning-Bolts,
    # pl_bolts/models/self_supervised/moco/moco_module.py, adds a queue for validation.
    Layout(
        "moco",
        "module.encoder_q.conv1.weight",
        ("encoder_q.",),
        ("encoder_k.",),
        _beside(
            "predictor", "queue", "queue_ptr", "val_queue", "val_queue_ptr", bank="memory bank"
        ),
    ),
    # ServiceNow/seasonal-contrast, models/moco2_module.py: numbered children, a head a subspace.
    Layout(
        "seco",
        "encoder_q.0.weight",
        ("encoder_q.",),
        ("encoder_k.",),
        _beside("heads_q", "heads_k", "queue", "queue_ptr"),
    ),
    # facebookresearch/moco-v3, moco/builder.py.
    Layout(
        "moco-v3",
        "module.base_encoder.conv1.weight",
        ("base_encoder.",),
        ("momentum_encoder.",),
        _beside("predictor"),
    ),
    # facebookresearch/vissl: vissl/models/trunks/resnext.py, models/base_ssl_model.py
    # (get_classy_state), hooks/log_hooks.py (the file), hooks/moco_hooks.py, losses/moco_loss.py.
    # `named_tensors` in layouts.py joins the file's parts under these names.
    Layout(
        "vissl",
        "classy_state_dict.base_model.model.trunk._feature_blocks.conv1.weight",
        ("trunk._feature_blocks.", "trunk.base_model._feature_blocks.", "_feature_blocks."),
        ("loss.moco_encoder.trunk._feature_blocks.",),
        _beside("heads", loss="loss: queue, and heads of the key encoder"),
    ),
    # facebookresearch/dino: main_dino.py (the file), utils.py (MultiCropWrapper).
    Layout(
        "dino",
        "student.module.backbone.conv1.weight",
        ("student.module.backbone.", "student.backbone."),
        ("teacher.module.backbone.", "teacher.backbone."),
        _beside("student.module.head", "student.head", "teacher.module.head", "teacher.head"),
    ),
    # A backbone without anything beside it.
    Layout("backbone", "backbone.conv1.weight", ("backbone.",), (), _beside()),
    # open-mmlab/mmselfsup 1.x and mmpretrain, models/selfsup/{moco,mocov3,byol}.py, with
    # mmengine/model/averaged_model.py (`module`, `steps`); mmselfsup 0.x and OpenSelfSup, whose
    # `backbone` is the same module as `encoder_q.0`, `base_encoder.0` or `online_net.0`.
    Layout(
        "mmselfsup",
        "backbone.conv1.weight",
        ("backbone.",),
        (
            "encoder_k.module.0.", "momentum_encoder.module.0.", "target_net.module.0.",
            "encoder_k.0.", "momentum_encoder.0.", "target_net.0.",
        ),
        _beside(
            "neck", "head", "queue", "queue_ptr", "queue2", "queue2_ptr", "memory_bank",
            "target_generator", "data_preprocessor",
            encoder_q=_ONCE_MORE, base_encoder=_ONCE_MORE, online_net=_ONCE_MORE,
            encoder_k="rest of the key encoder", momentum_encoder="rest of the key encoder",
            target_net="rest of the key encoder",
        ),
    ),
    # lightly-ai/lightly: examples/pytorch_lightning/{moco,byol,simclr,dino,...}.py (numbered
    # children), benchmarks/imagenet/resnet50/{mocov2,byol,dino,...}.py (torchvision's names).
    Layout(
        "lightly",
        "backbone.0.weight",
        ("student_backbone.", "backbone."),
        ("backbone_momentum.", "key_backbone.", "teacher_backbone.", "backbone."),
        _beside(
            "projection_head", "projection_head_momentum", "prediction_head",
            "key_projection_head", "teacher_projection_head", "student_projection_head",
            "projection_head_global", "projection_head_local", "projection_head_global_momentum",
            "projection_head_local_momentum", "student_head", "teacher_head", "prototypes", "smog",
            "memory_bank", "criterion", "criterion_global", "criterion_local",
            "online_classifier", "knn_classifier", "queues",
        ),
    ),
    # vturrisi/solo-learn: solo/methods/{base,mocov2plus,mocov3,byol,swav,dino,...}.py.
    Layout(
        "solo-learn",
        "backbone.conv1.weight",
        ("backbone.",),
        ("momentum_backbone.",),
        _OF_SOLO_LEARN,
        _SOLO_LEARNS_CIFAR_STEM,
    ),
    # facebookresearch/barlowtwins, main.py: `checkpoint.pth`, with the projector.
    Layout(
        "barlowtwins",
        "module.backbone.conv1.weight",
        ("backbone.",),
        (),
        _beside("projector", bn="norm of the projections"),
    ),
    # facebookresearch/simsiam, simsiam/builder.py.
    Layout("simsiam", "module.encoder.conv1.weight", ("encoder.",), (), _beside("predictor")),
    # solo-learn up to release 1.0.2: `encoder` for `backbone`.
    Layout(
        "solo-learn, old",
        "encoder.conv1.weight",
        ("encoder.",),
        ("momentum_encoder.",),
        _OF_SOLO_LEARN,
        _SOLO_LEARNS_CIFAR_STEM,
    ),
    # zdaxie/PixPro, contrast/models/PixPro.py, main_pretrain.py; its base models name it so, too.
    Layout(
        "pixpro",
        "module.encoder.conv1.weight",
        ("encoder.",),
        ("encoder_k.",),
        _beside(
            "projector", "projector_k", "projector_instance", "projector_instance_k", "predictor",
            "value_transform",
        ),
    ),
    # huggingface/transformers, ResNetForImageClassification; ResNetModel alone is below.
    Layout(
        "huggingface",
        "resnet.embedder.embedder.convolution.weight",
        ("resnet.",),
        (),
        _beside("classifier"),
    ),
    # A network alone: torchvision, timm, and what other projects' own converters extract. Such a
    # file's layout is called as its spelling (`Spelling.alone`).
    Layout("torchvision", "conv1.weight", ("",), (), _beside()),
    # facebookresearch/swav, src/resnet50.py. Its padding is a layer; the sums are the same.
    Layout("swav", "module.conv1.weight", ("",), (), _beside("projection_head", "prototypes")),
    # facebookresearch/detectron2 and detection/train_net.py here: a detector's model_final.pth;
    # tools/convert_to_d2.py and moco's own converter, which keeps the head as `stem.fc`.
    Layout(
        "detectron2",
        "backbone.stem.conv1.weight",
        ("",),
        (),
        _beside(
            "pixel_mean", "pixel_std",
            **{
                "proposal_generator": "region proposals",
                "roi_heads.box_predictor": "box predictor",
                "roi_heads.mask_head": "mask head",
                "roi_heads.res5.norm": "norm after res5, which features do not pass",
                "stem.fc": "classifier or projection head",
            },
        ),
    ),
)
# fmt: on
