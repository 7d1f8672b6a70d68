"""A run file (YAML) and `--set key=value` overrides, turned into a checked configuration.

What counts, the later the stronger: defaults in the configuration classes, the file, the overrides in their order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError


def load_pretrain_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read `path` and apply overrides such as `training.steps=20`; raise ConfigError naming the key and the remedy."""
    path = Path(path)
    values = read_yaml(path)
    source = str(path)
    if isinstance(values.get("model"), str):
        values["model"] = _model_file(path.parent / Path(values["model"]).expanduser())
    for override in overrides:
        apply_override(values, override)
        source = f"{path} with --set"
    try:
        return PretrainConfig.parse(values, source)
    except ConfigError as error:
        prefix = "" if error.message.startswith(source) else f"{source}: "
        raise ConfigError(prefix + error.message) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is missing, malformed, no mapping, or repeats a key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give the path of a run file, for example configs/tiny.yaml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a YAML file in UTF-8") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a run file is a mapping of sections")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in place: `training.steps=20`. The value is read as YAML, so `null` and `[1, 2]` work."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override!r} is not of the form key=value, for example --set training.steps=20")
    section = values
    for depth, part in enumerate(parts[:-1], start=1):
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {override!r}: {'.'.join(parts[:depth])} is {inner!r}, which has no keys inside; "
                "set it as a whole"
            )
        section = inner
    section[parts[-1]] = _parse(text, f"--set {override!r}")


def _model_file(path: Path) -> dict[str, Any]:
    """The fields of a `config.json` named in a run file."""
    directory = path.parent if path.name == "config.json" else path
    return ModelConfig.from_dir(directory).model_dump(exclude_unset=True)


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


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
