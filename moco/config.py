"""Defaults of every pretraining key, and the checks that need no data.

A config file holds `_BASE_` and the few keys that differ from here; the command line adds
`KEY VALUE` pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from moco.cfgnode import CfgNode, get_key, load_config
from moco.errors import ConfigError

# What may differ between a run and its continuation: none of it changes a number.
DIGEST_EXCLUDE = (
    "DATA.NUM_WORKERS",
    "DATA.MAX_BAD_FRACTION",
    "DATA.MAX_IMAGE_PIXELS",
    "DATA.WORKER_TIMEOUT",
    "TRAIN.RANK_CHECK_PERIOD",
    "CHECKPOINT",
    "LOG",
    "KNN",
)
# Keys that came later, and the value with which a run is what it was before: then they are not in
# its digest, and a checkpoint without them continues.
ADDED_LATER = {
    "MODEL.WEIGHTS": "",
    "DATA.CHANNELS": 3,
    "DATA.FINGERPRINT": "names",
    "DATA.SIXTEEN_BIT_RANGE": [0, 65535],
    "TRAIN.AMP_DTYPE": "bfloat16",
    "TRAIN.TF32": False,
}

OWN_VALUE = -1.0  # of DATA.BLUR_PROBABILITY: what the recipe itself says


def get_defaults() -> CfgNode:
    """The defaults tree: MoCo v2 for 200 epochs on ImageNet (paper, section 2)."""
    return CfgNode(
        METHOD="moco",
        SEED=0,
        MODEL=CfgNode(
            ARCH="resnet50",  # or resnet18, 34, 101, vit_small, vit_base
            WIDTH=1.0,  # factor on all channel counts; 1.0 is torchvision's network
            STEM="imagenet",  # or "cifar": 3x3 convolution, no max-pool; a ViT's patches of 4
            FREEZE_PATCHES=True,  # a ViT's patch projection stays random (v3, section 4.2)
            HEAD="mlp",  # "mlp" (v2) or "linear" (v1); v3 has its own
            DIM=128,
            BN_SPLITS=1,  # groups batch norm sees in one process (8 imitates 8 GPUs)
            WEIGHTS="",  # a file or run folder the encoders start from, see docs/TRAINING.md
            NORM="BN",  # "BN" (each process its own images) or "SyncBN" (all images together)
        ),
        MOCO=CfgNode(
            QUEUE_SIZE=65536,
            MOMENTUM=0.999,
            MOMENTUM_SCHEDULE="constant",  # or "cosine": by step from MOMENTUM to 1 (v3)
            TEMPERATURE=0.2,  # of every mechanism's logits
        ),
        MOCO_V3=CfgNode(
            HIDDEN_DIM=4096,  # of projector and predictor
            PROJECTOR_LAYERS=3,
            PREDICTOR_LAYERS=2,
        ),
        END_TO_END=CfgNode(
            LOSS="info_nce",  # or "nt_xent": SimCLR's, over both views
            SHARE_ENCODER=False,  # one encoder for queries and keys (SimCLR), or one each
        ),
        MEMORY_BANK=CfgNode(
            NUM_NEGATIVES=65536,  # drawn from the bank in each step
            MOMENTUM=0.5,  # of a stored feature when its image is seen again
        ),
        DATA=CfgNode(
            FINGERPRINT="names",  # of the images, that a resume compares; or "contents" of packs
            RECIPE="v2",  # "v1", "v2" or "v3"
            SIZE=224,
            CHANNELS=3,  # of an image, MEAN and STD: 3 (RGB), 1 (grey) or 4 (RGB and another)
            CROP_SCALE=(0.2, 1.0),
            BLUR_PROBABILITY=OWN_VALUE,  # of both views; -1: the recipe's own
            MEAN=(0.485, 0.456, 0.406),
            STD=(0.229, 0.224, 0.225),
            NUM_WORKERS=4,  # per process
            WORKER_TIMEOUT=300,  # seconds in which no worker gets any further; 0: wait for ever
            ORDER="uniform",  # or "blocks": packed images, read block by block (PACKED_DATA.md)
            BLOCK_SIZE=256,  # images that lie together, of "blocks"
            BLOCKS_IN_FLIGHT=64,  # blocks that are mixed at any moment
            MAX_BAD_FRACTION=0.0,  # of unreadable images that are replaced; 0: none is
            SIXTEEN_BIT_RANGE=(0, 65535),  # black and white of 16-bit grey; 12 bits: (0, 4095)
            MAX_IMAGE_PIXELS=178956970,  # larger images are refused; this is Pillow's own limit
        ),
        AUGMENT=CfgNode(
            BACKEND="opencv",  # "pil": the reference's pixels; "device": all after the crop there
            DECODE="cpu",  # or "gpu": nvJPEG, with BACKEND device
            RESIDENT=False,  # small images of one size live on the device, with BACKEND device
        ),
        TRAIN=CfgNode(
            EPOCHS=200,
            BATCH_SIZE=256,  # global: over all processes and machines
            ACCUMULATION_STEPS=1,  # parts of a process's batch, backward by backward (memory)
            LR=0.03,
            OPTIMIZER="sgd",  # or "lars", "adamw" (v3)
            SCHEDULE="cosine",  # per epoch: "cosine" (v2), "step" (v1); or "cosine_by_step" (v3)
            MILESTONES=(120, 160),  # epochs at which "step" multiplies the rate by 0.1
            WARMUP_EPOCHS=0,  # of "cosine_by_step"
            SGD_MOMENTUM=0.9,  # of "sgd" and "lars"
            WEIGHT_DECAY=1e-4,
            RANK_CHECK_PERIOD=50,  # steps between comparisons of the ranks; 0: at checkpoints
            # How a step is computed (docs/PERFORMANCE.md). None: the machine decides, and says so.
            REFERENCE=False,  # the reference's arithmetic and pixels: overrides the next five
            AMP=None,  # autocast; logits, loss and weights stay float32
            AMP_DTYPE="bfloat16",  # or "float16", with a scaled loss: for GPUs without bfloat16
            TF32=False,  # on a GPU: what is float32 is multiplied with 10 bits of mantissa
            CHANNELS_LAST=None,  # memory order of images and convolutions
            COMPILE=None,  # "eager"; "kernels": own C++, on a CPU; "torch": torch.compile
        ),
        CHECKPOINT=CfgNode(
            PERIOD=1,  # epochs between checkpoints; the last epoch is always saved
            KEEP_LAST=3,
            MILESTONE=50,  # epochs; their checkpoints are never removed. 0: none
        ),
        LOG=CfgNode(
            PERIOD=20,  # steps between log records
            TENSORBOARD=True,
        ),
        KNN=CfgNode(
            PERIOD=1,  # epochs between kNN evaluations (only where images carry labels). 0: off
            MAX_SHARE=0.25,  # of an epoch's time; what costs more, and over 10 s, comes less often
            MAX_IMAGES=50_000,  # of each split, the same share of every class. 0: all
            K=200,
            TEMPERATURE=0.1,
            FEATURES="backbone",  # or "head": the two are not comparable
            BATCH_SIZE=256,
        ),
    )


_CHOICES = {
    "MODEL.STEM": ("imagenet", "cifar"),
    "MODEL.HEAD": ("mlp", "linear"),
    "MODEL.NORM": ("BN", "SyncBN"),
    "END_TO_END.LOSS": ("info_nce", "nt_xent"),
    "MOCO.MOMENTUM_SCHEDULE": ("constant", "cosine"),
    "DATA.FINGERPRINT": ("names", "contents"),
    "DATA.RECIPE": ("v1", "v2", "v3"),
    "DATA.CHANNELS": (1, 3, 4),
    "DATA.ORDER": ("uniform", "blocks"),
    "AUGMENT.BACKEND": ("pil", "opencv", "device"),
    "AUGMENT.DECODE": ("cpu", "gpu"),
    "TRAIN.OPTIMIZER": ("sgd", "lars", "adamw"),
    "TRAIN.SCHEDULE": ("cosine", "step", "cosine_by_step"),
    "TRAIN.AMP": (None, True, False),
    "TRAIN.AMP_DTYPE": ("bfloat16", "float16"),
    "TRAIN.TF32": (True, False),
    "TRAIN.CHANNELS_LAST": (None, True, False),
    "TRAIN.COMPILE": (None, "eager", "kernels", "torch"),
    "KNN.FEATURES": ("backbone", "head"),
}
_AT_LEAST = {
    "MODEL.DIM": 1,
    "MODEL.BN_SPLITS": 1,
    "MOCO.QUEUE_SIZE": 1,
    "MEMORY_BANK.NUM_NEGATIVES": 1,
    "MOCO_V3.HIDDEN_DIM": 1,
    "MOCO_V3.PROJECTOR_LAYERS": 1,
    "MOCO_V3.PREDICTOR_LAYERS": 1,
    "DATA.SIZE": 1,
    "DATA.NUM_WORKERS": 0,
    "DATA.WORKER_TIMEOUT": 0,
    "DATA.MAX_IMAGE_PIXELS": 1,
    "DATA.BLOCK_SIZE": 1,
    "DATA.BLOCKS_IN_FLIGHT": 1,
    "TRAIN.EPOCHS": 1,
    "TRAIN.BATCH_SIZE": 1,
    "TRAIN.ACCUMULATION_STEPS": 1,
    "TRAIN.WEIGHT_DECAY": 0,
    "TRAIN.RANK_CHECK_PERIOD": 0,
    "TRAIN.WARMUP_EPOCHS": 0,
    "CHECKPOINT.PERIOD": 1,
    "CHECKPOINT.KEEP_LAST": 1,
    "CHECKPOINT.MILESTONE": 0,
    "LOG.PERIOD": 1,
    "KNN.PERIOD": 0,
    "KNN.MAX_SHARE": 0,
    "KNN.MAX_IMAGES": 0,
    "KNN.K": 1,
    "KNN.BATCH_SIZE": 1,
}
_COUNTS = {1: "one number", 3: "three numbers", 4: "four numbers"}  # by DATA.CHANNELS
_POSITIVE = ("MODEL.WIDTH", "MOCO.TEMPERATURE", "TRAIN.LR", "KNN.TEMPERATURE")


def load_pretrain_config(config_file: str | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file with its `_BASE_` chain, then `KEY VALUE` pairs, checked and frozen.

    Raises: ConfigError naming the key, the value given and what is allowed.
    """
    cfg = load_config(get_defaults(), config_file, overrides)
    where = config_file or "command line"
    for key, allowed in _CHOICES.items():
        listed = ", ".join(map(str, allowed))
        value = get_key(cfg, key)
        ok = any(type(value) is type(one) and value == one for one in allowed)  # 1 is no True
        _require(where, key, value, ok, listed)
    for key, least in _AT_LEAST.items():
        _require(where, key, get_key(cfg, key), get_key(cfg, key) >= least, f"{least} or more")
    for key in _POSITIVE:
        _require(where, key, get_key(cfg, key), get_key(cfg, key) > 0, "a number above 0")
    warmup, by_step = cfg.TRAIN.WARMUP_EPOCHS, cfg.TRAIN.SCHEDULE == "cosine_by_step"
    last = cfg.TRAIN.EPOCHS - 1 if by_step else 0
    allowed = "less than TRAIN.EPOCHS, and 0 unless TRAIN.SCHEDULE is cosine_by_step"
    _require(where, "TRAIN.WARMUP_EPOCHS", warmup, warmup <= last, allowed)
    _check_pixels(where, cfg)
    _check_augment(where, cfg)
    _check_bad_images(where, cfg)
    for key in ("MOCO.MOMENTUM", "MEMORY_BANK.MOMENTUM", "TRAIN.SGD_MOMENTUM"):
        momentum = get_key(cfg, key)
        _require(where, key, momentum, 0 <= momentum < 1, "0 <= momentum < 1")
    return cfg


def _check_pixels(where: str, cfg: CfgNode) -> None:
    data = cfg.DATA
    channels, count = data.CHANNELS, _COUNTS[data.CHANNELS]
    of = "" if channels == 3 else f", as DATA.CHANNELS is {channels}"
    _require(where, "DATA.MEAN", data.MEAN, len(data.MEAN) == channels, f"{count}{of}")
    ok = len(data.STD) == channels and all(value > 0 for value in data.STD)
    _require(where, "DATA.STD", data.STD, ok, f"{count} above 0{of}")
    ok = len(data.CROP_SCALE) == 2 and 0 < data.CROP_SCALE[0] <= data.CROP_SCALE[-1] <= 1
    _require(where, "DATA.CROP_SCALE", data.CROP_SCALE, ok, "two shares of the area, ascending")
    ends = data.SIXTEEN_BIT_RANGE
    ok = len(ends) == 2 and all(type(end) is int for end in ends)
    ok = ok and 0 <= ends[0] < ends[1] <= 65535
    allowed = "two whole numbers, 0 <= black < white <= 65535"
    _require(where, "DATA.SIXTEEN_BIT_RANGE", ends, ok, allowed)
    blur = data.BLUR_PROBABILITY
    _require(where, "DATA.BLUR_PROBABILITY", blur, blur == OWN_VALUE or 0 <= blur <= 1,
             f"0 to 1, or {OWN_VALUE:g}: the recipe's own")  # fmt: skip


def _check_augment(where: str, cfg: CfgNode) -> None:
    backend, decode, resident = cfg.AUGMENT.BACKEND, cfg.AUGMENT.DECODE, cfg.AUGMENT.RESIDENT
    remedy = f"with AUGMENT.BACKEND {backend}; set AUGMENT.BACKEND device"
    on_device = backend == "device"
    _require(where, "AUGMENT.DECODE", decode, on_device or decode == "cpu", f"cpu {remedy}")
    _require(where, "AUGMENT.RESIDENT", resident, on_device or not resident, f"False {remedy}")
    rgb = cfg.DATA.CHANNELS == 3
    of = f"with DATA.CHANNELS {cfg.DATA.CHANNELS}; the GPU's decoder gives RGB"
    _require(where, "AUGMENT.DECODE", decode, rgb or decode == "cpu", f"cpu {of}")
    of = f"with DATA.CHANNELS {cfg.DATA.CHANNELS}; resident images are RGB"
    _require(where, "AUGMENT.RESIDENT", resident, rgb or not resident, f"False {of}")
    one = decode == "cpu" or not resident
    _require(where, "AUGMENT.DECODE", decode, one, "cpu with AUGMENT.RESIDENT True")


def _check_bad_images(where: str, cfg: CfgNode) -> None:
    bad, augment = cfg.DATA.MAX_BAD_FRACTION, cfg.AUGMENT
    _require(where, "DATA.MAX_BAD_FRACTION", bad, 0 <= bad < 1, "0 <= fraction < 1")
    # A replacement may come twice in a step, which a bank's row cannot take.
    cannot = cfg.METHOD == "memory_bank" or augment.RESIDENT or augment.DECODE == "gpu"
    allowed = "0 with METHOD memory_bank, AUGMENT.RESIDENT True or AUGMENT.DECODE gpu"
    _require(where, "DATA.MAX_BAD_FRACTION", bad, not (bad and cannot), allowed)


def _require(where: str, key: str, given: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{where}: {key} is {given!r}; allowed: {allowed}")
