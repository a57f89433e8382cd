"""The reason and the remedy where Detectron2 does not work; it need not be installed for this."""

import sys

import pytest

from detection.engines import d2_problems
from detection.engines.d2 import Detectron2Engine


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("No module", name="detectron2"), "not installed.*installation|guide"),
        (
            ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources"),
            r'setuptools 81 removed pkg_resources: pip install "setuptools<81"',
        ),
        (ModuleNotFoundError("No module named 'omegaconf'", name="omegaconf"), "package omegaconf"),
        (
            ModuleNotFoundError("No module named 'detectron2._C'", name="detectron2._C"),
            "compiled operators do not load.*build Detectron2 again",
        ),
        (ImportError("_C.so: undefined symbol: _ZN2at"), "undefined symbol.*build Detectron2"),
        (OSError("libcudart.so.11.0: cannot open shared object file"), "libcudart.*build"),
        (AttributeError("module 'PIL.Image' has no attribute 'LINEAR'"), "Pillow 10.*pillow<10"),
        (AttributeError("module 'numpy' has no attribute 'bool'."), "numpy 1.24.*numpy 2"),
        (RuntimeError("something\nelse"), "RuntimeError: something else.*guide"),
    ],
)
def test_reason_and_remedy(error, reason):
    import re

    text = d2_problems.explain(error)
    assert re.search(reason, text) and "\n" not in text


def test_what_fails_while_importing_is_the_reason(monkeypatch):
    class Failing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "detectron2":
                raise AttributeError("module 'PIL.Image' has no attribute 'LINEAR'")

    for name in [n for n in sys.modules if n.split(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Failing, *sys.meta_path])
    assert "Pillow 10 removed Image.LINEAR" in Detectron2Engine().unavailable_reason()


@pytest.mark.parametrize(
    "numpy, pillow, expected",
    [
        ("1.23.5", "9.5.0", []),
        ("1.26.4", "9.5.0", ["np.bool"]),
        ("2.1.0", "9.5.0", []),
        ("1.23.5", "10.0.1", ["LINEAR"]),
        ("1.24.0", "12.1", ["np.bool", "LINEAR"]),
    ],
)
def test_an_old_detectron2_with_newer_packages_is_seen(tmp_path, numpy, pillow, expected):
    (tmp_path / "data/transforms").mkdir(parents=True)
    (tmp_path / "structures").mkdir()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "data/transforms/transform.py").write_text("def f(interp=Image.LINEAR): ...\n")
    (tmp_path / "structures/masks.py").write_text("x = np.bool_\n")
    (tmp_path / "evaluation/voc.py").write_text("x = y.astype(np.bool)\n")
    found = d2_problems.outdated(tmp_path, numpy, pillow)
    assert len(found) == len(expected)
    assert all(word in line for word, line in zip(expected, found, strict=True))


def test_a_new_detectron2_has_no_problem(tmp_path):
    (tmp_path / "structures").mkdir()
    (tmp_path / "structures/masks.py").write_text("x = np.bool_; y = np.boolean; z = bool\n")
    assert d2_problems.outdated(tmp_path, "1.26.4", "12.0") == []


def test_not_installed_has_no_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert d2_problems.installed_at() is None
