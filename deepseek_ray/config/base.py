"""The base of every configuration class: frozen, unknown keys refused, errors that name the key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from deepseek_ray.errors import ConfigError


class FrozenConfig(BaseModel):
    """A frozen pydantic model that forbids unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Build from a mapping; raise ConfigError naming each problem. `source` says where the values are from."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error, cls, source)) from None


def describe_validation_error(error: ValidationError, cls: type[BaseModel], source: str) -> str:
    """All problems in one line: key, value, what is allowed, and the nearest known key for a misspelt one."""
    prefix = f"{source}: " if source else ""
    return prefix + "; ".join(text for _, text in list_problems(error, cls))


def list_problems(
    error: ValidationError, cls: type[BaseModel], section: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], str]]:
    """(key, what is wrong with it) of each problem. `section` is where the values of `cls` stand in a larger whole."""
    problems = []
    for problem in error.errors(include_url=False):
        path = (*section, *map(str, problem["loc"]))
        key = ".".join(path) or cls.__name__
        if problem["type"] == "extra_forbidden":
            known = _known_keys(cls, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            text = f"unknown key {key!r}; {hint}"
        elif problem["type"] == "missing":
            text = f"{key} is missing; it has no default, so give it a value"
        elif problem["type"] == "value_error":  # a check of several keys: its message names them
            text = f"{key}: {problem['msg'].removeprefix('Value error, ')}"
        else:
            text = f"{key} is {problem.get('input')!r}: {problem['msg']}"
        problems.append((path, text))
    return problems


def _known_keys(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):  # an item of a list, whose class was found with the list
            continue
        field = cls.model_fields.get(str(part))
        annotation = field.annotation if field else None
        options = getattr(annotation, "__args__", (annotation,))
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not nested:
            return []
        cls = nested[0]
    return list(cls.model_fields)
