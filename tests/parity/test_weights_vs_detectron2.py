"""Weights files of every origin: what Detectron2 loads from them, and what it loads of ours."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.engine import SimpleTrainer, hooks  # noqa: E402
from detectron2.modeling import build_model as build_theirs  # noqa: E402
from detectron2.solver import build_lr_scheduler  # noqa: E402
from detectron2.solver import build_optimizer as build_their_optimizer  # noqa: E402
from official_conversion import narrow_moco, official_conversion  # noqa: E402
from parity import caffe2_files, detectron2_side  # noqa: E402
from parity.cases import MOCO_YAML, SUPERVISED_YAML  # noqa: E402

from detection.config import load_detection_config  # noqa: E402
from detection.engines.base import FINAL_MODEL  # noqa: E402
from detection.engines.embedded.engine import EmbeddedEngine  # noqa: E402
from detection.engines.embedded.faster_rcnn import build_model  # noqa: E402
from detection.engines.embedded.run_state import save_state  # noqa: E402
from detection.engines.embedded.solver import build_optimizer  # noqa: E402
from detection.keymap import ResNetShape  # noqa: E402
from detection.weights import load_backbone_weights  # noqa: E402
from moco.errors import CheckpointError  # noqa: E402
from moco.training.changes import Changes  # noqa: E402

pytestmark = pytest.mark.detectron2
assert detectron2_side.Res5ROIHeads  # that module registers the heads with the extra norm

NUM_CLASSES = 3
TINY = {**caffe2_files.SETTINGS, "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES, "MODEL.WEIGHTS": ""}
PLAIN_HEADS = {"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"}
NORMS = {
    "the file's own": {},  # naiveSyncBN, nothing frozen
    "frozen": {"MODEL.RESNETS.NORM": "FrozenBN", **PLAIN_HEADS},
    "frozen with extra norm": {"MODEL.RESNETS.NORM": "FrozenBN"},
    "two stages frozen": {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 2},
}


def configs(yaml: Path | None, settings: dict) -> tuple:
    """Ours and Detectron2's, from the same file and pairs."""
    pairs = [word for pair in {**TINY, **settings}.items() for word in pair]
    theirs = get_cfg()
    if yaml is not None:
        theirs.merge_from_file(str(yaml))
    theirs.merge_from_list(pairs)
    return load_detection_config(str(yaml) if yaml else None, pairs), theirs


def models(yaml: Path | None, settings: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs, initialised alike."""
    our_cfg, their_cfg = configs(yaml, settings)
    torch.manual_seed(5)
    ours = build_model(our_cfg)
    torch.manual_seed(5)
    return ours, build_theirs(their_cfg)


def load_theirs(model: torch.nn.Module, path: Path):
    """Load as Detectron2 does; returns its lists of missing, unexpected and misshapen names."""
    checkpointer = DetectionCheckpointer(model, save_dir=str(path.parent))
    load_model, seen = checkpointer._load_model, []

    def recorded(checkpoint):
        result = load_model(checkpoint)
        # It goes on to clear these lists.
        seen.extend([list(result.missing_keys), list(result.unexpected_keys)])
        seen.append(list(result.incorrect_shapes))
        return result

    checkpointer._load_model = recorded
    checkpointer.load(str(path))
    return SimpleNamespace(missing=seen[0], unexpected=seen[1], shapes=seen[2])


def assert_equal_states(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    own, other = ours.state_dict(), theirs.state_dict()
    assert own.keys() == other.keys()
    assert [name for name in own if not torch.equal(own[name], other[name])] == []


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize(
    ("layout", "wrapper"),
    [("zoo", "author"), ("zoo", "plain"), ("fused", "plain"), ("fused", "blobs")],
)
def test_caffe2_files_give_the_same_model(layout, wrapper, norms, tmp_path):
    path = caffe2_files.write(tmp_path / "R-50.pkl", caffe2_files.backbone(layout), wrapper)
    ours, theirs = models(SUPERVISED_YAML, NORMS[norms])
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report, their_report = load_backbone_weights(ours, path), load_theirs(theirs, path)
    assert_equal_states(ours, theirs)
    changed = [n for n, tensor in ours.state_dict().items() if not torch.equal(tensor, before[n])]
    assert set(report.loaded) <= set(changed)  # control: the file, not the initial state, is equal
    # What it warns about is what we report, but for momentum, which it drops without a word.
    dropped = sum(len(names) for what, names in report.dropped.items() if what != "momentum")
    assert dropped == len(their_report.unexpected) and their_report.shapes == []


def test_control_a_wrong_name_is_seen(tmp_path):
    arrays = caffe2_files.backbone("zoo")
    swapped = dict(arrays)
    first, second = "res3_1_branch2a_bn_gamma", "res3_1_branch2a_bn_beta"
    swapped[first], swapped[second] = arrays[second], arrays[first]
    ours, theirs = models(SUPERVISED_YAML, {})
    load_backbone_weights(ours, caffe2_files.write(tmp_path / "a.pkl", swapped))
    load_theirs(theirs, caffe2_files.write(tmp_path / "b.pkl", arrays))
    with pytest.raises(AssertionError):
        assert_equal_states(ours, theirs)


def test_a_detector_of_detectron_is_the_same_model(tmp_path):
    arrays = {**caffe2_files.backbone("fused"), **caffe2_files.heads(NUM_CLASSES)}
    path = caffe2_files.write(tmp_path / "model_final.pkl", arrays, "blobs")
    ours, theirs = models(None, {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.MASK_ON": True})
    assert load_backbone_weights(ours, path).missing == ()
    load_theirs(theirs, path)
    assert_equal_states(ours, theirs)


def _their_model_final(folder: Path, settings: dict) -> tuple[torch.nn.Module, Path]:
    """As Detectron2's trainer writes it: model, trainer (optimizer, hooks), iteration."""
    _, cfg = configs(MOCO_YAML, settings)
    torch.manual_seed(11)
    model = build_theirs(cfg)
    optimizer = build_their_optimizer(cfg, model)
    trainer = SimpleTrainer(model, [], optimizer)
    trainer.register_hooks([hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))])
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()  # so that there is momentum
    trainer.iter = 7
    DetectionCheckpointer(model, str(folder), trainer=trainer).save("model_final", iteration=7)
    return model, folder / FINAL_MODEL


@pytest.mark.parametrize("settings", [{}, PLAIN_HEADS, {"MODEL.MASK_ON": True}])
def test_their_model_final_is_evaluated_and_continued_from(settings, tmp_path):
    model, path = _their_model_final(tmp_path, settings)
    ours, _ = models(MOCO_YAML, settings)
    report = load_backbone_weights(ours, path)
    assert report.missing == () and report.dropped == {}
    assert_equal_states(ours, model)
    cfg, _ = configs(MOCO_YAML, {**settings, "MODEL.WEIGHTS": str(path)})
    for eval_only in (True, False):
        words = EmbeddedEngine().check(cfg, eval_only=eval_only)
        assert f"{len(report.loaded)} tensors loaded, 0 new ones" in words


def test_their_model_final_of_other_classes_is_one_clear_line(tmp_path):
    _, path = _their_model_final(tmp_path, {"MODEL.ROI_HEADS.NUM_CLASSES": 5})
    cfg, _ = configs(MOCO_YAML, {"MODEL.WEIGHTS": str(path)})
    with pytest.raises(CheckpointError, match="for 5 classes, MODEL.ROI_HEADS.NUM_CLASSES is 3"):
        EmbeddedEngine().check(cfg, eval_only=True)


def test_their_detector_without_the_extra_norm_is_a_start(tmp_path):
    _, path = _their_model_final(tmp_path, PLAIN_HEADS)
    ours, theirs = models(MOCO_YAML, {})
    report, their_report = load_backbone_weights(ours, path), load_theirs(theirs, path)
    assert_equal_states(ours, theirs)
    assert {name for name in report.missing} == {
        name for name in their_report.missing if not name.endswith("num_batches_tracked")
    }
    assert len(report.missing) == 4 and "4 new ones (roi_heads.res5.norm.*)" in report.words()
    cfg, _ = configs(MOCO_YAML, {"MODEL.WEIGHTS": str(path)})
    with pytest.raises(CheckpointError, match="--eval-only needs a fine-tuned model"):
        EmbeddedEngine().check(cfg, eval_only=True)


def test_a_zoo_detector_with_anchors_and_pixel_statistics(tmp_path):
    ours, theirs = models(None, {})
    arrays = {name: 0.5 + tensor.numpy() for name, tensor in theirs.state_dict().items()}
    beside = {
        "pixel_mean": arrays["backbone.stem.conv1.norm.bias"][:3].reshape(3, 1, 1),
        "pixel_std": arrays["backbone.stem.conv1.norm.bias"][:3].reshape(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": arrays["backbone.stem.conv1.weight"],
    }
    content = {"model": {**arrays, **beside}, "__author__": "Detectron2 Model Zoo"}
    path = tmp_path / "model_final_721ade.pkl"
    path.write_bytes(pickle.dumps(content))
    report = load_backbone_weights(ours, path)
    load_theirs(theirs, path)
    assert report.missing == () and sorted(sum(report.dropped.values(), [])) == sorted(beside)
    assert_equal_states(ours, theirs)


def test_their_own_conversion_of_torchvision(tmp_path):
    """tools/convert-torchvision-to-d2.py of Detectron2 keeps the classifier as `stem.fc`."""
    ours, theirs = models(MOCO_YAML, {})
    arrays = {
        name.removeprefix("backbone.").removeprefix("roi_heads."): (tensor + 2).numpy()
        for name, tensor in theirs.state_dict().items()
        if name.startswith(("backbone.", "roi_heads.res5.")) and "res5.norm" not in name
    }
    arrays["stem.fc.weight"] = arrays["stem.conv1.weight"]
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    path = tmp_path / "r50.pkl"
    path.write_bytes(pickle.dumps(content))
    report = load_backbone_weights(ours, path)
    load_theirs(theirs, path)
    what = "ImageNet classifier or linear projection head"
    assert report.dropped == {what: ["stem.fc.weight"]}
    assert len(report.missing) == 14
    assert_equal_states(ours, theirs)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_official_conversion_of_moco(tmp_path, head):
    """facebookresearch/moco: detection/convert-pretrain-to-detectron2.py, from a file of v2 or v1:
    the head and 53 batch counters are in it."""
    ours, theirs = models(MOCO_YAML, {})
    shape = ResNetShape(50, caffe2_files.STEM, caffe2_files.RES2, caffe2_files.WIDTH)
    checkpoint = narrow_moco(shape.tensor_shapes(), 8 * caffe2_files.RES2, head)
    (tmp_path / "moco.pkl").write_bytes(pickle.dumps(official_conversion(checkpoint)))
    report = load_backbone_weights(ours, tmp_path / "moco.pkl")
    seen = load_theirs(theirs, tmp_path / "moco.pkl")
    [(what, names)] = report.dropped.items()
    assert "projection head" in what and len(names) == {"mlp": 4, "linear": 2}[head]
    assert sorted(seen.unexpected) == sorted(names) and len(report.missing) == 14
    assert len(ours.state_dict()) == 333
    assert_equal_states(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        PLAIN_HEADS,
        {"MODEL.MASK_ON": True},
        {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.BACKBONE.FREEZE_AT": 2},
        {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 2},
        {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
    ],
    ids=["extra norm", "plain heads", "masks", "frozen", "two stages frozen", "agnostic"],
)
def test_our_model_final_is_whole_for_detectron2(settings, tmp_path):
    cfg, their_cfg = configs(MOCO_YAML, settings)
    ours = build_model(cfg)
    optimizer = build_optimizer(cfg, ours)
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    run = SimpleNamespace(
        config_digest="x", seed=0, output_dir=tmp_path, identity=None, changes=Changes()
    )
    save_state(run, tmp_path / FINAL_MODEL, ours, optimizer, iteration=9)
    theirs = build_theirs(their_cfg)
    report = load_theirs(theirs, tmp_path / FINAL_MODEL)
    assert (report.missing, report.unexpected, report.shapes) == ([], [], [])
    assert_equal_states(ours, theirs)
    strict = build_theirs(their_cfg)
    strict.load_state_dict(torch.load(tmp_path / FINAL_MODEL, weights_only=True)["model"])
    assert_equal_states(ours, strict)
    if settings == PLAIN_HEADS:  # control: another head is seen
        other = build_theirs(configs(MOCO_YAML, {})[1])
        assert len(load_theirs(other, tmp_path / FINAL_MODEL).missing) == 4
