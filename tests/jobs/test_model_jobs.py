"""`jobs/finetune.py`, `jobs/evaluate.py` and `jobs/batch_inference.py` as a person runs them, one after the other."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conversation_files import sums, write_jsonl

from deepseek_ray.training.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With a Ray of its own on this machine, where the job needs one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        timeout=400, env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def tuning(model: Path, folder: Path, *overrides: str) -> list[str]:
    train = write_jsonl(folder / "train.jsonl", sums(0, 100))
    held_out = write_jsonl(folder / "held_out.jsonl", sums(500, 12))
    values = [f"base_model={model}", f"data.paths=[{train}]", f"data.validation_paths=[{held_out}]",
              "data.sequence_length=64", f"data.cache_dir={folder / 'cache'}", f"storage_path={folder / 'runs'}",
              "training.steps=8", "schedule.warmup_steps=1", "training.validation_interval=4",
              "training.checkpoint_interval=0", *overrides]  # fmt: skip
    return ["--config", "configs/finetune/lora.yaml", *(part for value in values for part in ("--set", value))]


@pytest.mark.slow
@pytest.mark.cluster
def test_tune_measure_and_generate(trained_model: Path, tmp_path: Path) -> None:
    tuned = job("finetune", *tuning(trained_model, tmp_path))
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    assert "100 conversations to learn from, 12 held out" in tuned.stdout
    assert "adapters reach" in tuned.stdout
    run_dir = tmp_path / "runs" / "finetune-lora"
    losses = [line["validation_loss"] for line in read_metrics(run_dir) if "validation_loss" in line]
    assert losses[1] < losses[0]
    model = run_dir / "checkpoints" / "step-00000008"
    assert (model / "adapter" / "adapter_config.json").is_file()

    arguments = ["--chat", "--data", str(tmp_path / "held_out.jsonl"), "--sequence-length", "64", "--json"]
    measured = job("evaluate", str(model), *arguments)
    assert measured.returncode == 0, measured.stderr
    values = json.loads(measured.stdout)
    assert values["nats_per_token"] == pytest.approx(losses[1], abs=2e-3)
    assert [load["layer"] for load in values["expert_load"]] == [1, 2]

    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say line {n}"} for n in range(5)] + [{"x": 1}])
    generating = ["--model-dir", str(model), "--input", str(prompts), "--output", str(tmp_path / "answers"),
                  "--chat", "--max-tokens", "4", "--rows-per-file", "4", "--threads", "1"]  # fmt: skip
    generated = job("batch_inference", *generating)
    assert generated.returncode == 0, generated.stdout + generated.stderr
    assert "part 2/2: 2 rows" in generated.stdout
    answers = [json.loads(line) for n in (0, 1) for line in (tmp_path / f"answers/part-{n:06d}.jsonl").open()]
    assert [row["row"] for row in answers] == list(range(6))
    assert all(1 <= len(row["token_ids"]) <= 4 for row in answers[:5])
    assert answers[5]["error"] == "no field 'prompt' (x)"
    again = job("batch_inference", *generating)  # nothing is missing, so no cluster is needed
    assert (again.returncode, again.stdout.strip()) == (
        0, f"2 files in {tmp_path / 'answers'}, 2 of them were there before")  # fmt: skip


def test_a_mistake_is_told_in_one_line() -> None:
    done = job("finetune", "--config", "configs/finetune/full.yaml", "--set", "base_model=/no/such")
    assert done.returncode == 1
    assert_one_line(done.stderr, "is no directory")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", ["{model}", "--data", "/no/such.txt"], "no such file or folder"),
        ("batch_inference", ["--model-dir", "{model}", "--input", "/no.txt", "--output", "{tmp}"], "no such file"),
    ],
)
def test_other_jobs_tell_theirs(
    trained_model: Path, tmp_path: Path, name: str, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In this process, which has loaded what a process of their own would load first."""
    places = {"{model}": str(trained_model), "{tmp}": str(tmp_path / "out")}
    file = REPOSITORY / "jobs" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), *(places.get(argument, argument) for argument in arguments)])
    monkeypatch.syspath_prepend(file.parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(file), run_name="__main__")
    assert ended.value.code == 1
    assert_one_line(capsys.readouterr().err, message)


def assert_one_line(errors: str, message: str) -> None:
    assert errors.startswith("error: "), errors
    assert message in errors
    assert len(errors.splitlines()) == 1
