"""Reading YAML of strangers: plain values only, no duplicate key, no bomb."""

from __future__ import annotations

import os

import yaml

from moco.errors import ConfigError

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000  # counted with every repetition by an alias
_DEEPEST = 50
_LONGEST_NUMBER = 100  # characters; PyYAML's base 60 takes seconds for a long one
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two equal keys without a word, made strict."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # PyYAML's own error says what it is
        seen: dict[object, yaml.Node] = {}
        for key_node, _ in node.value:
            is_merge = key_node.tag == _MERGE
            key = "<<" if is_merge else self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                break  # PyYAML's own error says that it cannot be a key
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}; keep one of them", key_node.start_mark
                )
            seen[key] = key_node
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copies what `<<` names. Before 6.0.4 PyYAML did so without a limit, ten times a level."""
        num_pairs = 0
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                is_list = isinstance(value_node, yaml.SequenceNode)
                for part in value_node.value if is_list else [value_node]:
                    if isinstance(part, yaml.MappingNode):
                        self.flatten_mapping(part)
                        num_pairs += len(part.value)
        if num_pairs > _MOST_VALUES:
            raise ValueError(f"its merge keys unfold into more than {_MOST_VALUES} values")
        super().flatten_mapping(node)

    def construct_scalar(self, node: yaml.ScalarNode) -> object:
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )
        return super().construct_scalar(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except (LookupError, AttributeError, ArithmeticError, ValueError) as error:
            # PyYAML takes it for granted that a tag fits its text: `!!bool x` is a KeyError.
            raise yaml.constructor.ConstructorError(
                None, None, f"its value is no {node.tag.rpartition(':')[2]}", node.start_mark
            ) from error


def read_yaml(path: str | os.PathLike) -> object:
    """The content of a YAML file: mappings, lists, text, numbers, booleans, null, dates.

    Raises: ConfigError naming file and reason: it cannot be read, is no valid YAML, repeats a key,
        asks for Python objects, is larger than 1 MiB, or unfolds by aliases into too many values.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read this config file ({error.strerror}); give an existing .yaml file"
        ) from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB, no configuration is")
    try:
        tree = yaml.load(content, Loader=_Loader)  # noqa: S506 (a subclass of SafeLoader)
        _refuse_bombs(tree, [0], depth=0)
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply for a configuration") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    return tree


def _refuse_bombs(value: object, count: list[int], depth: int) -> None:
    count[0] += 1
    if count[0] > _MOST_VALUES:
        raise ValueError(f"its aliases unfold into more than {_MOST_VALUES} values")
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    if isinstance(value, dict):
        for item in value.values():
            _refuse_bombs(item, count, depth + 1)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _refuse_bombs(item, count, depth + 1)
