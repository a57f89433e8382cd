"""Record golden arrays from Detectron2, which the embedded engine must equal without it.

    python tests/parity/record_detectron2.py              write tests/parity/golden/
    python tests/parity/record_detectron2.py --check      compare what is there with Detectron2
    python tests/parity/record_detectron2.py --table      print docs/COMPATIBILITY.md's table

Needs Detectron2. Weights and images are functions of names and seeds (`cases.py`), so neither is
stored. Anchors and regions are sampled with `torch.randperm` on the CPU after
`torch.manual_seed`: torch promises no equal numbers across versions, but has kept these; should
it not, `sampled_index` is the first quantity to differ.

One function a golden file: `RECORDERS` maps a file's name to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:1] = [str(_ROOT), str(_ROOT / "tests")]

import detectron2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.solver import build_lr_scheduler  # noqa: E402
from parity import golden  # noqa: E402
from parity.cases import CASES, GOLDEN_CASES, LIVELY_CASES, SUPERVISED_YAML, uniform  # noqa: E402
from parity.detectron2_side import Detectron2  # noqa: E402
from parity.mask_golden_detectron2 import record as record_mask_head  # noqa: E402
from parity.observed import Embedded, Named, run_case  # noqa: E402

from moco.cfgnode import flatten  # noqa: E402

LR_ITERATIONS = (*range(0, 103), *range(17_998, 18_003), *range(21_998, 22_003), 23_999)
_NOISE = 1e-6
# Other code paths of the same processor: what another machine's rounding is like.
_OTHER_CPUS = {
    "SSE": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "no oneDNN": {"PARITY_NO_ONEDNN": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
}


def record_case(name: str) -> dict[str, np.ndarray]:
    """The golden arrays of a case. Momenta are left out: the weights follow from them.

    Raises: SystemExit where a discrete choice hangs on rounding: another seed is needed.
    """
    case = CASES[name]
    seen = run_case(lambda: Detectron2(case), case)
    for draw in range(3):
        noisy = run_case(lambda draw=draw: _noisy(Detectron2(case), draw), case)
        moved = [key for key in seen if _is_discrete(seen[key]) and not _same(noisy, seen, key)]
        if moved:
            raise SystemExit(f"{name}: noise of {_NOISE} in the weights moves {moved[:3]}")
    return golden.pack({k: v for k, v in seen.items() if golden.quantity(k) != "momentum"})


def _noisy(side: Detectron2, draw: int) -> Detectron2:
    with torch.no_grad():
        for name, parameter in side.model.named_parameters():
            noise = uniform(f"{name}, noise {draw}", 0, parameter.numel())
            noise = torch.from_numpy(noise.astype(np.float32)).view_as(parameter)
            parameter.mul_(1.0 + _NOISE * noise)
    return side


def _is_discrete(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point()


def _same(ours: Named, theirs: Named, key: str) -> bool:
    return key in ours and torch.equal(ours[key], theirs[key])


def record_defaults() -> dict:
    """Every key of Detectron2's `get_cfg()`: dotted name -> repr of its default."""
    return {key: repr(value) for key, value in sorted(flatten(get_cfg()).items())}


def record_learning_rates() -> dict:
    """Iteration -> repr of the learning rate, in the 24k schedule."""
    cfg = get_cfg()
    cfg.merge_from_file(str(SUPERVISED_YAML))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = {}
    for iteration in range(cfg.SOLVER.MAX_ITER):
        if iteration in LR_ITERATIONS:
            rates[str(iteration)] = repr(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# File name -> function without arguments: arrays go to .npz, other things to .json.
RECORDERS = {f"{name}.npz": (lambda name=name: record_case(name)) for name in GOLDEN_CASES}
RECORDERS |= {"defaults.json": record_defaults, "lr_24k.json": record_learning_rates}
RECORDERS["mask_head.npz"] = record_mask_head


def write(names: list[str]) -> None:
    """Raises: SystemExit for some of the files on another platform than that of the others."""
    if set(names) != set(RECORDERS) and golden.platform_differences():
        raise SystemExit(f"record all files again: {'; '.join(golden.platform_differences())}")
    for name in names:
        content = RECORDERS[name]()
        path = golden.FOLDER / name
        if path.suffix == ".npz":
            np.savez_compressed(path, **content)
        else:
            path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{path.name}: {path.stat().st_size} bytes")
    about = {
        "command": "python tests/parity/record_detectron2.py",
        "detectron2": detectron2.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "fingerprint": golden.fingerprint(),
    }
    (golden.FOLDER / "recorded.json").write_text(json.dumps(about, indent=1) + "\n")


def check(names: list[str]) -> bool:
    """Whether Detectron2 still gives what is stored."""
    all_equal = True
    for name in names:
        path = golden.FOLDER / name
        content = RECORDERS[name]()
        if path.suffix == ".npz":
            stored = golden.load(path.stem)
            equal = all(np.array_equal(stored[key], content[key]) for key in content)
        else:
            equal = json.loads(path.read_text()) == content
        print(f"{name}: {'equal' if equal else 'DIFFERENT'}")
        all_equal &= equal
    return all_equal


def live_rows() -> dict[str, list]:
    """Quantity -> [cases, tensors compared with Detectron2, tensors that are bitwise equal]."""
    rows: dict[str, list] = {}
    for name, case in [*CASES.items(), *LIVELY_CASES.items()]:
        ours = run_case(lambda case=case: Embedded(case), case)
        theirs = run_case(lambda case=case: Detectron2(case), case)
        for key in theirs:
            row = rows.setdefault(golden.quantity(key), [set(), 0, 0])
            row[0].add(name)
            row[1] += 1
            row[2] += _same(ours, theirs, key)
    return rows


def print_table() -> None:
    on_others = {}
    for label, variables in _OTHER_CPUS.items():
        text = subprocess.run(
            [sys.executable, "-W", "ignore", str(_ROOT / "tests/parity/golden_differences.py")],
            env={**os.environ, **variables},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        on_others[label] = json.loads(text)
    print(f"| quantity | cases | tensors | bitwise equal | {' | '.join(on_others)} |")
    print("|---" * (4 + len(on_others)) + "|")
    for name, (cases, count, equal) in live_rows().items():
        cells = [on_others[label].get(name) for label in on_others]
        cells = ["" if c is None else "=" if c == 0 else f"{c:.0e}" for c in cells]
        print(f"| {name} | {len(cases)} | {count} | {equal} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--table", action="store_true", help="print the table, write nothing")
    parser.add_argument("files", nargs="*", help=f"of: {', '.join(RECORDERS)}; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.files or list(RECORDERS)
    if arguments.table:
        print_table()
    elif arguments.check:
        sys.exit(0 if check(names) else 1)
    else:
        write(names)


if __name__ == "__main__":
    main()
