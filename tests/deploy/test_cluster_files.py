"""`cluster.yaml` and `deploy/on-prem.yaml`: what `ray up` itself checks, and what it does not: tokens, ports, roles."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from manifests import CLUSTER_FILES, REPOSITORY, ROLE
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

both = pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda path: path.name)
AWS, ON_PREM = CLUSTER_FILES
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def start_lines(path: Path, *keys: str) -> list[str]:
    return [line for key in keys for line in read(path)[key] if re.search(r"\bray start\b", line)]


def ray_start_options(line: str) -> dict[str, Any]:
    """The options after `ray start`, parsed by Ray's own command; unknown ones are refused."""
    return parse_options(shlex.split(line.partition("ray start")[2]))


def parse_options(arguments: list[str]) -> dict[str, Any]:
    options, rest, _ = start.make_parser(click.Context(start)).parse_args(arguments)
    assert rest == []
    return options


@both
def test_ray_takes_the_file(path: Path) -> None:
    config = prepare_config(read(path))
    validate_config(config)
    assert config["max_workers"] >= 2


@both
def test_ray_would_refuse_a_misspelt_key(path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepare_config(read(path)), "setup_comands": []})


@both
def test_every_ray_start_has_the_token_and_the_environment(path: Path) -> None:
    config = read(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    lines = start_lines(path, *START_COMMANDS)
    assert len(lines) == 2
    for line in lines:
        exported = re.match(r"export ([^;]*);", line)
        assert exported, line
        assert {"RAY_AUTH_MODE=token", "PATH=$HOME/venv/bin:$PATH", "PYTHONPATH=$HOME/deepseek-ray"} == set(
            exported[1].split()
        )


@both
def test_ray_start_has_known_options_and_one_set_of_ports(path: Path) -> None:
    (head,), (worker,) = (start_lines(path, key) for key in START_COMMANDS)
    head_options, worker_options = ray_start_options(head), ray_start_options(worker)
    assert worker_options["address"] == f"$RAY_HEAD_IP:{head_options['port']}"
    assert head_options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    ports = ("object_manager_port", "node_manager_port", "min_worker_port", "max_worker_port")
    assert [head_options[port] for port in ports] == [worker_options[port] for port in ports]
    assert None not in [head_options[port] for port in ports]


@both
def test_the_dashboard_stays_on_the_head(path: Path) -> None:
    (head,) = start_lines(path, "head_start_ray_commands")
    assert ray_start_options(head)["dashboard_host"] == "127.0.0.1"
    assert "0.0.0.0" not in path.read_text()


@both
def test_commands_are_shell(path: Path) -> None:
    config = read(path)
    commands = [command for key in config if key.endswith("_commands") for command in config[key]]
    subprocess.run(["bash", "-n"], input="\n".join(commands), text=True, check=True)


@both
def test_mounted_files_are_there_and_enough_to_install(path: Path) -> None:
    mounts = read(path)["file_mounts"]
    local = {mount for mount in mounts.values() if mount != "~/.ray/auth_token"}
    assert all((REPOSITORY / mount).exists() for mount in local)
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "deepseek_ray", "deploy"} <= local
    assert not {".", ".git", ".venv"} & local
    assert all(remote == f"~/deepseek-ray/{mount}" for remote, mount in mounts.items() if mount in local)


def test_on_aws_a_nodes_role_is_a_label_and_a_resource() -> None:
    types = read(AWS)["available_node_types"]
    assert types.keys() == {"head", "attention", "experts"}
    for name, node in types.items():
        assert node["labels"] == {ROLE: name}
        validate_node_label_syntax(node["labels"])
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
    assert types["head"]["resources"] == {"CPU": 0}
    for name in ("attention", "experts"):
        assert types[name]["resources"][name] == 1
        assert types[name]["min_workers"] <= types[name]["max_workers"]
    assert types["attention"]["resources"]["GPU"] == 1
    assert read(AWS)["max_workers"] == sum(types[name]["max_workers"] for name in ("attention", "experts"))


@pytest.mark.parametrize(("has_gpu", "role"), [(True, "attention"), (False, "experts")])
def test_on_prem_a_worker_finds_its_role(has_gpu: bool, role: str, tmp_path: Path) -> None:
    """The line runs for real, with a `ray` that prints what it was given."""
    _program(tmp_path / "ray", 'printf "%s\\n" "$@"')
    _program(tmp_path / "nvidia-smi", "exit 0" if has_gpu else "exit 9")
    (line,) = start_lines(ON_PREM, "worker_start_ray_commands")
    line = line.replace("$HOME/venv/bin", str(tmp_path))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_HEAD_IP": "10.0.0.1"}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True)
    command, *arguments = done.stdout.splitlines()
    options = parse_options(arguments)
    assert (command, options["address"]) == ("start", "10.0.0.1:6379")
    assert options["labels"] == f"{ROLE}={role}"
    assert yaml.safe_load(options["resources"]) == {role: 1}


def test_on_prem_the_head_runs_no_work() -> None:
    (line,) = start_lines(ON_PREM, "head_start_ray_commands")
    options = ray_start_options(line)
    assert (options["num_cpus"], options["labels"]) == ("0", f"{ROLE}=head")


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_node_is_installed_with_the_constraints(has_gpu: bool, tmp_path: Path) -> None:
    """The script runs for real, with a `python3` that writes down what it is asked to do."""
    log = tmp_path / "log"
    record = f'echo "$0 $*" >> {log}\nif [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi'
    _program(tmp_path / "python3", record)
    _program(tmp_path / "g++", "exit 0")
    _program(tmp_path / "nvidia-smi", "exit 0" if has_gpu else "exit 9")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run(["bash", str(REPOSITORY / "deploy" / "install_node.sh")], env=environment, check=True)
    install = log.read_text().splitlines()[-1]
    assert install.startswith(f"{tmp_path}/venv/bin/python -m pip install")
    assert f"-c {REPOSITORY}/constraints.txt -e {REPOSITORY}" in install
    assert ("https://download.pytorch.org/whl/cpu" in install) is not has_gpu


def test_an_old_python_is_refused(tmp_path: Path) -> None:
    _program(tmp_path / "python3", "exit 1")
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(REPOSITORY / "deploy" / "install_node.sh")], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, "older than 3.11" in done.stderr) == (1, True)


def test_both_files_mount_and_set_up_the_same() -> None:
    aws, on_prem = read(AWS), read(ON_PREM)
    for key in ("file_mounts", "rsync_exclude", "setup_commands"):
        assert aws[key] == on_prem[key]


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
