"""Fuzz of the configuration readers: YAML, KEY VALUE words, study files."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import yaml
from fuzz import ODD, REFUSED, explore, is_noticed, mutated, read_or_refuse, st, trees

from detection.config import load_detection_config
from moco import safe_yaml
from moco.cfgnode import digest, dump_yaml, flatten, to_dict
from moco.config import load_pretrain_config
from moco.evaluation.config import load_linear_config
from moco.safe_yaml import read_yaml
from moco.studies.plan import load_study, plan_runs

pytestmark = pytest.mark.faults
LOADERS = {
    "pretraining": load_pretrain_config,
    "detection": load_detection_config,
    "evaluation": load_linear_config,
}
TOKENS = st.sampled_from(
    ["a", "SEED", "MOCO", "TRAIN", ": ", ":", "- ", "? ", "[", "]", "{", "}", ", ", "\n", "\n  ",
     "&a ", "*a", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ",
     "!!pairs ", "!!python/name:os.system ", "!x ", "<<: ", '"', "'", "\\", "| ", "> ", "...",
     "%YAML 1.1\n", "#", "1", "1e999", ".nan", "-.inf", "0x", "1:1", "2001-01-01", "~", "=", "\t",
     "\u0085", "\ufeff", "\u00e9", "_BASE_: c.yaml"]
)  # fmt: skip


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str | int | float | bool | bytes | None.__class__) or
                   hasattr(k, "isoformat") for k in value) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    return isinstance(value, str | int | float | bool | bytes | None.__class__) or hasattr(
        value, "isoformat"
    )


TEXTS = st.lists(TOKENS, max_size=25).map("".join)


def yaml_check(path: Path):
    def check(data: str | bytes) -> None:
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        tree = read_or_refuse(lambda: read_yaml(path))
        assert tree is REFUSED or is_plain(tree)

    return check


def test_yaml_texts(tmp_path, observed, long):
    check = yaml_check(tmp_path / "c.yaml")
    example = (Path(__file__).parents[2] / "configs/pretrain/moco_v2_200ep.yaml").read_bytes()
    count = explore(check, TEXTS, examples=20_000 if long else 1500)
    bytes_ = mutated(example) | st.binary(max_size=60)
    count += explore(check, bytes_, examples=5000 if long else 300)
    count += explore(check, trees().map(json.dumps), examples=5000 if long else 300)
    observed("fuzz", count, count)


def test_control_pyyamls_own_loader_fails(tmp_path, monkeypatch, observed):
    monkeypatch.setattr(safe_yaml, "_Loader", yaml.SafeLoader)
    found = is_noticed(yaml_check(tmp_path / "c.yaml"), TEXTS, examples=1500)
    observed("fuzz", int(found), 1, control=True)


def holds(cfg, defaults: dict) -> None:
    """The keys of the defaults, values of their kinds, finite; written and read back the same."""
    tree = flatten(to_dict(cfg))
    assert tree.keys() == defaults.keys()
    for key, value in tree.items():
        like = defaults[key]
        if like is not None:
            assert isinstance(value, bool) == isinstance(like, bool), key
            kinds = (str,) if isinstance(like, str) else (int, float, list, bool)
            assert isinstance(value, kinds) and isinstance(value, list) == isinstance(like, list)
        for number in value if isinstance(value, list) else [value]:
            assert not isinstance(number, float) or math.isfinite(number), key
    digest(cfg)


@pytest.mark.parametrize("surface", LOADERS)
def test_key_value_words_and_files(tmp_path, surface, observed, long):
    warnings.simplefilter("ignore")
    load = LOADERS[surface]
    defaults = flatten(to_dict(load(None)))
    keys = st.sampled_from([*defaults, *{k.partition(".")[0] for k in defaults}, "", ".", "a.b"])
    values = ODD.map(str) | st.text(max_size=12) | st.floats().map(str) | st.integers().map(str)
    values |= st.lists(st.integers() | st.floats() | st.text(max_size=3), max_size=4).map(str)
    words = st.lists(st.tuples(keys, values), max_size=3)

    def check_words(pairs) -> None:
        cfg = read_or_refuse(lambda: load(None, [word for pair in pairs for word in pair]))
        if cfg is not REFUSED:
            holds(cfg, defaults)

    count = explore(check_words, words, examples=8000 if long else 500)
    path, again = tmp_path / "c.yaml", tmp_path / "again.yaml"

    def check_file(tree) -> None:
        nested: dict = {}
        for key, value in tree.items():
            *sections, last = key.split(".")
            node = nested
            for section in sections:
                node = node.setdefault(section, {})
                if not isinstance(node, dict):
                    return
            node[last] = value
        path.write_text(yaml.safe_dump(nested, allow_unicode=True), encoding="utf-8")
        cfg = read_or_refuse(lambda: load(str(path)))
        if cfg is not REFUSED:
            holds(cfg, defaults)
            again.write_text(dump_yaml(cfg), encoding="utf-8")
            assert digest(load(str(again))) == digest(cfg)

    files = st.dictionaries(keys, ODD | trees(most=4), max_size=3)
    count += explore(check_file, files, examples=4000 if long else 250)
    observed("fuzz", count, count)


def test_study_files(tmp_path, observed, long):
    path = tmp_path / "c.yaml"
    (tmp_path / "base.yaml").write_text("TRAIN: {EPOCHS: 3}\n")
    names = st.sampled_from(["MOCO.TEMPERATURE", "TRAIN.EPOCHS", "METHOD", "SEED", "x", "MOCO"])
    multiple = st.fixed_dictionaries({"times": ODD | st.floats()})
    run = st.dictionaries(
        st.sampled_from(["NAME", "SET", "PUBLISHED", "x"]),
        st.text(max_size=5) | st.dictionaries(names, ODD | multiple, max_size=2) | ODD,
    )
    rest = st.fixed_dictionaries(
        {"TITLE": st.just("t"), "CONFIG": st.sampled_from(["base.yaml", "", "\0", "c.yaml", "."]),
         "RUNS": st.lists(run, max_size=3) | ODD}
    )  # fmt: skip

    def check(tree) -> None:
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        runs = read_or_refuse(lambda: plan_runs(load_study(str(path)), [0, 1], []))
        if runs is not REFUSED:
            assert len({run.folder for run in runs}) == len(runs) == 2 * len(tree["RUNS"])
            assert all(".." not in run.folder and run.folder[0] != "/" for run in runs)

    count = explore(check, rest | trees(), examples=5000 if long else 400)
    observed("fuzz", count, count)
