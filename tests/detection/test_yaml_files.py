"""Every detection config loads and is headed by its command."""

from pathlib import Path

import pytest

from detection.config import load_detection_config
from detection.config_keys import EXTRA_KEYS
from moco.cfgnode import flatten

CONFIGS = Path(__file__).parents[2] / "configs"
DETECTRON2_VALID = sorted(CONFIGS.glob("detection/*.yaml"))
FILES = [*DETECTRON2_VALID, *CONFIGS.glob("own_data/*.yaml"), CONFIGS / "demo/detection.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_loads_and_is_headed_by_a_comment(path):
    cfg = load_detection_config(str(path))
    assert cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm"
    assert path.read_text().startswith("#")


def test_the_moco_config_holds_the_papers_values():
    cfg = load_detection_config(str(CONFIGS / "detection/pascal_voc_R_50_C4_24k_moco.yaml"))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (24000, (18000, 22000))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WARMUP_ITERS) == (16, 0.02, 100)
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(480, 801, 32))
    assert cfg.INPUT.FORMAT == "RGB" and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert list(cfg.MODEL.PIXEL_STD) == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.NORM == "naiveSyncBN" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.TEST.PRECISE_BN.ENABLED and cfg.TEST.PRECISE_BN.NUM_ITER == 200
    assert (cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (6000, 1000)


def test_the_coco_config_holds_the_references_values():
    cfg = load_detection_config(str(CONFIGS / "detection/coco_R_50_C4_2x_moco.yaml"))
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.MODEL.MASK_ON and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (180000, (120000, 160000))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WARMUP_ITERS) == (16, 0.02, 1000)
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(640, 801, 32))
    assert cfg.INPUT.FORMAT == "RGB" and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert list(cfg.MODEL.PIXEL_STD) == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.NORM == "naiveSyncBN" and cfg.MODEL.BACKBONE.FREEZE_AT == 0


@pytest.mark.detectron2
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_detectron2_reads_it(path):
    """As it stands; the files for one's own data and the demo without our few extra keys."""
    config = pytest.importorskip("detectron2.config")
    theirs = config.get_cfg()
    if path in DETECTRON2_VALID:
        theirs.merge_from_file(str(path))
    else:
        tree = flatten(config.CfgNode.load_yaml_with_base(str(path)))
        assert not set(EXTRA_KEYS).isdisjoint(tree)
        plain = {key: value for key, value in tree.items() if key not in EXTRA_KEYS}
        theirs.merge_from_list([item for pair in plain.items() for item in pair])
    theirs = flatten(theirs)
    for key, value in flatten(load_detection_config(str(path))).items():
        if key not in EXTRA_KEYS:
            other = theirs[key]
            assert list(value) == list(other) if isinstance(value, (list, tuple)) else (
                value == other
            ), key
