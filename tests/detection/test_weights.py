"""Strict loading of weights into the embedded detector, and into Detectron2's."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from official_conversion import narrow_moco, official_conversion

from detection.config import load_detection_config
from detection.convert import convert_checkpoint
from detection.engines.embedded.faster_rcnn import build_model
from detection.engines.embedded.resnet_c4 import feature_trunk
from detection.engines.session import load_weights_file
from detection.keymap import ResNetShape
from detection.weights import DECLARED_MISSING, LoadReport, load_backbone_weights
from detection.weights_file import read_weights_file
from moco.errors import CheckpointError

TINY = ResNetShape(50, stem_out_channels=8, res2_out_channels=32, width_per_group=8)
OVERRIDES = [
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeadsExtraNorm", "MODEL.ROI_HEADS.NUM_CLASSES", "20"),
]


def detector(*overrides: str) -> torch.nn.Module:
    return build_model(load_detection_config(None, [*OVERRIDES, *overrides]))


def random_backbone() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {n: torch.rand(s, generator=generator) for n, s in TINY.tensor_shapes().items()}
    return {name: 0.1 * (t - 0.5) if t.dim() == 4 else t + 0.5 for name, t in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds source.pth (torchvision's names), w.pth and w.pkl."""
    path = tmp_path_factory.mktemp("weights")
    torch.save(random_backbone(), path / "source.pth")
    convert_checkpoint(path / "source.pth", path / "w.pth")
    convert_checkpoint(path / "source.pth", path / "w.pkl")
    return path


def changed(folder: Path, tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    """The converted file with entries replaced, added or (None) removed; `__` stands for a dot."""
    model = read_weights_file(folder / "w.pth").tensors
    for name, value in changes.items():
        name = name.replace("__", ".")
        model.pop(name, None)
        if value is not None:
            model[name] = value
    torch.save({"model": model}, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def refused(model: torch.nn.Module, path: Path, match: str) -> None:
    """Loading fails with one line, and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        load_backbone_weights(model, path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_pth_and_pkl_read_alike(folder):
    tensors, arrays = (read_weights_file(folder / f"w.{s}").tensors for s in ("pth", "pkl"))
    assert list(tensors) == list(arrays) and len(tensors) == 265
    assert all(torch.equal(tensors[name], arrays[name]) for name in tensors)


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_converted_backbone_in_the_detector(folder, suffix):
    model = detector()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_backbone_weights(model, folder / f"w.{suffix}")
    assert isinstance(report, LoadReport) and len(report.loaded) == 265
    assert set(report.missing) == {
        name
        for name in before
        if name.startswith(DECLARED_MISSING) and not name.endswith("num_batches_tracked")
    }
    assert len(report.missing) == 6 + 4 + 4
    after, source = model.state_dict(), random_backbone()
    for ours, theirs in (
        ("backbone.stem.conv1.weight", "conv1.weight"),
        ("backbone.res4.5.conv3.norm.running_var", "layer3.5.bn3.running_var"),
        ("roi_heads.res5.0.shortcut.weight", "layer4.0.downsample.0.weight"),
        ("roi_heads.res5.2.conv2.norm.bias", "layer4.2.bn2.bias"),
    ):
        assert torch.equal(after[ours], source[theirs])
        assert not torch.equal(after[ours], before[ours])
    assert all(torch.equal(after[name], before[name]) for name in report.missing)


@pytest.mark.parametrize("norm", ["FrozenBN", "naiveSyncBN", "SyncBN"])
def test_other_norms_hold_the_same_backbone(folder, norm):
    model = detector("MODEL.RESNETS.NORM", norm)
    assert len(load_backbone_weights(model, folder / "w.pth").loaded) == 265


def test_without_the_extra_norm_nothing_of_it_is_missing(folder):
    model = detector("MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
    report = load_backbone_weights(model, folder / "w.pth")
    assert len(report.missing) == 10 and not any("norm" in name for name in report.missing)


def test_a_feature_trunk_lacks_nothing(folder):
    trunk = feature_trunk(load_detection_config(None, OVERRIDES))
    report = load_backbone_weights(trunk, folder / "w.pkl")
    assert (len(report.loaded), report.missing) == (265, ())


@pytest.mark.parametrize("extra", [{}, {"iteration": 5, "optimizer": {"state": {}}}])
def test_a_fine_tuned_file_has_everything(extra, tmp_path):
    torch.manual_seed(1)
    trained, fresh = detector(), detector()
    torch.save({"model": trained.state_dict(), **extra}, tmp_path / "model_final.pth")
    report = load_backbone_weights(fresh, tmp_path / "model_final.pth")
    assert (len(report.loaded), report.missing) == (333, ())
    after = fresh.state_dict()
    assert all(torch.equal(after[name], t) for name, t in trained.state_dict().items())


def test_a_fine_tuned_file_without_part_of_its_head_is_refused(tmp_path):
    model = detector()
    state = {n: t for n, t in model.state_dict().items() if "box_predictor" not in n}
    torch.save({"model": state}, tmp_path / "part.pth")
    refused(model, tmp_path / "part.pth", r"lacks 4 tensors.*box_predictor\.cls_score\.weight")


def test_a_fine_tuned_file_of_other_classes_is_refused(tmp_path):
    other = detector("MODEL.ROI_HEADS.NUM_CLASSES", "3")
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    match = r"fine-tuned for 3 classes, MODEL\.ROI_HEADS\.NUM_CLASSES is 20; set it to 3"
    refused(detector(), tmp_path / "other.pth", match)


OTHER_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES", "3")
PREDICTORS = [
    f"roi_heads.{name}.{kind}"
    for name in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    for kind in ("weight", "bias")
]


def start_from(model, cfg_overrides, path):
    """The report, and the names of the tensors that kept their first values."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cfg = load_detection_config(None, [*OVERRIDES, *cfg_overrides, "MODEL.WEIGHTS", str(path)])
    report = load_weights_file(model, cfg, eval_only=False)
    after = model.state_dict()
    return report, [name for name in after if torch.equal(after[name], before[name])]


def randomised(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1)
    return model


@pytest.mark.parametrize("mask_on", ["True", "False"])
def test_a_detector_of_other_classes_is_a_start(tmp_path, mask_on):
    """Its class-dependent tensors stay as initialised and are named with both shapes."""
    masks = ("MODEL.MASK_ON", mask_on)
    other = randomised(detector(*OTHER_CLASSES, *masks))
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    torch.manual_seed(0)
    model = detector(*masks)
    report, kept = start_from(model, masks, tmp_path / "other.pth")
    wanted = [name for name in PREDICTORS if mask_on == "True" or "mask" not in name]
    assert [tensor.name for tensor in report.reset] == wanted
    assert [name for name in kept if "num_batches_tracked" not in name] == wanted
    assert f"{len(wanted)} class-dependent tensors initialised anew" in report.words()
    assert "cls_score.weight (4, 256) -> (21, 256)" in report.words()
    assert "bbox_pred.bias (12,) -> (80,)" in report.words()


def test_equal_numbers_of_classes_keep_their_tensors_unless_asked(tmp_path):
    path = tmp_path / "same.pth"
    torch.save({"model": randomised(detector()).state_dict()}, path)
    report, kept = start_from(detector(), (), path)
    assert report.reset == () and not any("predictor" in name for name in kept)
    report, kept = start_from(detector(), ("MODEL.RESET_PREDICTORS", "True"), path)
    assert [tensor.name for tensor in report.reset] == PREDICTORS[:4]
    assert set(PREDICTORS[:4]) <= set(kept)


def test_what_does_not_depend_on_classes_is_taken(tmp_path):
    agnostic = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
    path = tmp_path / "other.pth"
    torch.save({"model": randomised(detector(*OTHER_CLASSES, *agnostic)).state_dict()}, path)
    report, kept = start_from(detector(*agnostic), agnostic, path)
    assert [tensor.name for tensor in report.reset] == PREDICTORS[:2]


def test_only_classes_may_differ(tmp_path):
    """A predictor of other features is of another network; the model stays as it was."""
    state = randomised(detector(*OTHER_CLASSES)).state_dict()
    state["roi_heads.box_predictor.bbox_pred.weight"] = torch.zeros(12, 99)
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"bbox_pred.weight' has shape \(12, 99\)"):
        start_from(detector(), (), tmp_path / "other.pth")


def test_a_detector_with_masks_is_a_start_for_one_without(tmp_path):
    other = randomised(detector("MODEL.MASK_ON", "True"))
    torch.save({"model": other.state_dict()}, tmp_path / "masks.pth")
    report, _ = start_from(detector(), (), tmp_path / "masks.pth")
    assert len(report.dropped["mask head (MODEL.MASK_ON is False)"]) == 4


def test_evaluation_refuses_a_detector_of_other_classes(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": detector(*OTHER_CLASSES).state_dict()}, path)
    cfg = load_detection_config(None, [*OVERRIDES, "MODEL.WEIGHTS", str(path)])
    with pytest.raises(CheckpointError, match="is fine-tuned for 3 classes"):
        load_weights_file(detector(), cfg, eval_only=True)


def test_missing_unexpected_and_misshapen_tensors_are_named(folder, tmp_path):
    model = detector()
    refused(
        model,
        changed(folder, tmp_path, res5__1__conv1__weight=None),
        r"lacks 1 tensors of the model: roi_heads\.res5\.1\.conv1\.weight",
    )
    refused(
        model,
        changed(folder, tmp_path, res4__9__conv1__weight=torch.zeros(1)),
        r"1 tensors fit nothing in the model: res4\.9\.conv1\.weight",
    )
    refused(
        model,
        changed(folder, tmp_path, stem__conv1__weight=torch.zeros(64, 3, 7, 7)),
        r"'stem\.conv1\.weight' has shape \(64, 3, 7, 7\).*STEM_OUT_CHANNELS.*STRIDE_IN_1X1",
    )
    refused(
        model,
        changed(folder, tmp_path, stem__conv1__norm__bias=torch.zeros(8).long()),
        r"'stem\.conv1\.norm\.bias' is torch\.int64",
    )
    refused(
        model,
        changed(folder, tmp_path, stem__conv1__norm__bias=torch.full((8,), float("inf"))),
        r"'stem\.conv1\.norm\.bias' holds NaN or Inf",
    )


def test_ambiguous_and_doubled_names_are_refused(folder, tmp_path):
    model = detector()
    refused(
        model,
        changed(folder, tmp_path, norm__bias=torch.zeros(8)),
        r"'norm\.bias' fits 54 tensors",
    )
    refused(
        model,
        changed(folder, tmp_path, backbone__stem__conv1__weight=torch.zeros(8, 3, 7, 7)),
        r"both fit 'backbone\.stem\.conv1\.weight'",
    )


def test_names_match_by_whole_parts_only(folder, tmp_path):
    path = changed(folder, tmp_path, tem__conv1__weight=torch.zeros(8, 3, 7, 7))
    refused(detector(), path, r"fit nothing in the model: tem\.conv1\.weight")


def test_another_depth_is_refused(folder):
    refused(detector("MODEL.RESNETS.DEPTH", "101"), folder / "w.pth", "lacks 255 tensors.*DEPTH")


def test_other_files_are_refused(folder, tmp_path):
    model = detector()
    moco = {"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(1)}}
    torch.save(moco, tmp_path / "m.pth")
    refused(model, tmp_path / "m.pth", "convert it first with tools/convert_to_d2.py")
    refused(model, folder / "source.pth", "convert it first with tools/convert_to_d2.py")
    torch.save({"model": {}}, tmp_path / "empty.pth")
    refused(model, tmp_path / "empty.pth", "no dict of named tensors")
    torch.save({"model": {"a": 1}}, tmp_path / "number.pth")
    refused(model, tmp_path / "number.pth", "'a' is no tensor")
    torch.save({"model": {"a": torch.zeros(1)}, "best": np.float64(3)}, tmp_path / "numpy.pth")
    refused(model, tmp_path / "numpy.pth", r"objects other than tensors.*keep the tensors alone")
    (tmp_path / "cut.pth").write_bytes((folder / "w.pth").read_bytes()[:-500])
    refused(model, tmp_path / "cut.pth", "is not a readable checkpoint")
    refused(model, tmp_path / "none.pth", "there is no such weights file")
    (tmp_path / "text.pkl").write_bytes(pickle.dumps({"model": {"a": "b"}}))
    refused(model, tmp_path / "text.pkl", "refused, the entry 'a' is no numeric array")


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_the_official_converters_file(tmp_path, head, norm):
    """It keeps head and batch counters; Detectron2 ignores them where they have no place
    (tests/parity/test_weights_vs_detectron2.py)."""
    content = official_conversion(narrow_moco(TINY.tensor_shapes(), 256, head))
    (tmp_path / "moco.pkl").write_bytes(pickle.dumps(content))
    model = detector("MODEL.RESNETS.NORM", norm)
    report = load_backbone_weights(model, tmp_path / "moco.pkl")
    dropped = {what: len(names) for what, names in report.dropped.items()}
    frozen = {"batch counters that frozen norms do not have": 53} if norm == "FrozenBN" else {}
    kind = {"mlp": {"projection head": 4},
            "linear": {"ImageNet classifier or linear projection head": 2}}[head]  # fmt: skip
    assert dropped == frozen | kind and "projection head (stem.fc." in report.words()
    state = model.state_dict()
    weights = content["model"]["res5.2.conv3.norm.running_var"]
    loaded = state["roi_heads.res5.2.conv3.norm.running_var"]
    assert np.array_equal(loaded, weights) and len(report.loaded) == (265 if frozen else 318)
    # Negative control: what is no head is refused still.
    content["model"]["stem.extra.weight"] = content["model"]["stem.conv1.weight"]
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps(content))
    refused(model, tmp_path / "odd.pkl", "1 tensors fit nothing in the model: stem.extra.weight")


@pytest.mark.detectron2
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_detectron2_loads_the_same_weights(folder, suffix, tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model as build_d2_model

    cfg = get_cfg()
    cfg.MODEL.MASK_ON = False
    overrides = list(OVERRIDES)
    at = overrides.index("MODEL.ROI_HEADS.NAME")
    del overrides[at : at + 2]  # the extra norm is a class of the benchmark, not of Detectron2
    cfg.merge_from_list(overrides)
    model = build_d2_model(cfg)
    checkpointer = DetectionCheckpointer(model, save_dir=str(tmp_path))
    incompatible = {}
    load_model = checkpointer._load_model

    def recorded(checkpoint):
        result = load_model(checkpoint)
        incompatible["missing"] = set(result.missing_keys)
        incompatible["unexpected"] = list(result.unexpected_keys)
        incompatible["shapes"] = list(result.incorrect_shapes)
        return result

    checkpointer._load_model = recorded
    checkpointer.load(str(folder / f"w.{suffix}"))
    ours = detector("MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
    report = load_backbone_weights(ours, folder / f"w.{suffix}")
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    assert incompatible["unexpected"] == incompatible["shapes"] == []
    assert incompatible["missing"] - counters == set(report.missing)
    theirs, own = model.state_dict(), ours.state_dict()
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in report.loaded)
    assert not all(torch.equal(theirs[name], own[name]) for name in report.missing)
