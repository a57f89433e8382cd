"""R4: checkpoints with a flipped bit, cut off, or without their manifest.

Each is refused by file and reason, the newest one that is whole is taken, and the run ends in the
same bits.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from pretrain_runs import final_digest, stopped_and_whole

from moco.errors import MocoError
from moco.training import checkpoint as ckpt

pytestmark = pytest.mark.faults
NEWEST_FIRST = ("checkpoint_step_10.pth.tar", "checkpoint_0001.pth.tar", "checkpoint_0000.pth.tar")
STEPS = (10, 8, 4)
CUTS = {"0": lambda size: 0, "1": lambda size: 1, "50 %": lambda size: size // 2,
        "-1": lambda size: size - 1}  # fmt: skip
OF_MANIFEST = " of the manifest"


@dataclass(frozen=True)
class Case:
    """what: the damage. depth: how many of the newest checkpoints get it. seed: where."""

    what: str
    depth: int
    seed: int


def cases(num: int) -> list[Case]:
    """Every kind once, then flipped bits; every fifth also hits the checkpoint before."""
    kinds = [f"cut {name}" for name in CUTS]
    kinds += [f"cut {name}{OF_MANIFEST}" for name in CUTS if name != "-1"]  # that is a line break
    kinds += ["no manifest", "no file"] + [f"flip{OF_MANIFEST}"] * 7
    kinds += ["flip"] * (num - len(kinds))
    return [Case(what, 2 if n % 5 == 4 else 1, n) for n, what in enumerate(kinds)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """images/; run/, stopped after 10 of 12 steps; the digest of the run that was not stopped."""
    folder = tmp_path_factory.mktemp("damaged")
    digest = stopped_and_whole(folder, 10)
    assert [ckpt.step_in_manifest(folder / "run" / name) for name in NEWEST_FIRST] == list(STEPS)
    return folder, digest


def damage(path: Path, case: Case) -> None:
    manifest = ckpt.manifest_path(path)
    if case.what in ("no manifest", "no file"):
        return (manifest if case.what == "no manifest" else path).unlink()
    kind = case.what.removesuffix(OF_MANIFEST)
    target = path if kind == case.what else manifest
    content = bytearray(target.read_bytes())
    if kind == "flip":
        position = random.Random(case.seed).randrange(8 * len(content))
        if target == manifest:  # what the rest of it says is compared with nothing
            start = content.index(b'"sha256": "') + len(b'"sha256": "')
            position = 8 * start + position % (8 * 64)
        content[position // 8] ^= 1 << position % 8
    else:
        content = content[: CUTS[kind.removeprefix("cut ")](len(content))]
    target.write_bytes(content)


def outcome(base: Path, folder: Path, case: Case) -> tuple[bool, str]:
    """(damaged ones refused by name and reason and the one before taken, the final digest)."""
    shutil.copytree(base / "run", folder)
    for name in NEWEST_FIRST[: case.depth]:
        damage(folder / name, case)
    said: list[str] = []
    try:
        run = tiny.trainer(base / "images", folder, said)
        run.train()
    except (MocoError, ArithmeticError):
        return False, ""
    refused = [line for line in said if line.startswith("refused: ")]
    named = [name for name in NEWEST_FIRST if any(f"{folder / name}" in line for line in refused)]
    # A manifest of nothing is no checkpoint; the sweep removes it.
    wanted = [] if case.what == "no file" else list(NEWEST_FIRST[: case.depth])
    reasons = ("SHA-256", "bytes, its manifest says", "no readable manifest")
    good = named == wanted and all(any(r in line for r in reasons) for line in refused)
    return good and run.first_step == STEPS[case.depth], final_digest(folder)


def test_damaged_checkpoints_are_refused_and_the_one_before_is_taken(
    base, tmp_path, observed, long
):
    folder, digest = base
    listed = cases(500 if long else 50)
    found = {}
    for case in listed:
        found[case] = outcome(folder, tmp_path / "run", case) == (True, digest)
        shutil.rmtree(tmp_path / "run")
    assert all(found.values()), [case for case, good in found.items() if not good]
    observed("R4", sum(found.values()), len(listed))


def test_control_without_verification_a_flipped_bit_gets_into_the_run(
    base, tmp_path, monkeypatch, observed
):
    folder, digest = base
    monkeypatch.setattr(
        ckpt, "verify_manifest", lambda path: json.loads(ckpt.manifest_path(path).read_text())
    )
    listed = [Case("flip", 1, seed) for seed in range(12)]
    found = [outcome(folder, tmp_path / str(case.seed), case) for case in listed]
    assert not any(good for good, _ in found)
    other = [end for _, end in found if end not in ("", digest)]
    observed("R4", int(len(other) >= 3), 1, control=True)
