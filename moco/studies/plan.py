"""What a study consists of, read from its YAML file.

A study file (configs/studies/) holds

    TITLE: what is compared
    CONFIG: the pretraining YAML all runs start from, relative to the study file
    SOURCE: where the published figures come from
    RUNS:
      - NAME: tau 0.2, MLP
        SET: {MOCO.TEMPERATURE: 0.2, MODEL.HEAD: mlp}     # keys that differ from CONFIG
        PUBLISHED: {ImageNet top-1: 66.2}

A value `{times: 4}` stands for four times what the configuration has without it, so a study of
epochs or batches stays one when it is scaled down.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco import cfgnode
from moco.cfgnode import CfgNode
from moco.config import ADDED_LATER, load_pretrain_config
from moco.errors import ConfigError
from moco.safe_yaml import read_yaml

_KEYS = {"TITLE", "CONFIG", "SOURCE", "RUNS"}
_RUN_KEYS = {"NAME", "SET", "PUBLISHED"}
# What may change between the start of a run and its continuation, and changes no result.
_DIGEST_EXCLUDE = ("DATA.NUM_WORKERS", "CHECKPOINT", "LOG")


@dataclass(frozen=True)
class Row:
    """One row of a study's table: its name, the keys that differ, the published figures."""

    name: str
    keys: dict[str, object]
    published: dict[str, float]


@dataclass(frozen=True)
class Study:
    """A study as its file says. config_file: what all rows start from."""

    title: str
    source: str
    config_file: str
    rows: tuple[Row, ...]

    @property
    def published_columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row.published))


@dataclass(frozen=True)
class PlannedRun:
    """One pretraining run: a row with a seed.

    Attributes:
        folder: name of its folder under the study's output.
        overrides: KEY VALUE words for tools/pretrain.py; digest: of the whole configuration.
    """

    row: str
    seed: int
    folder: str
    overrides: tuple[str, ...]
    cfg: CfgNode
    digest: str


def load_study(path: str, config_file: str | None = None) -> Study:
    """Read a study file.

    Args:
        config_file: replaces its CONFIG.
    Raises: ConfigError naming file and key.
    """
    tree = read_yaml(path)
    _need_keys(tree, _KEYS, {"TITLE", "CONFIG", "RUNS"}, path)
    if not isinstance(tree["RUNS"], list) or not tree["RUNS"]:
        raise ConfigError(f"{path}: RUNS is {tree['RUNS']!r}; a list of runs is needed")
    for key in ("TITLE", "CONFIG", "SOURCE"):
        if not isinstance(tree.get(key, ""), str):
            raise ConfigError(f"{path}: {key} is {tree[key]!r:.200}; text is needed")
    rows = tuple(_row(entry, f"{path}: RUNS[{i}]") for i, entry in enumerate(tree["RUNS"]))
    folders = [_slug(row.name) for row in rows]
    twice = next((row.name for row in rows if folders.count(_slug(row.name)) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: two runs are named like {twice!r}; give each its own name")
    own = str(Path(path).parent / tree["CONFIG"])
    return Study(tree["TITLE"], tree.get("SOURCE", ""), config_file or own, rows)


def plan_runs(study: Study, seeds: Sequence[int], overrides: Sequence[str]) -> list[PlannedRun]:
    """All runs of a study: every row with every seed, rows in turn, so early results compare.

    Args:
        overrides: KEY VALUE words for all runs; they may not name a key that the study sets.
    Raises: ConfigError for that, for unknown keys and values out of range.
    """
    base = load_pretrain_config(study.config_file, overrides)
    # A multiple of a key's own value does not clash with another value of it.
    fixed = [key for row in study.rows for key, v in row.keys.items() if not isinstance(v, dict)]
    clash = sorted({"SEED", *fixed}.intersection(overrides[0::2]))
    if clash:
        raise ConfigError(
            f"command line: {', '.join(clash)} is set by the study itself; leave it out, or copy "
            "the study file and edit it"
        )
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: give different numbers")
    return [
        _planned(study, row, seed, base, tuple(overrides)) for seed in seeds for row in study.rows
    ]


def _planned(
    study: Study, row: Row, seed: int, base: CfgNode, overrides: tuple[str, ...]
) -> PlannedRun:
    words = [*overrides, "SEED", str(seed)]
    for key, value in row.keys.items():
        words += [key, str(_resolve(study, row, key, value, base))]
    try:
        cfg = load_pretrain_config(study.config_file, words)
    except ConfigError as error:
        raise ConfigError(f"run {row.name!r}: {error}") from error
    digest = cfgnode.digest(cfg, _DIGEST_EXCLUDE, ADDED_LATER)
    return PlannedRun(row.name, seed, f"{_slug(row.name)}/seed_{seed}", tuple(words), cfg, digest)


def _resolve(study: Study, row: Row, key: str, value: object, base: CfgNode) -> object:
    if not isinstance(value, dict):
        return value
    where = f"run {row.name!r}: {key}"
    if set(value) != {"times"} or not _is_number(value["times"]):
        raise ConfigError(f"{where} is {value!r}; allowed: a value, or {{times: NUMBER}}")
    try:
        old = cfgnode.get_key(base, key)
    except KeyError as error:
        hint = cfgnode.did_you_mean(key, (), base)
        raise ConfigError(f"{where}: unknown key{hint} in {study.config_file}") from error
    if not _is_number(old):
        raise ConfigError(f"{where}: {{times: ...}} needs a number, {key} is {old!r}")
    return type(old)(old * value["times"])


def _row(entry: object, where: str) -> Row:
    _need_keys(entry, _RUN_KEYS, {"NAME"}, where)
    keys, published = entry.get("SET", {}), entry.get("PUBLISHED", {})
    for name, value in (("SET", keys), ("PUBLISHED", published)):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name} is {value!r}; a mapping is needed")
    wrong = [v for v in published.values() if not _is_number(v)]
    if wrong:
        raise ConfigError(f"{where}: PUBLISHED holds {wrong[0]!r:.200}; numbers are needed")
    odd = [key for key in keys if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"{where}: SET holds the key {odd[0]!r:.200}; dotted names are needed")
    if not (isinstance(entry["NAME"], str) or _is_number(entry["NAME"])):
        raise ConfigError(f"{where}: NAME is {entry['NAME']!r:.200}; text is needed")
    return Row(str(entry["NAME"]), keys, {str(k): float(v) for k, v in published.items()})


def _need_keys(tree: object, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: holds {type(tree).__name__}, a mapping of keys is needed")
    unknown, missing = sorted(map(str, tree.keys() - known)), sorted(needed - tree.keys())
    if unknown or missing:
        problem = f"lacks {missing[0]!r}" if missing else ""
        if unknown:
            problem = f"unknown key {unknown[0]!r}{cfgnode.did_you_mean(unknown[0], known)}"
        raise ConfigError(f"{where}: {problem}; known keys: {', '.join(sorted(known))}")


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _slug(name: str) -> str:
    """A folder name: lower-case letters, digits, dots, - and _; never empty, never a dot file."""
    slug = re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_.")
    return slug or hashlib.sha256(name.encode()).hexdigest()[:8]


def study_digest(study: Study, runs: Sequence[PlannedRun]) -> str:
    """Identifies rows and configurations of a study, whatever its seeds."""
    content = [study.title, [(r.row, r.digest) for r in runs]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
