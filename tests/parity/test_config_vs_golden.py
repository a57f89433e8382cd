"""Configurations against Detectron2's `get_cfg()`, recorded in golden/defaults.json."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from fvcore.common.config import CfgNode
from parity.golden import FOLDER

from detection.config import get_defaults, load_detection_config
from detection.config_keys import EXTRA_KEYS
from detection.engines.embedded.solver import lr_at
from moco.cfgnode import flatten
from moco.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
THEIRS = json.loads((FOLDER / "defaults.json").read_text())
OURS = flatten(get_defaults())
PLAIN = sorted(CONFIGS.glob("detection/*.yaml"))
WITH_EXTRA_KEYS = [*CONFIGS.glob("own_data/*.yaml"), CONFIGS / "demo/detection.yaml"]


def their_config() -> CfgNode:
    """Detectron2's tree of defaults, in the class its own node is derived from."""
    tree: dict = {}
    for key, value in THEIRS.items():
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = ast.literal_eval(value)
    return CfgNode(tree)


def changed(value: object) -> object:
    """Another value of the same type."""
    if value is None:
        return 0.5
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 7
    if isinstance(value, str):
        return value + "x"
    return type(value)([*value, "x"])


def test_every_default_is_detectron2_s_own_with_its_type():
    assert set(OURS) - set(THEIRS) == set(EXTRA_KEYS)
    assert {key: repr(value) for key, value in OURS.items() if key in THEIRS} == {
        key: value for key, value in THEIRS.items() if key in OURS
    }


def test_there_are_keys_on_both_sides():
    assert len(THEIRS) > 180 and len(set(OURS) & set(THEIRS)) > 130
    assert THEIRS["SOLVER.STEPS"] == "(30000,)" and THEIRS["MODEL.PIXEL_STD"] == "[1.0, 1.0, 1.0]"


@pytest.mark.parametrize("key", sorted(set(THEIRS) - set(OURS)))
def test_a_key_only_detectron2_knows_is_refused_by_name(key, tmp_path):
    value = changed(ast.literal_eval(THEIRS[key]))
    # The error names the key, or the section of Detectron2's that is unknown as a whole.
    named = "|".join(re.escape(part) for part in _with_parents(key))
    with pytest.raises(ConfigError, match=f"command line: unknown key '({named})'"):
        load_detection_config(None, [key, str(value)])
    tree: object = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    path = tmp_path / "given.yaml"
    path.write_text(yaml.dump(_without_tuples(tree)))
    with pytest.raises(ConfigError, match=f"given.yaml: unknown key '({named})'"):
        load_detection_config(str(path))


def _with_parents(key: str) -> list[str]:
    parts = key.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    known = {".".join(k.split(".")[:count]) for k in OURS for count in range(1, len(k.split(".")))}
    return [name for name in names if name not in known]


def _without_tuples(tree: object) -> object:
    if isinstance(tree, dict):
        return {key: _without_tuples(value) for key, value in tree.items()}
    return str(tree) if isinstance(tree, tuple) else tree


@pytest.mark.parametrize("key", sorted(set(THEIRS) & set(OURS)))
def test_a_known_key_is_refused_by_name_or_in_use(key):
    """Whatever its new value: an error that names the key, or a value that some code reads."""
    value = changed(OURS[key])
    try:
        load_detection_config(None, [key, repr(value) if not isinstance(value, str) else value])
    except ConfigError as error:
        assert re.search(rf"\b{re.escape(key)}\b", str(error))
        return
    assert _is_read(key), f"{key} is accepted, and nothing in detection/ reads it"


def _is_read(key: str) -> bool:
    last = key.split(".")[-1]
    sources = [p for p in (ROOT / "detection").rglob("*.py") if p.name != "config_keys.py"]
    return any(re.search(rf"[.\"'{{]{last}\b", path.read_text()) for path in sources)


def test_negative_control_a_key_that_nothing_reads_is_noticed():
    assert _is_read("SOLVER.BASE_LR") and not _is_read("MODEL.FPN.FUSE_TYPE")


@pytest.mark.parametrize("path", PLAIN, ids=lambda path: path.stem)
def test_detectron2_s_keys_take_the_file_as_it_stands(path):
    theirs = their_config()
    theirs.merge_from_file(str(path))
    assert _differing(load_detection_config(str(path)), theirs) == []


@pytest.mark.parametrize("path", WITH_EXTRA_KEYS, ids=lambda path: path.stem)
def test_detectron2_s_keys_take_the_file_but_for_our_extra_keys(path):
    tree = CfgNode.load_yaml_with_base(str(path))
    removed = []
    for key in EXTRA_KEYS:
        *parents, last = key.split(".")
        node = tree
        for part in parents:
            node = node.get(part, {})
        if node.pop(last, None) is not None:
            removed.append(key)
    assert removed
    theirs = their_config()
    theirs.merge_from_other_cfg(CfgNode(tree))
    assert _differing(load_detection_config(str(path)), theirs) == []


def _differing(ours: CfgNode, theirs: CfgNode) -> list[str]:
    """Keys of both with unequal values; lists and tuples of the same items are equal."""

    def plain(value):
        return list(value) if isinstance(value, list | tuple) else value

    their_leaves = flatten(theirs)
    return [
        key
        for key, value in flatten(ours).items()
        if key in their_leaves and plain(value) != plain(their_leaves[key])
    ]


def test_the_24k_schedule_is_detectron2_s():
    rates = json.loads((FOLDER / "lr_24k.json").read_text())
    cfg = load_detection_config(str(CONFIGS / "detection/pascal_voc_R_50_C4_24k.yaml"))
    assert {k: repr(lr_at(cfg, int(k))) for k in rates} == rates
    assert len(set(rates.values())) > 100
    other = load_detection_config(
        str(CONFIGS / "detection/pascal_voc_R_50_C4_24k.yaml"), ["SOLVER.WARMUP_ITERS", "101"]
    )
    assert {k: repr(lr_at(other, int(k))) for k in rates} != rates
