"""YAML configuration on fvcore's CfgNode, with errors that name file, key and alternatives.

fvcore's node is the one Detectron2 uses: `_BASE_` files, `KEY VALUE` overrides and types
checked against the defaults tree behave as its users know them. Added here: unknown keys are
reported with the file and the nearest known name, YAML is always loaded safely, and a digest
identifies a configuration.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import yaml
from fvcore.common.config import CfgNode as _FvcoreNode

from moco.errors import ConfigError
from moco.safe_yaml import read_yaml


class CfgNode(_FvcoreNode):
    """fvcore's node, constructed from keyword arguments or a dict."""

    def __init__(
        self,
        init_dict: dict | None = None,
        key_list: list[str] | None = None,  # yacs passes these two when it builds child nodes
        new_allowed: bool = False,
        **fields,
    ):
        super().__init__({**(init_dict or {}), **fields}, key_list, new_allowed)


def load_config(
    defaults: CfgNode, config_file: str | None, overrides: Sequence[str] = ()
) -> CfgNode:
    """Merge a YAML file (with its `_BASE_` chain) and `KEY VALUE` pairs into a copy of `defaults`.

    Returns: a frozen node.
    Raises: ConfigError for a missing or malformed file, an unknown key or a wrong type.
    """
    cfg = defaults.clone()
    if config_file:
        tree = _load_yaml_chain(config_file, seen=())
        _check_keys(tree, defaults, where=config_file)
        with _as_config_error(config_file):
            cfg.merge_from_other_cfg(CfgNode(tree))
        for key in flatten(tree):
            _check_value(get_key(cfg, key), get_key(defaults, key), f"{config_file}: {key}")
    overrides = list(overrides)
    if len(overrides) % 2:
        raise ConfigError(
            f"command line: {len(overrides)} words after the flags, KEY VALUE pairs are needed; "
            f"got {' '.join(overrides)!r}"
        )
    for key, value in zip(overrides[0::2], overrides[1::2], strict=True):
        _check_keys(_nest(key, value), defaults, where="command line")
        with _as_config_error(f"command line: {key}"):
            cfg.merge_from_list([key, value])
        _check_value(get_key(cfg, key), get_key(defaults, key), f"command line: {key}")
    cfg.freeze()
    return cfg


def to_dict(cfg: CfgNode) -> dict:
    """The node as plain dicts, lists and scalars, readable by json and `weights_only` loading."""
    out = {}
    for key, value in cfg.items():
        if isinstance(value, dict):
            out[key] = to_dict(value)
        else:
            out[key] = _plain(value)
    return out


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested mappings as one mapping with dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def get_key(cfg: CfgNode, dotted: str) -> object:
    """The value of a dotted key."""
    for part in dotted.split("."):
        cfg = cfg[part]
    return cfg


def digest(
    cfg: CfgNode, exclude: Sequence[str] = (), added_later: Mapping[str, object] | None = None
) -> str:
    """SHA-256 (first 16 hex digits) of the configuration, leaving out the dotted keys `exclude`,
    and those of `added_later` that have the value given there."""
    tree = to_dict(cfg)
    given = flatten(tree)
    unused = [dotted for dotted, value in (added_later or {}).items() if given[dotted] == value]
    for dotted in [*exclude, *unused]:
        *parents, last = dotted.split(".")
        nodes = [tree]
        for part in parents:
            nodes.append(nodes[-1][part])
        del nodes[-1][last]
        for node, part in zip(nodes[-2::-1], parents[::-1], strict=True):
            if not node[part]:  # a section that came later with its keys
                del node[part]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def dump_yaml(cfg: CfgNode) -> str:
    """The full configuration as YAML, which `load_config` reads back."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=True)


def _load_yaml_chain(path: str, seen: tuple[str, ...]) -> dict:
    if "\0" in path:
        raise ConfigError(f"{path}: is no path; give an existing .yaml file")
    real = os.path.realpath(path)
    if real in seen:
        raise ConfigError(f"{path}: _BASE_ refers back to itself ({' -> '.join([*seen, real])})")
    tree = read_yaml(path)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, a mapping of keys is needed")
    base = tree.pop("_BASE_", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: _BASE_ is {base!r}, the path of a YAML file is needed")
    base_path = os.path.join(os.path.dirname(path), os.path.expanduser(base))
    return _merge(_load_yaml_chain(base_path, (*seen, real)), tree)


def _merge(base: dict, child: dict) -> dict:
    out = dict(base)
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _merge(out[key], value)
        else:
            out[key] = value
    return out


def did_you_mean(given: object, known: Iterable[str], tree: dict | None = None) -> str:
    """" (did you mean 'QUEUE_SIZE'?)" for an unknown key; "" where no known one is like it.

    Args:
        known: the keys allowed where it was given.
        tree: all keys, nested: where `known` has none like it, one of these may be meant.
    """
    known = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(given)[:100].lower(), known, n=1)
    if close:
        return f" (did you mean {known[close[0]]!r}?)"
    by_end: dict[str, str] = {}
    for dotted in flatten(tree or {}):
        by_end.setdefault(dotted.rpartition(".")[2].lower(), dotted)
    close = difflib.get_close_matches(str(given)[-100:].rpartition(".")[2].lower(), by_end, n=1)
    if not close:
        return ""
    section, _, last = by_end[close[0]].rpartition(".")
    return f" (did you mean {last!r} under {section or 'the top'}?)"


def _check_keys(
    tree: dict, known: CfgNode, where: str, prefix: str = "", root: CfgNode | None = None
) -> None:
    root = known if root is None else root
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in known:
            hint = did_you_mean(key, known, root)
            under = f"under {prefix[:-1]}" if prefix else "at the top"
            raise ConfigError(
                f"{where}: unknown key {dotted!r}{hint}. "
                f"Known keys {under}: {', '.join(sorted(known))}"
            )
        if isinstance(known[key], dict) != isinstance(value, dict):
            needed = "a mapping of keys" if isinstance(known[key], dict) else "a single value"
            raise ConfigError(f"{where}: {dotted!r} is given as {value!r}, {needed} is needed")
        if isinstance(value, dict):
            _check_keys(value, known[key], where, f"{dotted}.", root)


def _check_value(value: object, default: object, where: str) -> None:
    """What fvcore's types let pass: null for any value, and anything in a list."""
    allowed = None
    if value is None and default is not None:
        allowed = f"a value like {default!r}"
    elif not all(map(_is_ordinary, _scalars(value))):
        allowed = f"finite numbers of 64 bits, like {default!r}"
    elif isinstance(default, list | tuple):
        kinds = {_kind(item) for item in _scalars(default)}
        if len(kinds) == 1 and not {_kind(item) for item in _scalars(value)} <= kinds:
            allowed = f"{kinds.pop()}s only, like {default!r}"
    if allowed:
        given = f"{value!r:.200}" if all(map(_is_ordinary, _scalars(value))) else "another number"
        raise ConfigError(f"{where} is {given}; allowed: {allowed}; change the value")


def _scalars(value: object) -> list:
    if isinstance(value, list | tuple):
        return [scalar for item in value for scalar in _scalars(item)]
    return [value]


def _is_ordinary(value: object) -> bool:
    """Not NaN or infinite, and of a size that can be written as JSON and computed with."""
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return not isinstance(value, float) or math.isfinite(value)


def _kind(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return {"str": "text"}.get(type(value).__name__, type(value).__name__)


@contextlib.contextmanager
def _as_config_error(where: str) -> Iterator[None]:
    """fvcore reads text as Python literals, which can fail in all these ways."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:1000]}") from error


def _nest(dotted: str, value: object) -> dict:
    tree: object = value
    for part in reversed(dotted.split(".")):
        tree = {part: tree}
    return tree
