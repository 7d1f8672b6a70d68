"""Options made from a configuration class: what a person types arrives as typed, what is left out is the class's."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from deepseek_ray.cli.from_config import SeveralValuesCommand, only_given, with_options
from deepseek_ray.cli.main import app
from deepseek_ray.config.batch import BatchConfig
from deepseek_ray.config.evaluation import EvaluationConfig

REQUIRED = ["--model-dir", "m", "--input", "a", "--output", "o"]
AS_GIVEN = {"model_dir": "m", "input": ["a"], "output": "o"}


def given_by(*arguments: str) -> dict[str, Any]:
    seen: list[dict[str, Any]] = []
    commands = typer.Typer()

    @commands.command(cls=SeveralValuesCommand)
    @with_options(BatchConfig)
    def batch(as_json: Annotated[bool, typer.Option("--json")] = False, **given: Any) -> None:
        seen.append(only_given(given))

    done = CliRunner().invoke(commands, arguments)
    assert done.exit_code == 0, done.output
    return seen[0]


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ([], {}),
        (["--chat", "--json"], {"chat": True}),
        (["--max-tokens", "4", "--temperature", "0.5"], {"max_tokens": "4", "temperature": "0.5"}),
        (["--stop", "x", "y", "--seed", "3"], {"stop": ["x", "y"], "seed": "3"}),
        (["--stop", "x", "--stop", "y", "z"], {"stop": ["x", "y", "z"]}),
    ],
)
def test_what_is_typed_arrives_and_nothing_else(arguments: list[str], more: dict[str, Any]) -> None:
    assert given_by(*REQUIRED, *arguments) == {**AS_GIVEN, **more}


def test_an_option_of_one_value_takes_one() -> None:
    done = CliRunner().invoke(app, ["batch", *REQUIRED, "--seed", "1", "2"])
    assert done.exit_code == 2
    assert "unexpected extra argument" in done.output


@pytest.mark.parametrize(("command", "config_class"), [("batch", BatchConfig), ("evaluate", EvaluationConfig)])
def test_help_names_every_field_its_default_and_examples(command: str, config_class: Any) -> None:
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0
    for name, field in config_class.model_fields.items():
        assert f"--{name.replace('_', '-')} " in done.output
        if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool):
            assert f"({field.default})" in done.output
    assert "Examples" in done.output
    assert f"deepseek-ray {command} " in done.output


def test_a_value_that_cannot_be_is_told_as_in_a_file() -> None:
    done = CliRunner().invoke(app, ["batch", *REQUIRED, "--max-tokens", "many"])
    assert "arguments: max_tokens is 'many': Input should be a valid integer" in str(done.exception)
