"""The direction of imports, read from the syntax trees; files stay readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p.relative_to(ROOT) for d in ("moco", "detection", "tools") for p in (ROOT / d).rglob("*.py")
)
BASE = {
    "moco.errors", "moco.safe_yaml", "moco.cfgnode", "moco.config", "moco.seeding",
    "moco.devices", "moco.distributed", "moco.lost_rank", "moco.shuffle", "moco.signals",
    "moco.child_processes", "moco.slots", "moco.process_group",
}  # fmt: skip
MOCO_LAYERS = {  # package -> what of moco it may import besides BASE and itself
    "moco.data": set(),
    "moco.kernels": set(),
    "moco.models": {"moco.kernels"},
    "moco.contrast": {"moco.kernels"},
    "moco.methods": {"moco.data", "moco.models", "moco.contrast"},
    "moco.training": {"moco.data", "moco.kernels", "moco.models", "moco.contrast", "moco.methods"},
    "moco.evaluation": {  # of training only what knows no method
        "moco.data", "moco.kernels", "moco.models", "moco.training.checkpoint",
        "moco.training.guard", "moco.training.layouts", "moco.training.optimizer",
        "moco.training.progress", "moco.training.retention", "moco.training.run_lock",
    },
    "moco.studies": {"moco.methods", "moco.training"},
    "moco.reporting": {"moco.data", "moco.studies", "moco.training"},
    "moco.benchmarks": {
        "moco.data", "moco.kernels", "moco.models", "moco.contrast", "moco.methods",
        "moco.training", "moco.evaluation",
    },
}  # fmt: skip
OF_MOCO_IN_DETECTION = {
    "moco", "moco.errors", "moco.safe_yaml", "moco.cfgnode", "moco.seeding", "moco.devices",
    "moco.distributed", "moco.process_group", "moco.signals", "moco.slots",
    "moco.data", "moco.data.image_hash", "moco.data.image_rows",  # as pretraining has them
    "moco.training", "moco.training.changes", "moco.training.checkpoint",
    "moco.training.image_record", "moco.training.layouts", "moco.training.optimizer",
    "moco.training.run_lock", "moco.kernels",
    "moco.benchmarks", "moco.benchmarks.record",
    "moco.reporting", "moco.reporting.page",
    # One decoder: fine-tuning must see the pixels that pretraining saw.
    "moco.data.rgb", "moco.data.sixteen_bit",
}  # fmt: skip


OF_DETECTRON2 = {"detection.engines.d2", "detection.engines.d2_scores"}  # import Detectron2
PACKAGES = {  # not what is in them
    "moco", "moco.data", "moco.training", "moco.benchmarks", "moco.reporting",
}  # fmt: skip


def imports(path):
    """Dotted names of all modules a file imports, `from a import b` given as a and a.b."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(name, packages):
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def violations(path, names):
    module = ".".join(path.with_suffix("").parts)
    for name in names:
        if under(module, ["moco"]) and under(name, ["detection"]):
            yield name
        layer = next((p for p in MOCO_LAYERS if under(module, [p])), None)
        if (
            layer
            and name.startswith("moco.")
            and not under(name, BASE | MOCO_LAYERS[layer] | {layer})
        ):
            if name not in ("moco.training",):  # the package of an allowed module
                yield name
        if under(module, ["detection"]) and name.startswith("moco"):
            if not under(name, OF_MOCO_IN_DETECTION - PACKAGES) and name not in PACKAGES:
                yield name
        if under(name, ["torchvision.models.detection"]) and not under(
            module, ["detection.engines.embedded"]
        ):
            yield name
        if under(name, ["detectron2"]) and module not in OF_DETECTRON2:
            yield name


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path):
    assert list(violations(path, imports(path))) == []


@pytest.mark.parametrize(
    "path, name",
    [
        ("moco/data/images.py", "detection.data"),
        ("moco/models/heads.py", "moco.methods.moco"),
        ("moco/methods/moco.py", "moco.training.step"),
        ("moco/evaluation/knn.py", "moco.training.step"),
        ("detection/trials.py", "moco.models.backbone"),
        ("detection/trials.py", "torchvision.models.detection"),
        ("detection/engines/select.py", "detectron2.config"),
    ],
)
def test_negative_control_a_wrong_import_is_seen(path, name):
    assert list(violations(Path(path), [name])) == [name]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_has_over_400_lines(path):
    assert len((ROOT / path).read_text().splitlines()) <= 400


def test_packages_import_without_detectron2_or_a_gpu():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import moco, detection, detection.train_net, moco.training.trainer\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)
