"""What this machine can run: packages, processor and GPU, memory, Detectron2, data sets.

    python tools/doctor.py

Exit status 0 if the project itself can run here, 1 if not; what is marked "note" is optional.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OK, NOTE, ERROR = "ok", "note", "ERROR"
LEAST_PYTHON = (3, 10)
LEAST_SHM_GIB = 1.0
MODULE_OF = {"PyYAML": "yaml", "pillow": "PIL", "opencv-python-headless": "cv2"}
OPTIONAL = ("pycocotools", "opencv-python-headless")
_VOC_SPLITS = ("trainval", "test")


@dataclass(frozen=True)
class Row:
    """One line of the table; `remedy` is what to do unless it is ok."""

    what: str
    state: str
    found: str
    remedy: str = ""


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    rows = collect_rows()
    print("\n".join(table(rows)))
    errors = [row.what for row in rows if row.state == ERROR]
    if errors:
        print(f"\nThe project cannot run here: {', '.join(errors)}")
        return 1
    print("\nThe project can run here.")
    return 0


def collect_rows() -> list[Row]:
    """All checks; one that fails itself is a row that says so."""
    rows = []
    checks: tuple[Callable[[], Iterable[Row]], ...] = (
        check_python, check_packages, check_project, check_gpu, check_bfloat16, check_machine,
        check_detectron2, check_datasets,
    )  # fmt: skip
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows += check()
        except ImportError as error:  # a package that check_packages has named
            rows.append(Row(name, NOTE, f"not checked ({_one_line(error)})"))
    return rows


def table(rows: list[Row]) -> list[str]:
    """The rows as aligned lines, a remedy on a line of its own."""
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.what:{width}}  {row.state:5}  {row.found}")
        if row.remedy and row.state != OK:
            lines.append(f"{'':{width}}         -> {row.remedy}")
    return lines


def check_python() -> list[Row]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= LEAST_PYTHON:
        return [Row("Python", OK, found)]
    least = ".".join(map(str, LEAST_PYTHON))
    return [Row("Python", ERROR, found, f"install Python {least} or newer")]


def check_packages() -> list[Row]:
    """Each package that setup.py requires, and the optional ones."""
    required = requirements()
    rows = [check_package(name, least) for name, least in required.items()]
    for name in OPTIONAL:
        if name not in required:
            row = check_package(name, "")
            state = NOTE if row.state == ERROR else row.state
            rows.append(Row(name, state, row.found, f"optional; {row.remedy}"))
    return rows


def requirements() -> dict[str, str]:
    """{package: least version} of install_requires in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and _is_setup(n))
    value = next(k.value for k in call.keywords if k.arg == "install_requires")
    return dict(
        re.match(r"([\w.-]+)(?:>=)?(.*)", text).groups() for text in ast.literal_eval(value)
    )


def _is_setup(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == "setup"


def check_package(name: str, least: str) -> Row:
    """Whether a package is installed, new enough and importable."""
    wanted = f"{name}>={least}" if least else name
    remedy = f'pip install "{wanted}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Row(name, ERROR, "not installed", remedy)
    if least and release(version) < release(least):
        return Row(name, ERROR, f"{version}, {least} or newer is needed", remedy)
    try:
        importlib.import_module(MODULE_OF.get(name, name))
    except Exception as error:  # a compiled package may raise anything
        found = f"{version}, cannot be imported ({_one_line(error)})"
        return Row(name, ERROR, found, f"install it anew: {remedy}")
    return Row(name, OK, version)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, e.g. (2, 14, 1) of "2.14.1+cu130"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def check_project() -> list[Row]:
    for module in ("moco.training.trainer", "detection.train_net"):
        try:
            importlib.import_module(module)
        except Exception as error:  # of a broken package, it may be anything
            found = f"{module} cannot be imported ({_one_line(error)})"
            return [Row("this project", ERROR, found, "install the packages above")]
    return [Row("this project", OK, str(ROOT))]


def check_gpu() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        found = "none seen by torch" + (
            f", which is built for {built}" if built else " (CPU build)"
        )
        return [Row("GPU", NOTE, found, "everything runs on the CPU, slowly; no action is needed")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        rows.append(Row(f"GPU {index}", OK, f"{found}, CUDA {torch.version.cuda}"))
    return rows


def check_bfloat16() -> list[Row]:
    import torch

    cpu_info = Path("/proc/cpuinfo")
    has_bf16 = "bf16" in cpu_info.read_text() if cpu_info.is_file() else None
    found = {True: "has instructions for it", False: "no instructions", None: "unknown"}[has_bf16]
    remedy = "" if has_bf16 else "AMP.ENABLED on the CPU is correct, but may be slower than fp32"
    rows = [Row("bfloat16, CPU", OK if has_bf16 else NOTE, found, remedy)]
    if torch.cuda.is_available():
        ok = torch.cuda.is_bf16_supported(including_emulation=False)
        remedy = "AMP.ENABLED would be slower than fp32"
        rows.append(Row("bfloat16, GPU", OK if ok else NOTE, "yes" if ok else "emulated", remedy))
    return rows


def check_machine() -> list[Row]:
    """Cores, memory and shared memory that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [Row("cores", OK, f"{usable} usable of {os.cpu_count()}"), _memory()]
    if not Path("/dev/shm").is_dir():
        return rows
    free = shutil.disk_usage("/dev/shm").free / 2**30
    enough = free >= LEAST_SHM_GIB
    remedy = "loader workers share memory through it: docker --shm-size, or NUM_WORKERS 0"
    rows.append(Row("/dev/shm", OK if enough else NOTE, f"{free:.1f} GiB free", remedy))
    return rows


def _memory() -> Row:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return Row("memory", NOTE, "unknown on this system")
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), re.MULTILINE))
    total, free = (int(kib[key]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    found = f"{free:.1f} GiB free of {total:.1f}"
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        found += f"; this process group is limited to {int(text) / 2**30:.1f} GiB"
    return Row("memory", OK, found)


def check_detectron2() -> list[Row]:
    """Detectron2 is optional: without it the embedded engine runs."""
    from detection.engines import d2_problems
    from detection.engines.d2 import Detectron2Engine

    engine = Detectron2Engine()
    folder = d2_problems.installed_at()
    reason = engine.unavailable_reason()
    if reason:
        rows = [Row("Detectron2", NOTE, reason, "optional: --engine embedded needs none of it")]
    else:
        found = f"{engine.versions()['detectron2']}, works, compiled operators load; {folder}"
        rows = [Row("Detectron2", OK, found)]
    if folder is None:
        return rows
    if d2_problems.lacks_pkg_resources():
        found = "no pkg_resources: Detectron2's model_zoo cannot be imported"
        remedy = 'not used here; for your own use of it: pip install "setuptools<81"'
        rows.append(Row("setuptools", NOTE, found, remedy))
    else:
        rows.append(Row("setuptools", OK, "has pkg_resources, which Detectron2's model_zoo uses"))
    outdated = d2_problems.outdated(folder)
    state = NOTE if outdated else OK
    found = "; ".join(outdated) or "nothing that Detectron2 uses is removed from them"
    rows.append(Row("numpy, Pillow", state, found))
    return rows


def check_datasets() -> list[Row]:
    """What is under $DETECTRON2_DATASETS; other folders are named in a configuration."""
    root = Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))
    found = [text for year in ("VOC2007", "VOC2012") if (text := _voc_in_words(root / year))]
    if (root / "coco" / "annotations").is_dir():
        files = sorted((root / "coco" / "annotations").glob("instances_*.json"))
        found.append(f"coco ({', '.join(path.stem for path in files) or 'no instances_*.json'})")
    if found:
        return [Row("data sets", OK, f"{root}: {', '.join(found)}")]
    remedy = "set DETECTRON2_DATASETS to the folder that holds VOC2007, VOC2012 or coco"
    return [Row("data sets", NOTE, f"{root}: no VOC2007, VOC2012 or coco", remedy)]


def _voc_in_words(root: Path) -> str | None:
    """E.g. "VOC2007 (trainval 5011, test 4952)"; None where there is no such folder."""
    if not (root / "Annotations").is_dir():
        return None
    counts = []
    for split in _VOC_SPLITS:
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        if path.is_file():
            counts.append(f"{split} {len(path.read_text().split())}")
    return f"{root.name} ({', '.join(counts) or 'no splits'})"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


if __name__ == "__main__":
    sys.exit(main())
