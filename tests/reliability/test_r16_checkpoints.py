"""R16: wrong, swapped, incomplete checkpoints: refused, or matched one to one, never in part."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from damaged_checkpoints import (
    DAMAGES,
    HARMLESS_TO_A_BACKBONE,
    PREFIXES,
    moco_content,
    named,
    resnet50_content,
)

from detection import weights
from detection.config import load_detection_config
from detection.convert import convert_checkpoint
from detection.engines.embedded.faster_rcnn import build_model
from detection.keymap import ResNetShape, to_detectron2
from detection.weights import DECLARED_MISSING, load_backbone_weights
from detection.weights_file import read_weights_file
from moco.cfgnode import to_dict
from moco.errors import CheckpointError
from moco.evaluation.weights import read_pretrained
from moco.methods import build_method
from moco.training import fit, layouts, layouts_network, state
from moco.training.identity import RunIdentity
from moco.training.layouts_network import ResNet
from moco.training.optimizer import build_optimizer

pytestmark = pytest.mark.faults
SHAPE = ResNetShape(50, stem_out_channels=8, res2_out_channels=32, width_per_group=8)
DETECTOR = [
    *("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeadsExtraNorm", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float())


def of_encoder(content: dict, encoder: str) -> dict[str, torch.Tensor]:
    """The tensors of an encoder's backbone under their names in the file, whatever its wrapper."""
    own = named(content)
    return {n: t for n, t in own.items() if f"encoder_{encoder}." in n and ".fc." not in n}


def bare(name: str) -> str:
    return name.partition("encoder_q.")[2] or name.partition("encoder_k.")[2]


def is_converted(path: Path, content: dict, encoder: str = "query") -> bool:
    """Every name is mapped or dropped; every tensor of R50 is in the output with its value."""
    report = convert_checkpoint(path, path.with_suffix(".out.pth"), encoder=encoder)
    out = read_weights_file(path.with_suffix(".out.pth")).tensors
    own = of_encoder(content, encoder[0])
    dropped = [name for names in report.dropped.values() for name in names]
    return (
        sorted([*report.names, *dropped]) == sorted(named(content))
        and list(out) == [to_detectron2(name) for name in SHAPE.tensor_shapes()]
        and all(target == to_detectron2(bare(name)) for name, target in report.names.items())
        and all(equal(own[name], out[target]) for name, target in report.names.items())
        and len(report.names) == len(out)
    )


def is_evaluated(path: Path, content: dict) -> bool:
    """The encoder that kNN and linear classification use is the file's query encoder."""
    pretrained = read_pretrained(str(path))
    own = {bare(name): tensor for name, tensor in of_encoder(content, "q").items()}
    whole = ResNet(18, 8, 8, 8, stem_size=3).tensor_shapes()
    encoder = pretrained.build_encoder(image_size=16).state_dict()
    return (
        sorted(own) == sorted(whole) == sorted(n for n in encoder if not n.startswith("fc."))
        and all(equal(encoder[name], tensor) for name, tensor in own.items())
    )


def is_resumed(path: Path, content: dict) -> bool:
    """`--resume-from`: every tensor of the method and every moment is the file's."""
    cfg = tiny.config()
    method = build_method(cfg)
    optimizer = build_optimizer(cfg, method)
    identity = RunIdentity(to_dict(cfg), "", "", 1, tiny.STEPS_PER_EPOCH)
    found = state.find_checkpoint(path.parent / "run", False, str(path), print)
    step = state.restore(found, method=method, optimizer=optimizer, identity=identity)
    own = {name.removeprefix("module."): t for name, t in named(content).items()}
    moments = {n: entry["momentum_buffer"] for n, entry in content["optimizer"]["state"].items()}
    trained = [i for i, p in enumerate(method.parameters()) if p.requires_grad]
    parameters = list(method.parameters())
    return (
        step == content["epoch"] * tiny.STEPS_PER_EPOCH
        and sorted(own) == sorted(method.state_dict())
        and all(equal(own[name], tensor) for name, tensor in method.state_dict().items())
        and sorted(moments) == trained
        and all(equal(moments[i], optimizer.state[parameters[i]]["momentum_buffer"])
                for i in trained)
    )  # fmt: skip


def outcome(check: Callable[[], bool], path: Path) -> str:
    """"refused", "matched", or what must never be."""
    try:
        return "matched" if check() else "IN PART"
    except CheckpointError as error:
        text = str(error)
        return "refused" if "\n" not in text and path.name in text else f"UNCLEAR {text}"
    except Exception as error:
        return f"UNCAUGHT {type(error).__name__}: {error}"


def outcomes(folder: Path, contents: dict[str, dict], check) -> dict[str, str]:
    found = {}
    for number, (name, content) in enumerate(contents.items()):
        path = folder / f"{number:03d}.pth.tar"
        torch.save(content, path)
        found[name] = outcome(functools.partial(check, path, content), path)
        path.unlink()
    return found


def damaged(build: Callable[[str], dict], prefixes) -> dict[str, dict]:
    return {
        f"{name}, {prefix!r}": damage(copy.deepcopy(build(prefix)), prefix)
        for prefix in prefixes
        for name, damage in DAMAGES.items()
    }


def compare(found: dict[str, str], matched: set[str], observed) -> None:
    """`matched`: damages that leave alone what is read; all others must be refused."""
    wanted = {n: "matched" if n.rpartition(",")[0] in matched else "refused" for n in found}
    wrong = {name: said for name, said in found.items() if said != wanted[name]}
    assert not wrong
    observed("R16", len(found) - len(wrong), len(found))


def test_the_converter(tmp_path, observed, long):
    contents = damaged(resnet50_content, PREFIXES if long else PREFIXES[:2])
    found = outcomes(tmp_path, contents, is_converted)
    compare(found, {"none", "swapped"} | HARMLESS_TO_A_BACKBONE, observed)


def test_the_converter_takes_the_key_encoder_where_told_so(tmp_path, observed):
    contents = {f"none, {prefix!r}": resnet50_content(prefix) for prefix in PREFIXES}
    check = functools.partial(is_converted, encoder="key")
    compare(outcomes(tmp_path, contents, check), {"none"}, observed)


def test_knn_and_linear_classification(tmp_path, observed, long):
    contents = damaged(moco_content, PREFIXES if long else PREFIXES[:2])
    found = outcomes(tmp_path, contents, is_evaluated)
    compare(found, {"none", "swapped"} | HARMLESS_TO_A_BACKBONE, observed)


def test_resume_from(tmp_path, observed):
    found = outcomes(tmp_path, damaged(moco_content, ("module.", "")), is_resumed)
    compare(found, {"none", "swapped"}, observed)


def test_resume_from_a_file_that_its_manifest_does_not_vouch_for(tmp_path, observed):
    torch.save(moco_content("module."), tmp_path / "a.pth.tar")
    (tmp_path / "a.pth.tar.manifest.json").write_text('{"bytes": 1, "sha256": "0", "step": 4}')
    check = functools.partial(is_resumed, tmp_path / "a.pth.tar", moco_content("module."))
    observed("R16", int(outcome(check, tmp_path / "a.pth.tar") == "refused"), 1)


# Detection: the converter's output, damaged.
def converted(folder: Path) -> dict[str, torch.Tensor]:
    torch.save(resnet50_content("module."), folder / "whole.pth.tar")
    convert_checkpoint(folder / "whole.pth.tar", folder / "whole.pth")
    return read_weights_file(folder / "whole.pth").tensors


def without(names: Callable[[str], bool]) -> Callable[[dict], dict]:
    return lambda model: {name: tensor for name, tensor in model.items() if not names(name)}


def renamed(change: Callable[[str], str]) -> Callable[[dict], dict]:
    return lambda model: {change(name): tensor for name, tensor in model.items()}


def with_one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda model: {**model, name: change(model[name])}


CONV = "res3.0.conv2.weight"
DETECTION_DAMAGES = {
    "none": dict,
    "with the detector's prefix": renamed(
        lambda n: f"roi_heads.{n}" if n.startswith("res5") else f"backbone.{n}"
    ),
    "one tensor missing": without(lambda n: n == CONV),
    "one norm missing": without(lambda n: n.startswith("res4.2.conv1.norm.")),
    "a stage missing": without(lambda n: n.startswith("res5.")),
    "the stem missing": without(lambda n: n.startswith("stem.")),
    "running means missing": without(lambda n: n.endswith("running_mean")),
    "under module.": renamed(lambda n: f"module.{n}"),
    "one under module.": renamed(lambda n: f"module.{n}" if n == CONV else n),
    "under another prefix": renamed(lambda n: f"teacher.{n}"),
    "a name twice": lambda m: {**m, f"backbone.{CONV}": m[CONV]},
    "an unknown tensor": lambda m: {**m, "res3.0.conv4.weight": m[CONV]},
    "two tensors swapped": lambda m: {
        **m, "res2.0.conv1.weight": m["res2.0.conv3.weight"],
        "res2.0.conv3.weight": m["res2.0.conv1.weight"],
    },
    "transposed": with_one("res2.0.conv3.weight", lambda t: t.transpose(0, 1).contiguous()),
    "wider": with_one(CONV, lambda t: torch.cat([t, t])),
    "flat": with_one(CONV, lambda t: t.flatten()),
    "NaN": with_one(CONV, lambda t: t * float("nan")),
    "Inf": with_one("res3.0.conv2.norm.running_var", lambda t: t / 0),
    "whole numbers": with_one(CONV, lambda t: t.to(torch.int64)),
    "no tensor": lambda m: {**m, CONV: "x"},
    "half a box predictor": lambda m: {**m, "box_predictor.cls_score.bias": torch.zeros(4)},
    "nothing": lambda m: {},
}  # fmt: skip


def is_loaded(model: torch.nn.Module, path: Path, content: dict) -> bool:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_backbone_weights(model, path)
    after, own = model.state_dict(), content["model"]
    sources = {name: [n for n in own if f".{name}".endswith(f".{n}")] for name in report.loaded}
    backbone = [n for n in after if not n.startswith(DECLARED_MISSING) and "num_batches" not in n]
    return (
        sorted(report.loaded) == sorted(backbone)
        and all(len(names) == 1 for names in sources.values())
        and sorted(names[0] for names in sources.values()) == sorted(own)
        and all(equal(after[name], own[names[0]]) for name, names in sources.items())
        and all(equal(after[name], before[name]) for name in after if name not in sources)
    )


@pytest.fixture(scope="module")
def detector():
    return build_model(load_detection_config(None, DETECTOR))


def detection_outcomes(folder: Path, detector, names=tuple(DETECTION_DAMAGES)) -> dict[str, str]:
    model = converted(folder)
    contents = {f"{n}, ''": {"model": DETECTION_DAMAGES[n](dict(model))} for n in names}
    return outcomes(folder, contents, functools.partial(is_loaded, detector))


def test_the_detectors_weights(tmp_path, detector, observed):
    found = detection_outcomes(tmp_path, detector)
    compare(found, {"none", "with the detector's prefix"}, observed)


# Controls: the same checks, without one guard each.
def counted(found: dict[str, str]) -> int:
    return sum(said == "IN PART" for said in found.values())


def test_control_layouts_without_their_coverage_match_in_part(tmp_path, monkeypatch, observed):
    monkeypatch.setattr(layouts_network, "_check_coverage", lambda *args: None)
    monkeypatch.setattr(layouts, "_reason", lambda *args: "whatever")
    content = DAMAGES["a block's norm missing"](moco_content("module."), "module.")
    own = {**content, "state_dict": {**content["state_dict"], "module.stray": torch.ones(1)}}
    torch.save(own, tmp_path / "a.pth.tar")

    def check() -> bool:
        backbone = layouts.read_backbone(layouts.read_weights(tmp_path / "a.pth.tar"), "a.pth.tar")
        return sorted(backbone.state) == sorted(backbone.network.tensor_shapes())

    observed("R16", int(outcome(check, tmp_path / "a.pth.tar") == "IN PART"), 1, control=True)


def test_control_a_resume_without_its_checks_takes_half_an_optimizer(
    tmp_path, monkeypatch, observed
):
    monkeypatch.setattr(fit, "check_optimizer", lambda *args, **options: None)
    name = "half of the moments missing"
    contents = {name: DAMAGES[name](moco_content("module."), "module.")}
    found = outcomes(tmp_path, contents, is_resumed)
    observed("R16", counted(found), 1, control=True)


def test_control_a_detector_without_its_check_of_what_lacks(
    tmp_path, detector, monkeypatch, observed
):
    monkeypatch.setattr(weights, "_check_missing", lambda *args: None)
    names = ("one tensor missing", "a stage missing", "the stem missing")
    found = detection_outcomes(tmp_path, detector, names)
    observed("R16", counted(found), len(names), control=True)
