"""Weights files as other projects write them, mapped by hand from torchvision's names.

Each builder takes the tensors of a query and of a key encoder under torchvision's (ViT: timm's)
names, and returns the content of a file. The facts are read from the file that the builder names.
"""

from __future__ import annotations

import torch
import torchvision

State = dict[str, torch.Tensor]
# Of torchvision's ResNet.children(): conv1, bn1, relu, maxpool, layer1, ..., avgpool, fc.
NUMBERS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


def narrow_resnet(arch: str = "resnet18", seed: int = 0, stem: int = 7) -> State:
    """torchvision's names; an eighth of its channels, random values, no two tensors alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        like = torchvision.models.get_model(arch).state_dict()
    state = {}
    for name, tensor in like.items():
        shape = [size // 8 if size >= 64 else size for size in tensor.shape]
        if name == "conv1.weight":
            shape[2:] = [stem, stem]
        if name.startswith("fc."):
            continue
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(len(state) + 1000 * seed)
        elif len(shape) > 1:
            scale = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
            state[name] = scale * torch.randn(shape, generator=generator)
        else:
            state[name] = 0.5 + torch.rand(shape, generator=generator)
    return state


def small_vit(seed: int = 0, dim: int = 24, depth: int = 2) -> State:
    """timm/models/vision_transformer.py, VisionTransformer: images of 32 pixels, patches of 16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "cls_token": (1, 1, dim), "pos_embed": (1, 5, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,),
    }  # fmt: skip
    for i in range(depth):
        for name, shape in (
            ("norm1.weight", (dim,)), ("norm1.bias", (dim,)),
            ("attn.qkv.weight", (3 * dim, dim)), ("attn.qkv.bias", (3 * dim,)),
            ("attn.proj.weight", (dim, dim)), ("attn.proj.bias", (dim,)),
            ("norm2.weight", (dim,)), ("norm2.bias", (dim,)),
            ("mlp.fc1.weight", (4 * dim, dim)), ("mlp.fc1.bias", (4 * dim,)),
            ("mlp.fc2.weight", (dim, 4 * dim)), ("mlp.fc2.bias", (dim,)),
        ):  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def under(prefix: str, state: State, **heads: int) -> State:
    """`state` behind `prefix`, and a tensor of that many elements for each head's name."""
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    return named | {f"{prefix}{n.replace('__', '.')}": torch.ones(k) for n, k in heads.items()}


def some(*names: str) -> State:
    return {name: torch.full((2,), float(i)) for i, name in enumerate(names)}


def moco(q: State, k: State) -> dict:
    """facebookresearch/moco: moco/builder.py (__init__), main_moco.py (save_checkpoint)."""
    state = under("module.encoder_q.", q, fc__0__weight=4, fc__0__bias=2, fc__2__weight=4)
    state |= under("module.encoder_k.", k, fc__0__weight=4, fc__0__bias=2, fc__2__weight=4)
    state |= some("module.queue", "module.queue_ptr")
    return {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}}}


def moco_v3(q: State, k: State) -> dict:
    """facebookresearch/moco-v3: moco/builder.py, main_moco.py; the last norm has no weight."""
    head = "head" if "cls_token" in q else "fc"
    heads = {f"{head}__0__weight": 4, f"{head}__1__weight": 2, f"{head}__4__running_mean": 2}
    state = under("module.base_encoder.", q, **heads)
    state |= under("module.momentum_encoder.", k, **heads)
    state |= some("module.predictor.0.weight", "module.predictor.1.running_var")
    arch = "vit_small" if "cls_token" in q else "resnet18"
    return {"epoch": 3, "arch": arch, "state_dict": state, "optimizer": {}, "scaler": {}}


def simsiam(q: State, k: State) -> dict:
    """facebookresearch/simsiam: simsiam/builder.py, main_simsiam.py."""
    state = under("module.encoder.", q, fc__0__weight=4, fc__6__bias=2, fc__7__running_mean=2)
    state |= some("module.predictor.0.weight", "module.predictor.3.bias")
    return {"epoch": 1, "arch": "resnet18", "state_dict": state, "optimizer": {}}


def solo_learn(q: State, k: State) -> dict:
    """vturrisi/solo-learn 1.0.3 and later: solo/methods/base.py, mocov2plus.py, in Lightning."""
    state = some("queue", "queue_ptr") | under("backbone.", q)
    state |= some("classifier.weight", "classifier.bias") | under("momentum_backbone.", k)
    state |= some("momentum_classifier.weight", "projector.0.weight", "momentum_projector.2.bias")
    return {"epoch": 1, "global_step": 7, "pytorch-lightning_version": "2.1.2", "state_dict": state}


def solo_learn_old(q: State, k: State) -> dict:
    """vturrisi/solo-learn up to 1.0.2: solo/methods/base.py calls the backbone `encoder`."""
    state = under("encoder.", q) | some("classifier.weight") | under("momentum_encoder.", k)
    state |= some("projector.0.weight", "momentum_projector.0.weight", "predictor.0.weight")
    return {"epoch": 1, "state_dict": state, "hyper_parameters": {"lr": 0.3}}


def numbered(state: State) -> State:
    """nn.Sequential(*list(resnet.children())[:-1])."""
    renamed = {}
    for name, tensor in state.items():
        child, rest = name.split(".", 1)
        renamed[f"{NUMBERS[child]}.{rest}"] = tensor
    return renamed


def lightly_example(q: State, k: State) -> dict:
    """lightly-ai/lightly: examples/pytorch_lightning/moco.py."""
    state = under("backbone.", numbered(q)) | some("projection_head.layers.0.weight")
    state |= under("backbone_momentum.", numbered(k))
    state |= some("projection_head_momentum.layers.2.bias", "criterion.memory_bank.bank")
    return {"epoch": 1, "state_dict": state}


def lightly_benchmark(q: State, k: State) -> dict:
    """lightly-ai/lightly: benchmarks/imagenet/resnet50/mocov2.py."""
    state = under("backbone.", q) | some("projection_head.layers.0.weight")
    state |= under("key_backbone.", k) | some("key_projection_head.layers.0.weight")
    state |= some("online_classifier.linear.weight", "online_classifier.linear.bias")
    return {"epoch": 1, "state_dict": state, "hyper_parameters": {"num_classes": 1000}}


def lightly_dino(q: State, k: State) -> dict:
    """lightly-ai/lightly: benchmarks/imagenet/resnet50/dino.py: `backbone` is the teacher."""
    state = under("backbone.", k) | some("projection_head.layers.0.weight")
    state |= under("student_backbone.", q) | some("student_projection_head.layers.0.weight")
    state |= some("criterion.center.center", "online_classifier.linear.weight")
    return {"epoch": 1, "state_dict": state}


def of_generator(state: State) -> State:
    """lightly-ai/lightly: lightly/models/resnet.py: `shortcut` for torchvision's `downsample`."""
    return {name.replace(".downsample.", ".shortcut."): t for name, t in state.items()}


def lightly_generator(q: State, k: State) -> dict:
    """The same file: ResNet alone, its classifier is `linear`."""
    return of_generator(q) | some("linear.weight", "linear.bias")


def vissl(q: State, k: State) -> dict:
    """facebookresearch/vissl: vissl/models/trunks/resnext.py (names), models/base_ssl_model.py
    (get_classy_state), hooks/log_hooks.py (file), hooks/moco_hooks.py (key encoder)."""
    loss = under("moco_encoder.trunk._feature_blocks.", k)
    loss |= some("moco_encoder.heads.0.clf.0.weight", "queue", "queue_ptr")
    model = {"trunk": under("_feature_blocks.", q), "heads": [some("clf.0.weight", "clf.0.bias")]}
    classy = {"train": True, "base_model": {"model": model, "meta": {}}, "optimizer": {}}
    return {"phase_idx": 3, "iteration": 9, "loss": loss, "classy_state_dict": classy}


def mmselfsup_1(q: State, k: State) -> dict:
    """open-mmlab/mmpretrain: mmpretrain/models/selfsup/moco.py (mmselfsup 1.x has the same);
    mmengine/model/averaged_model.py wraps the key encoder as `module` and counts `steps`."""
    state = some("queue", "queue_ptr") | under("backbone.", q) | some("neck.mlp.0.weight")
    state |= some("encoder_k.steps") | under("encoder_k.module.0.", k)
    state |= some("encoder_k.module.1.mlp.0.weight")
    config = "model = dict(backbone=dict(type='ResNet', depth=18, style='pytorch'))"
    return {"meta": {"epoch": 1, "cfg": config}, "state_dict": state}


def mmselfsup_0(q: State, k: State) -> dict:
    """open-mmlab/mmselfsup 0.x: mmselfsup/models/algorithms/moco.py; OpenSelfSup's
    openselfsup/models/moco.py: one module under two names."""
    state = some("queue", "queue_ptr") | under("encoder_q.0.", q) | some("encoder_q.1.mlp.0.weight")
    state |= under("encoder_k.0.", k) | some("encoder_k.1.mlp.0.weight")
    state |= under("backbone.", q) | some("neck.mlp.0.weight")
    return {"meta": {"epoch": 1}, "state_dict": state}


def dino(q: State, k: State) -> dict:
    """facebookresearch/dino: main_dino.py (save_dict), utils.py (MultiCropWrapper)."""
    student = under("module.backbone.", q) | some("module.head.mlp.0.weight")
    teacher = under("backbone.", k) | some("head.mlp.0.weight")
    return {"student": student, "teacher": teacher, "epoch": 1, "dino_loss": some("center")}


def swav(q: State, k: State) -> dict:
    """facebookresearch/swav: src/resnet50.py, main_swav.py saves DistributedDataParallel's."""
    return under("module.", q, projection_head__0__weight=4, prototypes__weight=4)


def lightning_bolts(q: State, k: State) -> dict:
    """Lightning-Universe/lightning-bolts, pl_bolts/models/self_supervised/moco/moco_module.py."""
    state = some("queue", "queue_ptr", "val_queue", "val_queue_ptr")
    state |= under("encoder_q.", q, fc__0__weight=4, fc__2__bias=2)
    state |= under("encoder_k.", k, fc__0__weight=4, fc__2__bias=2)
    return {"epoch": 1, "pytorch-lightning_version": "1.9.0", "state_dict": state}


def seco(q: State, k: State) -> dict:
    """ServiceNow/seasonal-contrast, models/moco2_module.py: three subspaces."""
    state = some("queue", "queue_ptr") | under("encoder_q.", numbered(q))
    state |= under("encoder_k.", numbered(k))
    state |= some(*(f"heads_{of}.{i}.{n}.weight" for of in "qk" for i in range(3) for n in (0, 2)))
    return {"epoch": 1, "global_step": 7, "state_dict": state}


def pixpro(q: State, k: State) -> dict:
    """zdaxie/PixPro: contrast/models/PixPro.py, main_pretrain.py, publish_model.py."""
    state = under("module.encoder.", q) | under("module.encoder_k.", k)
    for head in ("projector", "projector_k", "projector_instance", "projector_instance_k",
                 "predictor", "value_transform"):  # fmt: skip
        state |= some(f"module.{head}.linear1.weight", f"module.{head}.bn1.running_mean")
    return {"model": state}


def barlow_twins(q: State, k: State) -> dict:
    """facebookresearch/barlowtwins, main.py: checkpoint.pth; its final resnet50.pth is bare."""
    state = under("module.backbone.", q)
    state |= some("module.projector.0.weight", "module.projector.1.running_mean",
                  "module.projector.6.weight", "module.bn.running_var")  # fmt: skip
    return {"epoch": 3, "model": state}


def of_hugging_face(state: State) -> State:
    """huggingface/transformers, models/resnet/modeling_resnet.py: ResNetModel."""
    renamed = {}
    for name, tensor in state.items():
        *at, unit, entry = name.split(".")
        if not at:  # the stem
            start = "embedder.embedder."
        elif "downsample" in at:
            start = f"encoder.stages.{int(at[0][-1]) - 1}.layers.{at[1]}.shortcut."
            unit = {"0": "conv", "1": "bn"}[unit] + "1"
        else:
            start = f"encoder.stages.{int(at[0][-1]) - 1}.layers.{at[1]}."
            start += f"layer.{int(unit[-1]) - 1}."
        kind = "convolution" if unit.startswith("conv") else "normalization"
        renamed[f"{start}{kind}.{entry}"] = tensor
    return renamed


def hugging_face(q: State, k: State) -> dict:
    """The same file, ResNetForImageClassification."""
    return under("resnet.", of_hugging_face(q)) | some("classifier.1.weight", "classifier.1.bias")


def hugging_face_alone(q: State, k: State) -> dict:
    return of_hugging_face(q)


def bare(q: State, k: State) -> dict:
    """torchvision.models, timm."""
    return q | some("head.weight", "head.bias") if "cls_token" in q else q | some("fc.weight")


def extracted(q: State, k: State) -> dict:
    """open-mmlab/mmselfsup: tools/model_converters/extract_backbone_weights.py."""
    return {"state_dict": q, "author": "MMSelfSup"}


def backbone_alone(q: State, k: State) -> dict:
    """A Lightning module whose `backbone` is torchvision's."""
    return {"state_dict": under("backbone.", q)}


# name -> (builder, the layout's name here, whether there is a key encoder, whether a ViT may be)
FILES = {
    "moco": (moco, "moco", True, True),
    "moco-v3": (moco_v3, "moco-v3", True, True),
    "simsiam": (simsiam, "simsiam", False, False),
    "solo-learn": (solo_learn, "solo-learn", True, False),
    "solo-learn, old": (solo_learn_old, "solo-learn, old", True, False),
    "lightly, example": (lightly_example, "lightly", True, False),
    "lightly, benchmark": (lightly_benchmark, "lightly", True, False),
    "lightly, DINO": (lightly_dino, "lightly", True, False),
    "lightly, generator": (lightly_generator, "lightly", False, False),
    "vissl": (vissl, "vissl", True, False),
    "mmselfsup 1.x": (mmselfsup_1, "mmselfsup", True, False),
    "mmselfsup 0.x": (mmselfsup_0, "mmselfsup", True, False),
    "dino": (dino, "dino", True, True),
    "swav": (swav, "swav", False, False),
    "lightning-bolts": (lightning_bolts, "moco", True, False),
    "seco": (seco, "seco", True, False),
    "pixpro": (pixpro, "pixpro", True, False),
    "barlow twins": (barlow_twins, "barlowtwins", False, False),
    "hugging face": (hugging_face, "huggingface", False, False),
    "hugging face, alone": (hugging_face_alone, "huggingface", False, False),
    "bare": (bare, "torchvision", False, True),
    "extracted": (extracted, "torchvision", False, False),
    "backbone alone": (backbone_alone, "backbone", False, False),
}


def weights_of(content: dict) -> State:
    """All tensors of a builder's file that are weights, under their own paths; found by walking it
    whole. Left out of the paths is what holds all weights of a file, or VISSL's model."""
    containers = (
        "state_dict.", "model_state_dict.", "classy_state_dict.base_model.model.", "model.",
    )  # fmt: skip
    found: State = {}

    def walk(value: object, path: tuple[str, ...]) -> None:
        if torch.is_tensor(value):
            name = ".".join(path)
            for container in containers:
                name = name.removeprefix(container)
            found[name] = value
        elif isinstance(value, dict):
            for name, part in value.items():
                walk(part, (*path, name))
        elif isinstance(value, list):
            for i, part in enumerate(value):
                walk(part, (*path, str(i)))

    walk({n: part for n, part in content.items() if n not in ("optimizer", "dino_loss")}, ())
    return found
