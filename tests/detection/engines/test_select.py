import subprocess
import sys

import pytest

from detection.engines.select import select_engine
from moco.errors import ConfigError


@pytest.mark.parametrize("name", ["auto", "embedded"])
def test_embedded_is_selected_and_says_why(name):
    engine, why = select_engine(name)
    assert engine.name == "embedded"
    assert engine.unavailable_reason() is None
    assert {"torch", "torchvision"} <= engine.versions().keys()
    assert ("no other engine" in why) == (name == "auto")


def test_detectron2_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="only the embedded engine.*--engine embedded") as caught:
        select_engine("detectron2")
    assert "\n" not in str(caught.value)


def test_unknown_engine_names_the_known_ones():
    with pytest.raises(ConfigError, match="'d3'.*auto, detectron2, embedded"):
        select_engine("d3")


def test_selecting_imports_no_detectron2():
    code = (
        "import sys; from detection.engines.select import select_engine; select_engine('auto'); "
        "sys.exit('detectron2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
