"""YAML as this project reads it: a repeated key is an error, 1e-4 is a number, and every key knows its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deepseek_ray.errors import ConfigError

KeyPath = tuple[str, ...]
"""The parts of a dotted key: `training.steps` is ("training", "steps"). Items of a list count from "0"."""


@dataclass(frozen=True)
class YamlFile:
    """What a file says, and on which line (from 1) it says it."""

    values: dict[str, Any]
    lines: dict[KeyPath, int]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is missing, malformed, no mapping, or repeats a key."""
    return read_yaml_file(path).values


def read_yaml_file(path: Path) -> YamlFile:
    """The mapping and the lines of its keys; errors as in `read_yaml`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give the path of a run file, for example configs/tiny.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a YAML file in UTF-8") from None
    values, lines = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a run file is a mapping of sections")
    return YamlFile(values, lines)


def parse_yaml(text: str, source: str) -> Any:
    """Any YAML value; `source` says in errors where the text is from."""
    return _parse(text, source)[0]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but a repeated key is an error and 1e-4 is a number."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _parse(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    try:
        loader = _Loader(text)
        loader.name = source  # what error messages call the text
        try:
            node = loader.get_single_node()
            value = None if node is None else loader.construct_document(node)
            return value, {} if node is None else _lines(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def _lines(node: yaml.Node, path: KeyPath = ()) -> dict[KeyPath, int]:
    """Lines of the keys and items below a node."""
    if isinstance(node, yaml.MappingNode):
        inside = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inside = [(str(index), item, item) for index, item in enumerate(node.value)]
    else:
        return {}
    lines: dict[KeyPath, int] = {}
    for name, place, value in inside:
        inner = (*path, name)
        lines[inner] = place.start_mark.line + 1
        lines.update(_lines(value, inner))
    return lines
