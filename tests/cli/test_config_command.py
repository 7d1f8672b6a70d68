"""`deepseek-ray config`: what it prints, its exit codes, and that it starts nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner, Result

from deepseek_ray.cli.main import app
from deepseek_ray.errors import ConfigError

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["config", *map(str, arguments)])


def test_validate_says_ok_for_each_good_file() -> None:
    done = run("validate", TINY, TINY)
    assert (done.exit_code, done.stdout) == (0, f"{TINY}: OK\n{TINY}: OK\n")


def test_validate_prints_every_problem_and_goes_on_with_the_next_file(tmp_path: Path) -> None:
    bad, broken = tmp_path / "bad.yaml", tmp_path / "broken.yaml"
    bad.write_text(TINY.read_text().replace("steps: 40", "stpes: 40").replace("name: tiny", "name: ../tiny"))
    broken.write_text("a: [1\n")
    done = run("validate", bad, broken, TINY, tmp_path / "absent.yaml")
    first, second, third, fourth, fifth = done.stdout.splitlines()
    assert done.exit_code == 1
    assert first.startswith(f"{bad}:2: name is '../tiny'")
    assert second.startswith(f"{bad}:27: unknown key 'training.stpes'; did you mean 'steps'?")
    assert third.startswith(f"{broken}: {broken} is not valid YAML") and "line 2" in third
    assert fourth == f"{TINY}: OK"
    assert "absent.yaml does not exist" in fifth


def test_validate_as_json(tmp_path: Path) -> None:
    done = run("validate", TINY, "--set", "optimizer.lr=0", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["ok"]) == (1, False)
    assert found["problems"][0]["place"] == "--set optimizer.lr=0"
    assert json.loads(run("validate", TINY, "--json").stdout) == {"file": str(TINY), "ok": True, "problems": []}


def test_show_prints_yaml_and_the_origins() -> None:
    shown = run("show", TINY, "--set", "training.steps=20")
    assert yaml.safe_load(shown.stdout)["training"]["steps"] == 20
    lines = run("show", TINY, "--origin", "--set", "training.steps=20").stdout.splitlines()
    (steps,) = [line for line in lines if line.strip().startswith("steps:")]
    (vocabulary,) = [line for line in lines[:10] if line.strip().startswith("vocab_size:")]
    assert steps.endswith("# --set training.steps=20")
    assert vocabulary.endswith("# derived")


def test_show_as_json() -> None:
    assert json.loads(run("show", TINY, "--json").stdout)["optimizer"]["lr"] == 3e-3
    found = json.loads(run("show", TINY, "--json", "--origin").stdout)
    assert found["optimizer.eps"] == {"value": 1e-8, "origin": "default"}


def test_show_of_a_bad_file_is_one_error() -> None:
    done = run("show", TINY, "--set", "training.steps=0")
    assert isinstance(done.exception, ConfigError)  # `main` prints it in one line and exits with 1
    assert "training.steps is 0" in str(done.exception)


@pytest.mark.parametrize("kind", ["pretrain", "deployment", "serving", "embeddings"])
def test_schema_is_json_schema(kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(run("schema", "--kind", kind).stdout))


def test_it_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from deepseek_ray.cli.main import main\n"
        "sys.argv = ['deepseek-ray', 'config', 'show', sys.argv[1]]\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'ray', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TINY)], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
