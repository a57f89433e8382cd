"""R17: a wrong configuration is refused in one line that names the nearest right key."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from detection.config import load_detection_config
from moco import cfgnode, safe_yaml
from moco.cfgnode import flatten, to_dict
from moco.config import load_pretrain_config
from moco.errors import ConfigError
from moco.evaluation.config import load_linear_config
from moco.studies.plan import load_study, plan_runs

pytestmark = pytest.mark.faults
SURFACES = {
    "pretraining": load_pretrain_config,
    "detection": load_detection_config,
    "evaluation": load_linear_config,
}
LEAVES = {name: flatten(to_dict(load(None))) for name, load in SURFACES.items()}
STUDY = {
    "TITLE": "a study", "CONFIG": "base.yaml", "SOURCE": "nowhere",
    "RUNS": [{"NAME": "a", "SET": {"MOCO.TEMPERATURE": 0.1}, "PUBLISHED": {"top-1": 60.0}},
             {"NAME": "b", "SET": {"TRAIN.EPOCHS": {"times": 2}}}],
}  # fmt: skip


def read_study(path: str) -> None:
    Path(path).with_name("base.yaml").write_text("TRAIN: {EPOCHS: 3}\n")
    plan_runs(load_study(path), [0], [])


def outcome(read: Callable[[], object], *words: str) -> str:
    """"refused" in one line with all `words` in it, within 10 s; else what happened."""
    signal.alarm(10)
    try:
        read()
        return "READ"
    except ConfigError as error:
        text = str(error)
        lacks = [word for word in words if word not in text]
        if "\n" in text or len(text) > 5000 or lacks:
            return f"UNCLEAR, lacks {lacks}: {text}"
        return "refused"
    except Exception as error:
        return f"UNCAUGHT {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def compare(found: dict[object, str], observed) -> None:
    wrong = {case: said for case, said in found.items() if said != "refused"}
    assert not wrong, dict(list(wrong.items())[:10])
    observed("R17", len(found), len(found))


def from_file(load: Callable, path: Path, content: object) -> Callable[[], object]:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return lambda: load(str(path))


def typos(name: str) -> Iterator[str]:
    """Two letters exchanged, one lost, one doubled, one wrong; small letters."""
    at = len(name) // 2
    yield name[: at - 1] + name[at] + name[at - 1] + name[at + 1 :]
    yield name[:at] + name[at + 1 :]
    yield name[:at] + name[at] + name[at:]
    yield name[:at] + "X" + name[at + 1 :]
    yield name.lower()


def typo_cases(surface: str) -> Iterator[tuple[str, str]]:
    """(a dotted key with a typo in its last part, that part as it is right)."""
    for key in LEAVES[surface]:
        section, dot, last = key.rpartition(".")
        if len(last) < 3:
            continue  # K: nothing is near
        for wrong in dict.fromkeys(typos(last)):
            if f"{section}{dot}{wrong}" not in LEAVES[surface]:
                yield f"{section}{dot}{wrong}", last


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("surface", SURFACES)
def test_typos(tmp_path, surface, observed):
    load, found = SURFACES[surface], {}
    for key, right in typo_cases(surface):
        hint = f"(did you mean {right!r}"
        read = from_file(load, tmp_path / "c.yaml", nested(key, 1))
        found["file", key] = outcome(read, "c.yaml: ", repr(key), hint)
        found["words", key] = outcome(lambda k=key: load(None, [k, "1"]), "command line", hint)
    compare(found, observed)


@pytest.mark.parametrize("surface", SURFACES)
def test_keys_in_the_wrong_section(tmp_path, surface, observed):
    """A key at the top, of which there is one in a section: that section is named."""
    load, found = SURFACES[surface], {}
    ends = [key.rpartition(".")[2] for key in LEAVES[surface]]
    for key in LEAVES[surface]:
        section, _, last = key.rpartition(".")
        if section and ends.count(last) == 1 and last not in to_dict(load(None)):
            said = outcome(lambda k=last: load(None, [k, "1"]), "did you mean", repr(last))
            found[key] = said
    assert len(found) > 20
    compare(found, observed)


WRONG = {
    "number": ("x", "None", "[1]", "{'a': 1}", "1e999", "-1e999", "True", "9" * 5000, "-" * 5000),
    "text": ("3", "None", "[1]", "{'a': 1}", "0.5", "True"),
    "bool": ("1", "x", "None", "[True]", "0.0"),
    "list": ("1", "x", "None", "{'a': 1}", "True"),
}


def kind_of(value: object) -> str | None:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return {"str": "text", "tuple": "list", "list": "list"}.get(type(value).__name__)


@pytest.mark.parametrize("surface", SURFACES)
def test_wrong_types(tmp_path, surface, observed):
    load, found = SURFACES[surface], {}
    for key, default in LEAVES[surface].items():
        for value in WRONG.get(kind_of(default), ("{'a': 1}", "x")):
            found[key, value[:9]] = outcome(lambda k=key, v=value: load(None, [k, v]), key)
        read = from_file(load, tmp_path / "c.yaml", nested(key, {"a": 1}))
        found[key, "mapping"] = outcome(read, "c.yaml", key)
        if default is not None:
            read = from_file(load, tmp_path / "c.yaml", nested(key, None))
            found[key, "null"] = outcome(read, "c.yaml", key)
    compare(found, observed)


def test_wrong_values_in_lists(observed):
    cases = {
        "pretraining": ("DATA.MEAN", "DATA.STD", "DATA.CROP_SCALE", "TRAIN.MILESTONES"),
        "evaluation": ("DATA.MEAN", "DATA.STD", "DATA.CROP_SCALE", "TRAIN.MILESTONES",
                       "CACHED.LRS", "CACHED.WEIGHT_DECAYS"),
        "detection": ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "SOLVER.STEPS",
                      "INPUT.MIN_SIZE_TRAIN", "MODEL.RPN.IOU_THRESHOLDS"),
    }  # fmt: skip
    values = ("('a', 'b', 'c')", "(1e999, 1, 1)", "(None, 1, 2)", "(True, 1, 2)", "((1, 2), {}, 3)")
    found = {
        (key, value): outcome(lambda s=s, k=key, v=value: SURFACES[s](None, [k, v]), key)
        for s, keys in cases.items()
        for key in keys
        for value in values
    }
    compare(found, observed)


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merge_bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


TAGS = ("!x 1", "!!x 1", "!!python/object/apply:os.getcwd []", "!!python/name:os.system",
        "!!python/tuple [1]", "!!bool x", '!!int ""', '!!float ""', "!!timestamp x", "!!int x",
        "!!binary x", "!!omap [a]", "!!map [1]", "!!seq {a: 1}", "!!str {a: 1}",
        "!<tag:yaml.org,2002:python/object:os.x> {}")  # fmt: skip
BOMBS = {
    "aliases": bomb(), "merge keys": merge_bomb(), "self-reference": "a: &a [*a]",
    "self-merge": "a: &a {<<: *a, <<: *a}", "deep": "[" * 5000 + "]" * 5000,
    "deep mappings": "{a: " * 5000 + "1" + "}" * 5000, "large": "a: " + "x" * (1 << 20),
    "base 60": "a: " + "1:" * 400_000 + "1", "base 60, float": "a: " + "1:" * 400 + "1.5",
    "hexadecimal": "a: 0x" + "f" * 100_000, "digits": "a: " + "9" * 5000, "binary": "a: \x00",
    "infinite": "SEED: .inf", "a list as key": "? [a, b]\n: c", "a set as key": "? !!set {a}\n: 1",
}  # fmt: skip


def study_text(**changes: object) -> str:
    return yaml.safe_dump({**STUDY, **changes})


READERS = {**SURFACES, "study": read_study}


def duplicates(surface: str) -> list[tuple[str, str]]:
    """(text, the key that is there twice)."""
    if surface == "study":
        return [
            (study_text() + "TITLE: b\n", "TITLE"),
            (study_text().replace("MOCO.TEMPERATURE: 0.1",
                                  "{0}: 0.1\n    {0}: 0.2".format("MOCO.TEMPERATURE")),
             "MOCO.TEMPERATURE"),
        ]  # fmt: skip
    cases = []
    for key in LEAVES[surface]:
        section, _, last = key.rpartition(".")
        inner = f"{last}: 1\n{last}: 2\n"
        for part in reversed(section.split(".") if section else ()):
            inner = f"{part}:\n" + "".join(f"  {line}\n" for line in inner.splitlines())
        cases.append((inner, last))
    return cases


@pytest.mark.parametrize("surface", READERS)
def test_duplicate_keys(tmp_path, surface, observed):
    found = {
        (number, key): outcome(
            from_file(READERS[surface], tmp_path / "c.yaml", text),
            "c.yaml", f"duplicate key {key!r}", "line ",
        )
        for number, (text, key) in enumerate(duplicates(surface))
    }  # fmt: skip
    compare(found, observed)


@pytest.mark.parametrize("surface", READERS)
def test_tags_and_bombs(tmp_path, surface, observed):
    start = study_text() + "\nX: " if surface == "study" else "SEED: "
    texts = {tag: f"{start}{tag}\n" for tag in TAGS} | BOMBS
    found = {
        name: outcome(from_file(READERS[surface], tmp_path / "c.yaml", text), "c.yaml")
        for name, text in texts.items()
    }
    compare(found, observed)


def study_cases() -> dict[str, tuple[object, str]]:
    """Name -> (content, a word of the message)."""
    run = STUDY["RUNS"][0]
    cases: dict[str, tuple[object, str]] = {}
    for key in STUDY:
        for wrong in typos(key):
            changed = {wrong if name == key else name: value for name, value in STUDY.items()}
            cases[f"typo {wrong}"] = changed, f"unknown key {wrong!r} (did you mean {key!r}?)"
    for key in ("NAME", "PUBLISHED", "SET"):
        for wrong in typos(key):
            changed = {wrong if name == key else name: value for name, value in run.items()}
            cases[f"run's typo {wrong}"] = (
                {**STUDY, "RUNS": [changed]},
                f"RUNS[0]: unknown key {wrong!r} (did you mean {key!r}?)",
            )
    for value in (3, None, [], {}, True):
        for key in ("TITLE", "CONFIG", "SOURCE", "RUNS"):
            cases[f"{key} {value!r}"] = {**STUDY, key: value}, key
        for key in ("NAME", "SET", "PUBLISHED"):
            if (key, value) in (("NAME", 3), ("SET", {}), ("PUBLISHED", {})):
                continue
            cases[f"run's {key} {value!r}"] = {**STUDY, "RUNS": [{**run, key: value}]}, key
    sets = {
        "typo": ({"MOCO.TEMPERATUR": 0.1}, "did you mean 'TEMPERATURE'"),
        "typo in a multiple": ({"TRAIN.EPOCH": {"times": 2}}, "did you mean 'EPOCHS'"),
        "type": ({"MOCO.TEMPERATURE": "x"}, "MOCO.TEMPERATURE"),
        "null": ({"MOCO.TEMPERATURE": None}, "MOCO.TEMPERATURE"),
        "number as key": ({3: 4}, "SET"),
        "a mapping": ({"MOCO": {"TEMPERATURE": 1}}, "times"),
        "a multiple of text": ({"METHOD": {"times": 2}}, "needs a number"),
        "an infinite multiple": ({"TRAIN.EPOCHS": {"times": float("inf")}}, "times"),
        "a multiple by text": ({"TRAIN.EPOCHS": {"times": "2"}}, "times"),
        "a multiple by True": ({"TRAIN.EPOCHS": {"times": True}}, "times"),
        "a huge multiple": ({"TRAIN.EPOCHS": {"times": 1e300}}, "TRAIN.EPOCHS"),
    }
    for name, (value, word) in sets.items():
        cases[f"SET {name}"] = {**STUDY, "RUNS": [{**run, "SET": value}]}, word
    cases["a published NaN"] = (
        {**STUDY, "RUNS": [{**run, "PUBLISHED": {"a": float("nan")}}]}, "PUBLISHED"
    )  # fmt: skip
    return cases


def test_studies(tmp_path, observed):
    read_study_file = from_file(read_study, tmp_path / "c.yaml", STUDY)
    read_study_file()  # the study itself is right
    found = {
        name: outcome(from_file(read_study, tmp_path / "c.yaml", content), word)
        for name, (content, word) in study_cases().items()
    }
    compare(found, observed)


# Controls: the same cases and checks, without one guard each.
def test_control_without_the_check_of_keys_no_right_key_is_named(monkeypatch, observed):
    monkeypatch.setattr(cfgnode, "_check_keys", lambda *args, **options: None)
    cases = list(typo_cases("pretraining"))
    failed = sum(
        outcome(lambda k=key: load_pretrain_config(None, [k, "1"]), repr(right)) != "refused"
        for key, right in cases
    )
    observed("R17", failed, len(cases), control=True)


def test_control_without_the_check_of_values_null_passes(monkeypatch, observed):
    monkeypatch.setattr(cfgnode, "_check_value", lambda *args: None)
    keys = [k for k, v in LEAVES["pretraining"].items() if kind_of(v) in ("number", "list")]
    said = [outcome(lambda k=key: load_pretrain_config(None, [k, "None"]), key) for key in keys]
    passed = sum(re.match("READ|UNCAUGHT", line) is not None for line in said)
    observed("R17", int(passed > len(keys) / 2), 1, control=True)


def test_control_pyyamls_own_loader_takes_the_last_of_two_keys(tmp_path, monkeypatch, observed):
    monkeypatch.setattr(safe_yaml, "_Loader", yaml.SafeLoader)
    text = "SEED: 1\nSEED: 2\n"
    said = outcome(from_file(load_pretrain_config, tmp_path / "c.yaml", text), "duplicate key")
    observed("R17", int(said == "READ"), 1, control=True)


def test_control_without_its_count_a_bomb_is_unfolded(tmp_path, monkeypatch, observed):
    monkeypatch.setattr(safe_yaml, "_refuse_bombs", lambda *args, **options: None)
    (tmp_path / "c.yaml").write_text(bomb(6))
    said = outcome(lambda: safe_yaml.read_yaml(tmp_path / "c.yaml"), "unfold")
    observed("R17", int(said == "READ"), 1, control=True)
