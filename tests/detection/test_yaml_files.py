"""Every detection config loads and is headed by its command."""

from pathlib import Path

import pytest

from detection.config import load_detection_config
from detection.config_keys import EXTRA_KEYS

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


@pytest.mark.detectron2
@pytest.mark.parametrize("path", DETECTRON2_VALID, ids=lambda p: p.stem)
def test_detectron2_reads_it_as_it_stands(path):
    config = pytest.importorskip("detectron2.config")
    theirs = config.get_cfg()
    theirs.merge_from_file(str(path))
    ours = load_detection_config(str(path))

    def compare(node, other, prefix=""):
        for key, value in node.items():
            name = f"{prefix}{key}"
            if name in EXTRA_KEYS:
                continue
            if isinstance(value, dict):
                compare(value, other[key], f"{name}.")
            elif name != "OUTPUT_DIR":
                assert list(value) == list(other[key]) if isinstance(value, (list, tuple)) else (
                    value == other[key]
                ), name

    compare(ours, theirs)
