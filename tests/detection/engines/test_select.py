import subprocess
import sys

import pytest
import torch.distributed as dist

from detection.config import load_detection_config
from detection.engines.d2 import Detectron2Engine
from detection.engines.select import select_engine
from moco import distributed
from moco.errors import ConfigError


@pytest.fixture
def detectron2_works(monkeypatch):
    monkeypatch.setattr(Detectron2Engine, "unavailable_reason", lambda self: None)


@pytest.fixture
def detectron2_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)


def test_embedded_is_selected_and_can_run_anywhere(detectron2_is_absent):
    engine, why = select_engine("embedded")
    assert engine.name == "embedded" and why == "asked for by --engine"
    assert engine.unavailable_reason() is None
    assert {"torch", "torchvision"} <= engine.versions().keys()


def test_auto_takes_detectron2_where_it_works(detectron2_works):
    engine, why = select_engine("auto")
    assert engine.name == "detectron2" and "Detectron2 works here" in why
    assert select_engine("detectron2")[0].name == "detectron2"


def test_auto_takes_the_embedded_one_else_and_says_why(detectron2_is_absent):
    engine, why = select_engine("auto")
    assert engine.name == "embedded"
    assert why.startswith("auto: Detectron2 is not installed; it is on no package registry")


def test_detectron2_that_is_absent_is_one_line_with_the_remedy(detectron2_is_absent):
    message = "--engine detectron2: Detectron2 is not installed.*guide.*--engine embedded"
    with pytest.raises(ConfigError, match=message) as caught:
        select_engine("detectron2")
    assert "\n" not in str(caught.value)


R18 = ["MODEL.RESNETS.DEPTH", "18"]
NARROW = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]


@pytest.mark.parametrize(
    "words, device_type, name",
    [
        ([], "cpu", "detectron2"),
        (["MODEL.CHANNELS_LAST", "True"], "cuda", "embedded"),
        (["SOLVER.AMP.ENABLED", "True"], "cpu", "embedded"),
        (["SOLVER.AMP.ENABLED", "True"], "cuda", "detectron2"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", *R18], "cpu", "detectron2"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "32", *NARROW, *R18], "cpu", "embedded"),
    ],
)
def test_auto_leaves_to_the_embedded_one_what_only_that_can(
    detectron2_works, words, device_type, name
):
    engine, why = select_engine("auto", load_detection_config(None, words), device_type)
    assert engine.name == name
    assert name == "detectron2" or words[0] in why


@pytest.mark.parametrize("backend, refused", [("gloo", True), ("nccl", False)])
def test_several_processes_need_gpus(monkeypatch, backend, refused):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    reason = Detectron2Engine().unavailable_reason() or ""
    assert ("needs a GPU for each of several processes" in reason) == refused
    if refused:
        assert select_engine("auto")[0].name == "embedded"
        with pytest.raises(ConfigError, match="these 2 are on the CPU.*--engine embedded"):
            select_engine("detectron2")


def test_unknown_engine_names_the_known_ones():
    with pytest.raises(ConfigError, match="'d3'.*auto, detectron2, embedded"):
        select_engine("d3")


def test_only_selecting_imports_detectron2():
    code = (
        "import sys; from detection.engines.select import select_engine\n"
        "select_engine('embedded'); sys.exit('detectron2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
