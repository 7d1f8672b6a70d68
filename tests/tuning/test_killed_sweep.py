"""`deepseek-ray tune` killed with SIGKILL in mid-sweep and started again: no trial lost, none doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from training_runs import SMALL_RUN

from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.tuning.result import SearchResult

ROOT = Path(__file__).resolve().parents[2]
STEPS, TRIALS = 400, 3


def write_run(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"line {number} of the text says {number * number}" for number in range(2000)))
    data = {
        **SMALL_RUN["data"], "source": "text", "paths": [str(corpus)], "document_bytes": 4000,
        "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SMALL_RUN, "data": data, "storage_path": str(tmp_path)}))
    (tmp_path / "rates.py").write_text(
        "from ray import tune\n\ndef rates():\n    return {'optimizer.lr': tune.loguniform(1e-3, 1e-2)}\n"
    )
    return path


def start(tmp_path: Path, run: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [
            sys.executable, "-m", "deepseek_ray.cli.main", "tune", str(run), "--space", f"{tmp_path}/rates.py:rates",
            "--trials", str(TRIALS), "--tokens", str(STEPS * 8 * 24), "--scheduler", "none", "--searcher", "random",
            "--max-concurrent", "1", "--json",
        ],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def kill_driver(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the driver alone; then wait until the cluster that it started has gone with it, or end it."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    _, alive = psutil.wait_procs(descendants, timeout=30)
    for descendant in alive:
        descendant.kill()
    psutil.wait_procs(alive, timeout=30)


def wait_for_step(directory: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        lines = read_metrics(directory)
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in {directory} within 400 s")


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twice_every_trial_is_trained_once_and_to_its_end(tmp_path: Path) -> None:
    run, sweep = write_run(tmp_path), tmp_path / "small-sweep"
    rates = {}
    for trial in (0, 1):  # killed in the first trial, then in the second
        process = start(tmp_path, run)
        try:
            wait_for_step(sweep / "trials" / f"trial-{trial:04d}", 120, process)
        finally:
            kill_driver(process)
        result = SearchResult.read(sweep)
        assert [record.status for record in result.trials] == ["finished"] * trial + ["running"]
        rates[trial] = result.trials[trial].params["optimizer.lr"]
    process = start(tmp_path, run)
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            kill_driver(process)
    assert process.returncode == 0, errors
    values = json.loads(output)
    assert [trial["trial"] for trial in values["trials"]] == [f"trial-{index:04d}" for index in range(TRIALS)]
    assert {trial["status"] for trial in values["trials"]} == {"finished"}
    assert {index: values["trials"][index]["params"]["optimizer.lr"] for index in rates} == rates
    assert "going on: 2 left, 1 of them begun" in errors
    for index in range(TRIALS):
        directory = sweep / "trials" / f"trial-{index:04d}"
        assert [line["step"] for line in read_metrics(directory)] == list(range(1, STEPS + 1))
        resumed = (directory / "train.log").read_text().count("going on after step")
        assert resumed == (1 if index in rates else 0)
    assert sorted(path.name for path in (sweep / "trials").iterdir()) == [
        f"trial-{index:04d}" for index in range(TRIALS)
    ]
