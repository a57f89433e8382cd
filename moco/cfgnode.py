"""YAML configuration on fvcore's CfgNode, with errors that name file, key and alternatives.

fvcore's node is the one Detectron2 uses: `_BASE_` files, `KEY VALUE` overrides and types
checked against the defaults tree behave as its users know them. Added here: unknown keys are
reported with the file and the nearest known name, YAML is always loaded safely, and a digest
identifies a configuration.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Sequence

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
        try:
            cfg.merge_from_other_cfg(CfgNode(tree))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{config_file}: {_one_line(error)}") from error
    overrides = list(overrides)
    if len(overrides) % 2:
        raise ConfigError(
            f"command line: {len(overrides)} words after the flags, KEY VALUE pairs are needed; "
            f"got {' '.join(overrides)!r}"
        )
    for key, value in zip(overrides[0::2], overrides[1::2], strict=True):
        _check_keys(_nest(key, value), defaults, where="command line")
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(f"command line: {key}: {_one_line(error)}") from error
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


def digest(cfg: CfgNode, exclude: Sequence[str] = ()) -> str:
    """SHA-256 (first 16 hex digits) of the configuration, leaving out the dotted keys `exclude`."""
    tree = to_dict(cfg)
    for dotted in exclude:
        node = tree
        *parents, last = dotted.split(".")
        for part in parents:
            node = node[part]
        del node[last]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def dump_yaml(cfg: CfgNode) -> str:
    """The full configuration as YAML, which `load_config` reads back."""
    return yaml.safe_dump(to_dict(cfg), sort_keys=True)


def _load_yaml_chain(path: str, seen: tuple[str, ...]) -> dict:
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


def _check_keys(tree: dict, known: CfgNode, where: str, prefix: str = "") -> None:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            under = f"under {prefix[:-1]}" if prefix else "at the top"
            raise ConfigError(
                f"{where}: unknown key {dotted!r}{hint}. "
                f"Known keys {under}: {', '.join(sorted(known))}"
            )
        if isinstance(known[key], dict) != isinstance(value, dict):
            needed = "a mapping of keys" if isinstance(known[key], dict) else "a single value"
            raise ConfigError(f"{where}: {dotted!r} is given as {value!r}, {needed} is needed")
        if isinstance(value, dict):
            _check_keys(value, known[key], where, prefix=f"{dotted}.")


def _nest(dotted: str, value: object) -> dict:
    tree: object = value
    for part in reversed(dotted.split(".")):
        tree = {part: tree}
    return tree


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
