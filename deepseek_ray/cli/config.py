"""`deepseek-ray config`: what a configuration file may say, what it says, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deepseek_ray.config.kinds import KINDS, find_kind
from deepseek_ray.errors import DeepSeekRayError

config = typer.Typer(
    help="Check configuration files and show what counts in them.", no_args_is_help=True, rich_markup_mode="rich"
)

KindOption = Annotated[str, typer.Option(help=f"What the file configures: {', '.join(KINDS)}.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. training.steps=20; repeatable.")
]


@config.command()
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Configuration files (YAML).")],
    kind: KindOption = "pretrain",
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check files without starting anything: OK, or every problem with its file and line (exit code 1).

    [bold]Examples[/bold]

      deepseek-ray config validate configs/*.yaml\n
      deepseek-ray config validate run.yaml --set training.steps=20 --json
    """
    from deepseek_ray.config.check import Problem, find_problems
    from deepseek_ray.config.load import load_values

    cls = find_kind(kind).config_class
    failed = False
    for file in files:
        try:
            problems = find_problems(cls, load_values(cls, file, set_ or []))
        except DeepSeekRayError as error:  # no YAML, no mapping, no such model: there is nothing to check further
            problems = [Problem(str(file), error.message)]
        failed = failed or bool(problems)
        if as_json:
            print(json.dumps({"file": str(file), "ok": not problems, "problems": [asdict(p) for p in problems]}))
        else:
            lines = [f"{problem.place}: {problem.message.removeprefix(f'{file}: ')}" for problem in problems]
            print("\n".join(lines or [f"{file}: OK"]))
    if failed:
        raise typer.Exit(1)


@config.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Configuration file (YAML).")],
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value is from.")] = False,
    kind: KindOption = "pretrain",
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print the effective configuration, defaults included, as YAML that reads back as the same.

    [bold]Examples[/bold]

      deepseek-ray config show configs/tiny.yaml --origin\n
      deepseek-ray config show configs/tiny.yaml --set training.steps=20 > run.yaml\n
      deepseek-ray config show configs/tiny.yaml --json | jq .training
    """
    from deepseek_ray.config.load import load_config, load_values
    from deepseek_ray.config.origins import effective_values, to_yaml

    cls = find_kind(kind).config_class
    checked = load_config(cls, file, set_ or [])
    values = effective_values(checked, load_values(cls, file, set_ or []).origins)
    if not as_json:
        print(to_yaml(values, with_origin=origin), end="")
    elif origin:
        print(json.dumps({".".join(v.path): {"value": v.value, "origin": v.origin} for v in values}, indent=2))
    else:
        print(json.dumps(checked.model_dump(mode="json"), indent=2))


@config.command()
def schema(kind: KindOption = "pretrain") -> None:
    """Print the JSON Schema of a configuration file, with which editors complete and check YAML.

    [bold]Examples[/bold]

      deepseek-ray config schema > run.schema.json\n
      deepseek-ray config schema --kind deployment
    """
    from deepseek_ray.config.schema import json_schema

    print(json.dumps(json_schema(find_kind(kind).config_class), indent=2))


@config.command()
def reference() -> None:
    """Print every key with its type, default, bounds and meaning as Markdown.

    [bold]Examples[/bold]

      deepseek-ray config reference > docs/configuration.md
    """
    from deepseek_ray.config.reference import reference_markdown

    print(reference_markdown(), end="")
