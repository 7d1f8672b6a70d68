"""Where each value of a configuration is from: the command line, the environment, the file, a default, or derived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.yaml_file import KeyPath

DEFAULT = "default"
DERIVED = "derived"
"""Filled in from other values, such as the vocabulary of a model whose tokenizer is trained in the same run."""


@dataclass(frozen=True)
class EffectiveValue:
    """One key that has no keys inside. `value` is plain: what YAML and JSON can hold."""

    path: KeyPath
    value: Any
    origin: str


def effective_values(config: FrozenConfig, origins: Mapping[KeyPath, str]) -> list[EffectiveValue]:
    """Every key of a checked configuration in the order of its classes; `origins` is that of `LoadedValues`."""
    return list(_walk(config, None, origins, ()))


def to_yaml(values: list[EffectiveValue], with_origin: bool = False) -> str:
    """A file that reads back as the same configuration, on request with each value's origin as a comment."""
    lines: list[tuple[str, str]] = []
    above: KeyPath = ()
    for effective in values:
        *sections, key = effective.path
        for depth, section in enumerate(sections):
            if above[: depth + 1] != effective.path[: depth + 1]:
                lines.append((f"{'  ' * depth}{'-' if section.isdigit() else section + ':'}", ""))
        above = effective.path
        lines.append((f"{'  ' * len(sections)}{key}: {_flow(effective.value)}", effective.origin))
    if not with_origin:
        return "".join(f"{text}\n" for text, _ in lines)
    width = min(60, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _walk(
    config: FrozenConfig, default: FrozenConfig | None, origins: Mapping[KeyPath, str], path: KeyPath
) -> Iterator[EffectiveValue]:
    """`default` is what the whole section is when it is left out; None if it has none, or is itself left at None."""
    dumped = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), (*path, name)
        fallback = getattr(default, name) if default else field.get_default(call_default_factory=True)
        if isinstance(value, FrozenConfig):
            yield from _walk(value, fallback if isinstance(fallback, type(value)) else None, origins, key)
        elif isinstance(value, tuple) and value and all(isinstance(item, FrozenConfig) for item in value):
            for index, item in enumerate(value):
                yield from _walk(item, None, origins, (*key, str(index)))
        else:
            origin = origins.get(key) or (DEFAULT if value == fallback else DERIVED)
            yield EffectiveValue(key, dumped[name], origin)


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    return yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9).strip()[1:-1]
