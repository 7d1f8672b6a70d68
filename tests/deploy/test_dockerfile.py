"""`deploy/Dockerfile`, read: pinned, constrained, without root; and a build context with what it copies, no more."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import typer.main
from manifests import REPOSITORY

from deepseek_ray.cli.main import app


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined."""
    text = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


def of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions if instruction == name]


def test_both_stages_start_from_one_pinned_slim_python(instructions: list[tuple[str, str]]) -> None:
    bases = {base.split()[0] for base in of(instructions, "FROM")}
    (base,) = bases
    version = re.fullmatch(r"python:3\.(\d+)\.\d+-slim-[a-z]+", base)
    assert version and int(version[1]) >= 11


def test_packages_are_installed_under_the_constraints_only(instructions: list[tuple[str, str]]) -> None:
    installs = [run for run in of(instructions, "RUN") if "pip install" in run]
    assert len(installs) == 1
    assert "-c constraints.txt" in installs[0]
    assert "ARG" in [name for name, _ in instructions] and of(instructions, "ARG") == ["DEVICE=cpu"]
    assert "https://download.pytorch.org/whl/cpu" in installs[0] and "exit 1" in installs[0]


def test_it_ends_without_root(instructions: list[tuple[str, str]]) -> None:
    assert of(instructions, "USER") == ["1000:1000"]
    after = [name for name, _ in instructions[instructions.index(("USER", "1000:1000")) :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)


def test_nothing_is_fetched_behind_pips_and_apts_back(instructions: list[tuple[str, str]]) -> None:
    assert of(instructions, "ADD") == []
    assert not [run for run in of(instructions, "RUN") if re.search(r"\b(curl|wget)\s+(-\S+\s+)*http", run)]


def test_it_holds_what_probes_and_kernels_need(instructions: list[tuple[str, str]]) -> None:
    (apt,) = [run for run in of(instructions, "RUN") if "apt-get install" in run]
    assert {"wget", "g++"} <= set(apt.split())


def test_an_open_cluster_is_not_started_by_mistake(instructions: list[tuple[str, str]]) -> None:
    (environment,) = of(instructions, "ENV")
    assert "RAY_AUTH_MODE=token" in environment.split()
    assert not re.search(r"(TOKEN|KEY|SECRET|PASSWORD)=", environment)


def test_the_command_is_one_of_ours(instructions: list[tuple[str, str]]) -> None:
    program, command, *arguments = json.loads(of(instructions, "CMD")[0])
    assert program == "deepseek-ray"
    group: Any = typer.main.get_command(app)
    options = group.commands[command].make_context(command, list(arguments)).params  # raises for an unknown option
    assert (str(options["model_dir"]), options["host"]) == ("/model", "0.0.0.0")
    (check,) = of(instructions, "HEALTHCHECK")
    assert f"http://127.0.0.1:{options['port']}/health" in check
    assert of(instructions, "EXPOSE") == [str(options["port"])]


def test_the_context_is_what_is_copied(instructions: list[tuple[str, str]]) -> None:
    copied = {
        source.removeprefix("./")
        for arguments in of(instructions, "COPY")
        if not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    first, *rest = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    assert {line.removeprefix("!") for line in rest if line.startswith("!")} == copied
    assert all((REPOSITORY / source).exists() for source in copied)
