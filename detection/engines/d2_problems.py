"""Why Detectron2 does not work on a machine, and what to do; it is not imported here.

Detectron2 is compiled against one torch and changes rarely, while what it is built on does. Known:
Pillow 10 removed Image.LINEAR, which it used as a default until 2023; numpy 1.24 removed np.bool
(back in numpy 2); setuptools 81 removed pkg_resources, which its `model_zoo` imports.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import PIL

INSTALLATION = (
    "it is on no package registry; install it as its own guide says, "
    "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
)
_REMEDIES = {
    "pkg_resources": 'setuptools 81 removed pkg_resources: pip install "setuptools<81"',
    "LINEAR": "Pillow 10 removed Image.LINEAR: update Detectron2, or pip install 'pillow<10'",
    "np.bool": "numpy 1.24 removed np.bool: update Detectron2, or install numpy 2",
}
# Where Detectron2 names what newer packages lack, in what is used of it.
_SOURCES = ("data/transforms/transform.py", "structures/masks.py", "evaluation", "modeling")


def explain(error: BaseException) -> str:
    """In one line, why importing Detectron2 failed with `error`, and the remedy."""
    text = " ".join(str(error).split())
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if missing == "detectron2":
        return f"Detectron2 is not installed; {INSTALLATION}"
    for word, remedy in _REMEDIES.items():
        if word in text or (word == "np.bool" and "'numpy' has no attribute 'bool'" in text):
            return f"Detectron2 cannot be imported ({text}); {remedy}"
    if missing and not missing.startswith("detectron2"):
        return f"Detectron2 needs the package {missing}, which is not installed; install it"
    if isinstance(error, ImportError | OSError) and ("_C" in text or ".so" in text):
        return (
            f"Detectron2's compiled operators do not load ({text}); they were built for another "
            f"torch: build Detectron2 again with this one"
        )
    return f"Detectron2 cannot be imported ({type(error).__name__}: {text}); {INSTALLATION}"


def installed_at() -> Path | None:
    """Detectron2's folder, None where it is not installed."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except (ImportError, ValueError):  # sys.modules may say that it is not to be imported
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def outdated(folder: Path, numpy_version: str | None = None, pillow_version: str | None = None):
    """What the Detectron2 in `folder` uses and the installed numpy and Pillow removed.

    Importing need not fail of it, training does. The versions default to the installed ones.
    Returns: list of "reason: remedy" lines.
    """
    numpy = _release(numpy_version or np.__version__)
    pillow = _release(pillow_version or PIL.__version__)
    wanted = []
    if (1, 24) <= numpy < (2, 0):
        wanted.append((r"\bnp\.bool\b", "np.bool"))
    if pillow >= (10, 0):
        wanted.append((r"\bImage\.LINEAR\b", "LINEAR"))
    files = [path for name in _SOURCES for path in _python_files(folder / name)]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files] if wanted else []
    return [_REMEDIES[key] for regex, key in wanted if any(re.search(regex, t) for t in texts)]


def lacks_pkg_resources() -> bool:
    """Whether Detectron2's model_zoo cannot be imported here; this project does not use it."""
    return importlib.util.find_spec("pkg_resources") is None


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def on_the_cpu(num_processes: int) -> str:
    """Why several CPU processes cannot train: its data-parallel wrapper names a GPU for each."""
    return (
        "Detectron2's trainer needs a GPU for each of several processes, and these "
        f"{num_processes} are on the CPU; use one process"
    )
