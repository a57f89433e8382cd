"""Caffe2's names: which tensor becomes which, what is dropped, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity import caffe2_files

from detection.caffe2_names import from_caffe2
from detection.config import load_detection_config
from detection.engines.embedded.faster_rcnn import build_model
from detection.weights import load_backbone_weights
from detection.weights_file import find_weights, read_weights_file
from moco.errors import CheckpointError

NAMES = {  # from the table of names in Detectron2's log of loading its MSRA/R-50.pkl
    "conv1_w": "stem.conv1.weight",
    "res_conv1_bn_gamma": "stem.conv1.norm.weight",
    "res_conv1_bn_beta": "stem.conv1.norm.bias",
    "res_conv1_bn_s": "stem.conv1.norm.weight",
    "res_conv1_bn_b": "stem.conv1.norm.bias",
    "res_conv1_bn_running_mean": "stem.conv1.norm.running_mean",
    "res_conv1_bn_riv": "stem.conv1.norm.running_var",
    "res2_0_branch1_w": "res2.0.shortcut.weight",
    "res4_5_branch2c_bn_running_var": "res4.5.conv3.norm.running_var",
    "res4_22_branch2b_bn_rm": "res4.22.conv2.norm.running_mean",
    "res5_0_branch2a_bn_beta": "res5.0.conv1.norm.bias",
    "conv_rpn_b": "proposal_generator.rpn_head.conv.bias",
    "rpn_bbox_pred_w": "proposal_generator.rpn_head.anchor_deltas.weight",
    "rpn_cls_logits_w": "proposal_generator.rpn_head.objectness_logits.weight",
    "conv5_mask_w": "mask_head.deconv.weight",
}


def detector(*overrides: object) -> torch.nn.Module:
    settings = [word for pair in caffe2_files.SETTINGS.items() for word in pair]
    return build_model(load_detection_config(None, [*settings, *overrides]))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_becomes_one_name(name):
    tensor = torch.rand(3)
    renamed, dropped = from_caffe2({name: tensor}, "w.pkl")
    assert list(renamed) == [NAMES[name]] and renamed[NAMES[name]] is tensor and dropped == {}


def test_rows_of_the_background_move_or_go():
    rows = torch.arange(12.0)
    given = {"cls_score_b": rows[:3], "bbox_pred_b": rows, "mask_fcn_logits_b": rows[:3]}
    renamed, _ = from_caffe2(given, "w.pkl")
    assert renamed["cls_score.bias"].tolist() == [1, 2, 0]
    assert renamed["bbox_pred.bias"].tolist() == list(range(4, 12))
    assert renamed["mask_head.predictor.bias"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "name",
    ["fpn_inner_res5_2_sum_w", "res2_0_branch2a_gn_s", "res6_0_branch1_w", "Conv1_w", "fc6_w"],
)
def test_names_of_other_networks_are_refused(name):
    with pytest.raises(CheckpointError, match=f"1 are of no R50-C4 network: {name}"):
        from_caffe2({"conv1_w": torch.zeros(1), name: torch.zeros(1)}, "w.pkl")


def test_two_names_of_one_tensor_are_refused():
    both = {"res_conv1_bn_s": torch.zeros(1), "res_conv1_bn_gamma": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"both mean|another tensor both mean 'stem"):
        from_caffe2(both, "w.pkl")


@pytest.mark.parametrize("wrapper", ["plain", "author", "blobs"])
def test_a_zoo_file_is_a_whole_backbone(wrapper, tmp_path):
    arrays = caffe2_files.backbone("zoo")
    path = caffe2_files.write(tmp_path / "R-50.pkl", arrays, wrapper)
    model = detector("MODEL.RESNETS.NORM", "naiveSyncBN", "MODEL.BACKBONE.FREEZE_AT", 0)
    report = load_backbone_weights(model, path)
    assert len(report.loaded) == 265 and report.without_statistics == ()
    assert report.dropped == {
        "ImageNet classifier": ["fc1000_w", "fc1000_b"],
        "biases of normalised convolutions": ["conv1_b"],
    }
    # Every array of the file is accounted for.
    assert len(report.loaded) + 3 == len(arrays)
    state = model.state_dict()
    for ours, theirs in (
        ("backbone.stem.conv1.norm.running_var", "res_conv1_bn_running_var"),
        ("backbone.res3.3.conv2.weight", "res3_3_branch2b_w"),
        ("roi_heads.res5.0.shortcut.norm.weight", "res5_0_branch1_bn_gamma"),
    ):
        assert np.array_equal(state[ours].numpy(), arrays[theirs])
    words = report.words()
    assert "\n" not in words and "dropped 2: ImageNet classifier (fc1000_w, fc1000_b)" in words
    assert "10 new ones (proposal_generator.rpn_head.*, roi_heads.box_predictor.*)" in words


@pytest.mark.parametrize(("norm", "trained"), [("FrozenBN", 0), ("naiveSyncBN", 53)])
def test_a_fused_file_leaves_the_statistics_alone(norm, trained, tmp_path):
    path = caffe2_files.write(tmp_path / "R-50.pkl", caffe2_files.backbone("fused"))
    model = detector("MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0)
    report = load_backbone_weights(model, path)
    assert len(report.loaded) == 53 * 3 and len(report.without_statistics) == 53
    assert {what: len(names) for what, names in report.dropped.items()} == {
        "ImageNet classifier": 2,
        "biases of normalised convolutions": 53,
        "momentum": 53,
    }
    state = model.state_dict()
    for name in report.without_statistics:
        assert (state[f"{name}.running_mean"] == 0).all()
        assert (state[f"{name}.running_var"] == 1).all()
    assert report.num_trained_without_statistics == trained
    assert ("WARNING: 53 of them are trained" in report.words()) == (trained > 0)


def test_part_of_the_statistics_or_of_the_weights_may_not_lack(tmp_path):
    for layout, lost in (
        ("zoo", "res3_1_branch2b_bn_running_var"),
        ("fused", "res3_1_branch2b_bn_s"),
    ):
        arrays = caffe2_files.backbone(layout)
        del arrays[lost]
        path = caffe2_files.write(tmp_path / "R-50.pkl", arrays)
        with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*res3\.1\.conv2\.norm"):
            load_backbone_weights(detector(), path)


def test_a_detector_of_detectron_is_loaded_whole(tmp_path):
    arrays = {**caffe2_files.backbone("fused"), **caffe2_files.heads(3)}
    path = caffe2_files.write(tmp_path / "model_final.pkl", arrays, "blobs")
    # Without masks its mask head has no place, and that is said.
    without = load_backbone_weights(detector("MODEL.ROI_HEADS.NUM_CLASSES", 3), path)
    assert "dropped 4: mask head (MODEL.MASK_ON is False) (mask_head.deconv" in without.words()
    with pytest.raises(CheckpointError, match="fine-tuned for 3 classes.*NUM_CLASSES is 7"):
        load_backbone_weights(
            detector("MODEL.ROI_HEADS.NUM_CLASSES", 7, "MODEL.MASK_ON", True), path
        )
    model = detector("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.MASK_ON", True)
    report = load_backbone_weights(model, path)
    assert report.missing == ()
    scores = model.state_dict()["roi_heads.box_predictor.cls_score.bias"].numpy()
    assert np.array_equal(scores, np.roll(arrays["cls_score_b"], -1))


def test_wrong_widths_are_named(tmp_path):
    path = caffe2_files.write(tmp_path / "R-50.pkl", caffe2_files.backbone("zoo"))
    with pytest.raises(CheckpointError, match=r"'stem\.conv1\.weight' has shape \(8, 3, 7, 7\)"):
        load_backbone_weights(detector("MODEL.RESNETS.STEM_OUT_CHANNELS", 16), path)


@pytest.mark.parametrize(
    "value", ["detectron2://ImageNetPretrained/R-50.pkl", "https://host.example/zoo/R-50.pkl"]
)
def test_a_url_is_a_file_in_detectron2s_cache_or_an_error(value, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nothing is downloaded here; download https://") as e:
        find_weights(value)
    place = tmp_path / ("detectron2/ImageNetPretrained" if "detectron2:" in value else "zoo")
    assert value in str(e.value) and str(place / "R-50.pkl") in str(e.value)
    place.mkdir(parents=True)
    caffe2_files.write(place / "R-50.pkl", caffe2_files.backbone("zoo"))
    assert find_weights(value) == place / "R-50.pkl"
    assert len(read_weights_file(value).tensors) == 265


@pytest.mark.parametrize("value", ["catalog://ImageNetPretrained/MSRA/R-50", "ftp://x/R-50.pkl"])
def test_other_addresses_are_refused(value):
    with pytest.raises(CheckpointError, match=r"is no file; allowed: a path, detectron2://"):
        find_weights(value)
