"""Everything that is wrong with a configuration, each with the line that says it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from deepseek_ray.config.base import FrozenConfig, list_problems
from deepseek_ray.config.load import LoadedValues
from deepseek_ray.config.yaml_file import KeyPath
from deepseek_ray.errors import DeepSeekRayError


@dataclass(frozen=True)
class Problem:
    """`place` is `file:line`, an override or a variable; the whole source where no single place is to blame."""

    place: str
    message: str


def find_problems(cls: type[FrozenConfig], loaded: LoadedValues) -> list[Problem]:
    """Empty when `loaded` is a valid `cls`. Checks of several keys need valid keys: mending some may show others."""
    try:
        cls.model_validate(loaded.values)
    except ValidationError as error:
        return [_located(path, text, loaded) for path, text in list_problems(error, cls)]
    except DeepSeekRayError as error:  # it ends pydantic's own collecting, so the sections are asked one by one
        found = [
            *_section_problems(cls, loaded),
            _located(_named_key(error.message, (), loaded), error.message, loaded),
        ]
        return list({problem.message: problem for problem in found}.values())
    return []


def _section_problems(cls: type[FrozenConfig], loaded: LoadedValues) -> Iterator[Problem]:
    """A section alone cannot tell what the whole fills in, so missing keys are not its business."""
    for name, field in cls.model_fields.items():
        section, values = field.annotation, loaded.values.get(name)
        if not (isinstance(section, type) and issubclass(section, FrozenConfig) and isinstance(values, Mapping)):
            continue
        try:
            section.model_validate(values)
        except ValidationError as error:
            missing = {(name, *map(str, entry["loc"])) for entry in error.errors() if entry["type"] == "missing"}
            for path, text in list_problems(error, section, (name,)):
                if path not in missing:
                    yield _located(path, text, loaded)
        except DeepSeekRayError as error:
            yield _located(_named_key(error.message, (name,), loaded), error.message, loaded)


def _located(path: KeyPath, message: str, loaded: LoadedValues) -> Problem:
    """At the key, else at the innermost section around it that was given."""
    for length in range(len(path), 0, -1):
        if path[:length] in loaded.origins:
            return Problem(loaded.origins[path[:length]], message)
    return Problem(loaded.source, message)


def _named_key(message: str, section: KeyPath, loaded: LoadedValues) -> KeyPath:
    """The first given key that a message names. Ours begin with the key, in full or as its own section calls it."""
    for position, word in enumerate(re.findall(r"[A-Za-z_][\w.]*\w", message)):
        parts = tuple(word.split("."))
        inside = [key for key in loaded.origins if key[: len(section)] == section and key[-len(parts) :] == parts]
        if inside and (position == 0 or "_" in word or "." in word):  # later words may be plain English
            return min(inside, key=len)
    return section
