"""The table of tools/doctor.py: what it finds, what it makes of what is missing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load_doctor():
    """By its path: other distributions install a package called tools."""
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "tools/doctor.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["doctor"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


doctor = load_doctor()


def states(rows):
    return {row.what: row.state for row in rows}


def test_this_machine_can_run_the_project():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/doctor.py"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for word in ("Python", "torch", "bfloat16", "cores", "memory", "Detectron2", "data sets"):
        assert word in done.stdout
    assert done.stdout.endswith("The project can run here.\n")


def test_what_is_required_is_what_setup_py_says():
    required = doctor.requirements()
    assert required["torch"] == "2.10" and {"torchvision", "fvcore", "PyYAML"} <= required.keys()
    assert all(doctor.release(least) for least in required.values())


def test_a_missing_package_is_an_error_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requirements", lambda: {"no-such-package-here": "3.1"})
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-option-here",))
    assert states(doctor.check_packages()) == {
        "no-such-package-here": doctor.ERROR,
        "no-such-option-here": doctor.NOTE,
    }
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert 'pip install "no-such-package-here>=3.1"' in out
    assert out.endswith("The project cannot run here: no-such-package-here\n")


def test_old_and_broken_packages_are_errors(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "1.9.5+cpu")
    assert doctor.check_package("numpy", "1.10").state == doctor.ERROR
    assert doctor.check_package("numpy", "1.9").state == doctor.OK
    broken = doctor.check_package("no-such-module-here", "1")
    assert broken.state == doctor.ERROR and "cannot be imported" in broken.found


def test_an_old_python_is_an_error(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1, "final", 0))
    (row,) = doctor.check_python()
    assert (row.state, row.found) == (doctor.ERROR, "3.9.1") and "3.10" in row.remedy


def test_the_project_that_does_not_import_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "detection.train_net", None)
    (row,) = doctor.check_project()
    assert row.state == doctor.ERROR and "detection.train_net" in row.found


def test_without_torch_the_rest_is_still_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = states(doctor.collect_rows())
    assert found["torch"] == doctor.ERROR and found["gpu"] == doctor.NOTE
    assert found["cores"] == doctor.OK and "data sets" in found


def test_without_detectron2_it_is_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    (row,) = doctor.check_detectron2()
    assert row.state == doctor.NOTE and "not installed" in row.found and "embedded" in row.remedy


def test_problems_of_detectron2_with_newer_packages_are_notes(monkeypatch, tmp_path):
    from detection.engines import d2_problems

    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.setattr(d2_problems, "installed_at", lambda: tmp_path)
    monkeypatch.setattr(d2_problems, "lacks_pkg_resources", lambda: True)
    monkeypatch.setattr(d2_problems, "outdated", lambda folder: ["np.bool is gone"])
    rows = {row.what: row for row in doctor.check_detectron2()}
    assert "setuptools<81" in rows["setuptools"].remedy
    assert rows["numpy, Pillow"].found == "np.bool is gone"
    assert {row.state for row in rows.values()} == {doctor.NOTE}


def test_data_sets_that_are_there_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert doctor.check_datasets()[0].state == doctor.NOTE
    for folder in ("VOC2007/Annotations", "VOC2007/ImageSets/Main", "VOC2012/Annotations",
                   "coco/annotations"):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "VOC2007/ImageSets/Main/test.txt").write_text("000001\n000002\n")
    (tmp_path / "coco/annotations/instances_val2017.json").write_text("{}")
    (row,) = doctor.check_datasets()
    assert row.state == doctor.OK
    assert row.found == (
        f"{tmp_path}: VOC2007 (test 2), VOC2012 (no splits), coco (instances_val2017)"
    )


@pytest.mark.parametrize("free, state", [(0.5, doctor.NOTE), (4.0, doctor.OK)])
def test_little_shared_memory_is_a_note(monkeypatch, free, state):
    if not Path("/dev/shm").is_dir():
        pytest.skip("this system has no /dev/shm")
    usage = type("Usage", (), {"free": free * 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert states(doctor.check_machine())["/dev/shm"] == state
