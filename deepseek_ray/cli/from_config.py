"""Options of a command that are the fields of a configuration class: names, meanings and defaults have one home."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from deepseek_ray.config.base import FrozenConfig

_Command = TypeVar("_Command", bound=Callable[..., None])
_METAVARS = {int: "INTEGER", float: "FLOAT", str: "TEXT"}


def with_options(config_class: type[FrozenConfig]) -> Callable[[_Command], _Command]:
    """Give a command, beside its own parameters, an option for every field of `config_class`.

    They arrive as `**given`: texts for the class to check, so that a mistake has one wording wherever it was made.
    """

    def decorate(command: _Command) -> _Command:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        fields = [_parameter(name, field) for name, field in config_class.model_fields.items()]
        keyword_only = [one.replace(kind=one.KEYWORD_ONLY) for one in own]
        command.__signature__ = signature.replace(parameters=[*keyword_only, *fields])  # type: ignore[attr-defined]
        return command

    return decorate


def only_given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that a person typed."""
    return {name: value for name, value in options.items() if value is not None}


class SeveralValuesCommand(TyperCommand):
    """An option that may be repeated also takes its values one after the other: `--data a.txt b.txt`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {flag for one in self.params if getattr(one, "multiple", False) for flag in one.opts}
        return super().parse_args(ctx, _repeat_flags(args, repeatable))


def _repeat_flags(arguments: list[str], repeatable: set[str]) -> list[str]:
    spread: list[str] = []
    flag = ""  # the repeatable option whose values are being read
    for argument in arguments:
        if argument.startswith("-"):
            flag = argument if argument in repeatable else ""
        elif flag and spread[-1] != flag:
            spread.append(flag)
        spread.append(argument)
    return spread


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    # None, also for what has a default: the class fills it in.
    default = inspect.Parameter.empty if field.is_required() else None
    annotation: Any = str if field.is_required() else str | None
    shown = _shown_default(field)
    options: dict[str, Any] = {"help": " ".join((field.description or "").split()), "show_default": shown}
    if field.annotation is bool:
        annotation, options["show_default"] = bool | None, False
    elif get_origin(field.annotation) is tuple:
        annotation = list[str] if field.is_required() else list[str] | None
    options["metavar"] = None if field.annotation is bool else _metavar(field.annotation)
    option = typer.Option(f"--{name.replace('_', '-')}", **options)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def _shown_default(field: FieldInfo) -> str | bool:
    if field.is_required() or field.default in (None, ()):
        return False
    return " ".join(field.default) if isinstance(field.default, tuple) else str(field.default)


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = [kind for kind in (annotation, *get_args(annotation)) if kind in _METAVARS]
    return _METAVARS[kinds[0]]
