"""`deepseek-ray tune` by what a person types; whole sweeps are in tests/tuning/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_ray.cli.main import main
from deepseek_ray.cli.tune import load_space
from deepseek_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_a_space_is_found_by_module_and_by_file(tmp_path: Path) -> None:
    (tmp_path / "my_space.py").write_text("def narrow():\n    return {'optimizer.lr': [1e-3]}\n")
    assert load_space(f"{tmp_path / 'my_space.py'}:narrow") == {"optimizer.lr": [1e-3]}
    assert callable(load_space("tune_spaces.pretraining:space"))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("tune_spaces.pretraining", "give module:function"),
        ("nowhere.py:space", "names nowhere.py, which does not exist"),
        ("no_such_module:space", "the module 'no_such_module', which cannot be imported"),
        ("tune_spaces.pretraining:spcae", "names 'spcae', which tune_spaces.pretraining does not have; it has space"),
    ],
)
def test_a_space_that_is_not_there(reference: str, message: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_space(reference)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-parameters", "5"], "--max-parameters is for --architecture"),
        (["--scheduler", "pbt"], "cannot change in mid-run"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", str(ROOT / "configs" / "tiny.yaml"), "--storage", str(tmp_path), *arguments])
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_mistake_is_one_line_of_the_job_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/tune.py", "configs/tiny.yaml", "--storage", str(tmp_path), "--tokens", "3"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "budget_tokens is 3, below the 1,024 tokens of one optimiser step" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
