"""Configuration: base files, types, digests, and errors that name the key."""

import pytest

from moco.cfgnode import CfgNode, digest, dump_yaml, load_config
from moco.errors import ConfigError
from moco.safe_yaml import read_yaml


def defaults():
    return CfgNode(A=CfgNode(QUEUE_SIZE=4, RATE=0.1, NAMES=("a",)), B="x")


def write(path, text):
    path.write_text(text)
    return str(path)


def test_base_file_then_file_then_command_line(tmp_path):
    write(tmp_path / "base.yaml", "A: {QUEUE_SIZE: 5, RATE: 0.2}\nB: y\n")
    child = write(tmp_path / "child.yaml", "_BASE_: base.yaml\nA: {RATE: 0.3}\n")
    cfg = load_config(defaults(), child, ["B", "z"])
    assert (cfg.A.QUEUE_SIZE, cfg.A.RATE, cfg.B) == (5, 0.3, "z")
    with pytest.raises(AttributeError):
        cfg.B = "frozen"


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("A: {QUEUE_SISE: 3}", [], "unknown key 'A.QUEUE_SISE' .did you mean 'QUEUE_SIZE'"),
        ("C: 1", [], "unknown key 'C'. Known keys at the top: A, B"),
        ("QUEUE_SIZE: 1", [], "unknown key 'QUEUE_SIZE' .did you mean 'QUEUE_SIZE' under A.."),
        ("", ["a.queue_size", "1"], "unknown key 'a' .did you mean 'A'"),
        ("A: {RATE: null}", [], "c.yaml: A.RATE is None; allowed: a value like 0.1"),
        ("A: {RATE: .inf}", [], "A.RATE is another number; allowed: finite numbers"),
        ("", ["A.QUEUE_SIZE", str(1 << 63)], "QUEUE_SIZE is another number; allowed: .*64 bits"),
        ("", ["A.NAMES", "(1,)"], "command line: A.NAMES is .1,.; allowed: texts only"),
        ("", ["A.RATE", "-" * 5000], "command line: A.RATE"),
        ('_BASE_: "a\\0"', [], "is no path"),
        ("A: 3", [], "'A' is given as 3, a mapping of keys is needed"),
        ("A: {QUEUE_SIZE: many}", [], "c.yaml.*QUEUE_SIZE"),
        ("A: [", [], "not valid YAML"),
        ("- 1", [], "holds a list"),
        ("_BASE_: c.yaml", [], "refers back to itself"),
        ("_BASE_: none.yaml", [], "none.yaml: cannot read"),
        ("", ["A.RATE"], "KEY VALUE pairs are needed"),
        ("", ["A.RAT", "1"], "command line: unknown key 'A.RAT'"),
        ("", ["B.C", "1"], "'B' is given as"),
        ("", ["A.QUEUE_SIZE", "1.5"], "command line: A.QUEUE_SIZE"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(tmp_path, text, overrides, message):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(defaults(), path, overrides)
    assert "\n" not in str(error.value)


def bomb(levels=9):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merge_bomb(levels=9):
    """PyYAML before 6.0.4 unfolds it; later ones keep one of equal pairs."""
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text, message",
    [
        ("A: {QUEUE_SIZE: 3, QUEUE_SIZE: 4}", "duplicate key 'QUEUE_SIZE'.*line 1"),
        ("B: x\nA: {RATE: 0.2}\nB: y", "duplicate key 'B'.*line 3"),
        ("B: !unknown x", "not valid YAML.*unknown"),
        (bomb(), "unfold into more than 100000 values"),
        ("a: &a [*a]", "nested deeper"),
        ("[" * 5000 + "]" * 5000, "nested too deeply|nested deeper"),
        ("B: " + "x" * (1 << 20), "larger than 1 MiB"),
        ("B: \x00", "not valid YAML"),
        ("_BASE_: [a.yaml]", "_BASE_ is .'a.yaml'., the path of a YAML file is needed"),
        ("? [a, b]\n: c", "not valid YAML"),
        ("B: !!bool x", "not valid YAML: its value is no bool.*line 1"),
        ('B: !!int ""', "its value is no int"),
        ("B: " + "1:" * 100_000 + "1", "a number of 200001 characters"),
        ("A: {<<: {RATE: 1}, <<: {RATE: 2}}", "duplicate key '<<'"),
        (merge_bomb(), "merge keys unfold|unknown key"),
    ],
    ids=["duplicate", "duplicate at the top", "tag", "bomb", "self-reference", "deep", "large",
         "binary", "list as base", "list as key", "text as bool", "nothing as int",
         "base 60", "merged twice", "merge bomb"],
)  # fmt: skip
def test_hostile_yaml_is_refused_in_one_line(tmp_path, text, message):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(defaults(), path)
    assert "\n" not in str(error.value) and str(error.value).startswith(path)


def test_aliases_and_merge_keys_of_a_normal_file_are_read(tmp_path):
    text = "A: &a {RATE: 0.2}\nB: x\n"
    assert load_config(defaults(), write(tmp_path / "c.yaml", text)).A.RATE == 0.2
    merged = read_yaml(write(tmp_path / "m.yaml", "a: &a {x: 1}\nb: {<<: *a, x: 2, y: 3}\n"))
    assert merged == {"a": {"x": 1}, "b": {"x": 2, "y": 3}}


def test_python_objects_in_yaml_are_not_made(tmp_path):
    path = write(tmp_path / "c.yaml", "B: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(defaults(), path)


def test_the_dump_reads_back_as_the_same_config(tmp_path):
    cfg = load_config(defaults(), None, ["A.NAMES", "('b', 'c')"])
    again = load_config(defaults(), write(tmp_path / "d.yaml", dump_yaml(cfg)))
    assert digest(again) == digest(cfg)
    assert digest(cfg) != digest(defaults())
    assert digest(cfg, ["A.NAMES"]) == digest(defaults(), ["A.NAMES"])
