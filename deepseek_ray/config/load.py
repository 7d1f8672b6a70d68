"""A run file (YAML), the environment and `--set key=value` overrides, turned into a checked configuration.

What counts, the later the stronger: defaults in the configuration classes, the file, variables of the environment such
as `DEEPSEEK_RAY__TRAINING__STEPS=20`, the overrides in their order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.model import ModelConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.config.yaml_file import KeyPath, parse_yaml, read_yaml_file
from deepseek_ray.errors import ConfigError

ENVIRONMENT_PREFIX = "DEEPSEEK_RAY__"
"""`DEEPSEEK_RAY__TRAINING__STEPS` is `training.steps`: two underscores where a dotted key has its dot."""

Config = TypeVar("Config", bound=FrozenConfig)


@dataclass(frozen=True)
class LoadedValues:
    """What was given, not yet checked, and where each key of it is from (`configs/tiny.yaml:3`, `--set a.b=1`)."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    source: str
    """All places together, as the beginning of an error message."""


def load_pretrain_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read `path` and apply overrides such as `training.steps=20`; raise ConfigError naming the key and the remedy."""
    return load_config(PretrainConfig, path, overrides)


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration of any kind from its file, the environment and overrides; ConfigError as above."""
    loaded = load_values(cls, path, overrides)
    try:
        return cls.parse(loaded.values, loaded.source)
    except ConfigError as error:
        prefix = "" if error.message.startswith(loaded.source) else f"{loaded.source}: "
        raise ConfigError(prefix + error.message) from None


def load_values(
    cls: type[FrozenConfig],
    path: str | Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> LoadedValues:
    """What file, environment and overrides say about a configuration of class `cls`, unchecked."""
    path = Path(path)
    file = read_yaml_file(path)
    values = file.values
    origins = {key: f"{path}:{line}" for key, line in file.lines.items()}
    model = cls.model_fields.get("model")
    if model is not None and model.annotation is ModelConfig and isinstance(values.get("model"), str):
        config_json = _config_json(path.parent / Path(values["model"]).expanduser())
        values["model"] = ModelConfig.from_dir(config_json.parent).model_dump(exclude_unset=True)
        _record(origins, ("model",), values["model"], str(config_json))
    from_environment = _environment_overrides(environment)
    for name, override in from_environment:
        _record(origins, *apply_override(values, override, label=f"{name}={environment[name]!r}"), origin=name)
    for override in overrides:
        _record(origins, *apply_override(values, override), origin=f"--set {override}")
    source = " with ".join([str(path), *[name for name, _ in from_environment], *(["--set"] if overrides else [])])
    return LoadedValues(values, origins, source)


def apply_override(values: dict[str, Any], override: str, label: str | None = None) -> tuple[KeyPath, Any]:
    """Set one dotted key in place: `training.steps=20`. The value is read as YAML, so `null` and `[1, 2]` work.

    Returns the key and the value. `label` is what error messages call the override.
    """
    label = label or f"--set {override!r}"
    key, separator, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not separator or not all(parts):
        raise ConfigError(f"{label} is not of the form key=value, for example --set training.steps=20")
    section = values
    for depth, part in enumerate(parts[:-1], start=1):
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{label}: {'.'.join(parts[:depth])} is {inner!r}, which has no keys inside; set it as a whole"
            )
        section = inner
    section[parts[-1]] = parse_yaml(text, label)
    return parts, section[parts[-1]]


def _environment_overrides(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """(variable, override) of every variable with the prefix, in alphabetical order."""
    names = sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX))
    return [
        (name, f"{name.removeprefix(ENVIRONMENT_PREFIX).lower().replace('__', '.')}={environment[name]}")
        for name in names
    ]


def _config_json(path: Path) -> Path:
    """The `config.json` named in a run file by its own path or by its folder's."""
    return path if path.name == "config.json" else path / "config.json"


def _record(origins: dict[KeyPath, str], key: KeyPath, value: Any, origin: str) -> None:
    """`key` and everything below it is now from `origin`."""
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins[key] = origin
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in inside:
        _record(origins, (*key, str(name)), inner, origin)
