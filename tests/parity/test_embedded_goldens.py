"""The embedded engine against arrays recorded from Detectron2 (`record_detectron2.py`).

Runs everywhere: on the platform of the recording (versions, processor and code path, see
`golden.fingerprint`) every tensor must be equal to the last bit, elsewhere within 1e-5 of its
largest element; gradients within 1e-5 of the largest gradient of the pass. Discrete quantities
(order, classes, sampled indices, random state) are equal everywhere: the recorder refuses
inputs where rounding could decide. `pytest -s -k table` prints which quantities were bitwise.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from parity import golden
from parity.cases import CASES, GOLDEN_CASES
from parity.controls import CONTROLS
from parity.observed import Embedded, Named, observe, run_case

_PHASES = [(name, phase) for name in GOLDEN_CASES for phase in CASES[name].phases]


@cache
def rows_of(name: str) -> list[golden.Row]:
    """The embedded engine's rows of one case; the golden files hold no momenta."""
    named = run_case(lambda: Embedded(CASES[name]), CASES[name])
    return golden.compare(_without_momenta(named), golden.load(name))


def _without_momenta(named: Named) -> Named:
    return {k: tensor for k, tensor in named.items() if golden.quantity(k) != "momentum"}


@pytest.mark.parametrize(("name", "phase"), _PHASES)
def test_equals_detectron2_s_recording(name, phase):
    rows = [row for row in rows_of(name) if row.name.startswith(f"{phase}/")]
    assert len(rows) >= 50
    assert [row for row in rows if not row.difference <= golden.TOLERANCE] == []


@pytest.mark.skipif(
    golden.platform_differences() != [],
    reason=f"within 1e-5 instead: recorded elsewhere ({'; '.join(golden.platform_differences())})",
)
@pytest.mark.parametrize(("name", "phase"), _PHASES)
def test_equals_detectron2_s_recording_to_the_last_bit(name, phase):
    rows = [row for row in rows_of(name) if row.name.startswith(f"{phase}/")]
    assert [row.name for row in rows if not row.bitwise] == []


@pytest.mark.parametrize("label", [k for k, c in CONTROLS.items() if c.case in GOLDEN_CASES])
def test_negative_control_breaks_the_comparison(label):
    control = CONTROLS[label]
    case = CASES[control.case]
    torch.manual_seed(case.seed)
    named = _without_momenta(observe(control.side(case), case, control.phase))
    rows = golden.compare(named, golden.load(control.case))
    rows = [row for row in rows if row.name.startswith(f"{control.phase}/")]
    broken = [row for row in rows if not row.difference <= golden.TOLERANCE]
    assert control.quantity in {golden.quantity(row.name) for row in broken}


def test_the_comparison_notices_one_element_one_place_and_one_shape():
    stored = {"x/a.0": torch.linspace(-1.0, 1.0, 500), "x/b": torch.arange(500)}
    packed = golden.pack(stored)
    assert [(r.bitwise, r.difference < 1e-6) for r in golden.compare(stored, packed)] == [
        (True, True)
    ] * 2
    moved = stored["x/a.0"].roll(1)
    changed = stored["x/a.0"].clone()
    changed[123] += 1.0
    for wrong in (moved, changed, stored["x/a.0"][:-1]):
        row = golden.compare({**stored, "x/a.0": wrong}, packed)[0]
        assert not row.bitwise and row.difference > 1e-4
    close = golden.compare({**stored, "x/a.0": stored["x/a.0"] * (1 + 1e-6)}, packed)[0]
    assert not close.bitwise and 1e-7 < close.difference < golden.TOLERANCE
    for wrong in ({"x/a.0": stored["x/a.0"]}, {**stored, "x/b": stored["x/b"] + 1}):
        assert golden.compare(wrong, packed)[1].difference == float("inf")
    assert golden.compare({**stored, "x/c": moved}, packed)[2].difference == float("inf")


def test_table():
    """Which quantities were bitwise here, and the largest difference: `pytest -s -k table`."""
    table: dict[str, list] = {}
    for name in GOLDEN_CASES:
        for row in rows_of(name):
            entry = table.setdefault(golden.quantity(row.name), [0, 0, 0.0])
            entry[0] += 1
            entry[1] += row.bitwise
            entry[2] = max(entry[2], row.difference)
    assert {"res4", "proposals", "sampled_index", "gradient", "weight", "rng_state"} <= set(table)
    print("\n| quantity | tensors | bitwise equal | largest relative difference |")
    print("|---|---|---|---|")
    for quantity, (count, bitwise, difference) in table.items():
        print(f"| {quantity} | {count} | {bitwise} | {difference:.0e} |")
