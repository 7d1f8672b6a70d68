"""Sweeps on a real cluster of two cores: trials are Ray Train runs, nothing is left of them, the best one serves."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from training_runs import small_config

from deepseek_ray import LLM, SamplingParams, search_architecture, search_hyperparameters
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import SweepError
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.tuning.result import SearchResult

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

BUDGET = 16 * 8 * 24
"""16 steps."""


def run_of(tmp_path: Path, **training: Any) -> PretrainConfig:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"line {number} of the text says {number * number}" for number in range(2000)))
    data = {
        "source": "text", "paths": [str(corpus)], "document_bytes": 4000, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    return small_config(data=data, storage_path=str(tmp_path), model={"num_nextn_predict_layers": 0}, training=training)


def first_then(*values: float) -> Any:
    """A space that gives the trials these learning rates, in any order."""
    return lambda trial, config: {"optimizer.lr": trial.suggest_categorical("lr", list(values))}


def wait_until_free() -> None:
    """All cores are back and no placement group is left; what Ray returns, it returns a moment later."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        if not groups and ray.available_resources().get("CPU") == 2:
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {groups}, free: {ray.available_resources()}")


@pytest.mark.slow
def test_a_sweep_from_python_to_a_model_that_answers(tmp_path: Path) -> None:
    output = io.StringIO()
    result = search_hyperparameters(
        run_of(tmp_path), first_then(1e-2, 1e30), num_trials=3, budget_tokens=BUDGET, searcher="random", seed=1,
        stream=output,
    )  # fmt: skip
    by_rate = {(record.sample["optimizer.lr"], record.status) for record in result.trials}
    assert {status for rate, status in by_rate if rate == 1e30} == {"failed"}
    assert "finished" in {status for rate, status in by_rate if rate == 1e-2}
    assert result.best_config.optimizer.lr == 1e-2
    assert len(result.best_trial.curve("validation_loss", 8 * 24)) == 8
    with LLM(result.best_checkpoint, dtype="float32") as llm:
        answer = llm.generate("line 5 of", SamplingParams(max_tokens=4, temperature=0.0))
    assert len(answer[0].outputs[0].token_ids) == 4
    lines = output.getvalue().splitlines()
    assert "3 trials of 3,072 tokens; 2 at once with 1 cores per worker" in lines[0]
    assert len([line for line in lines if line.startswith("[")]) == 3
    assert any("lower optimizer.lr" in line for line in lines)
    wait_until_free()
    again = search_hyperparameters(  # ended: read, not run
        run_of(tmp_path), first_then(1e-2, 1e30), num_trials=3, budget_tokens=BUDGET, searcher="random", seed=1,
        stream=output,
    )  # fmt: skip
    assert again.trials == result.trials == SearchResult.read(tmp_path / "small-sweep").trials


@pytest.mark.slow
def test_a_worse_trial_goes_on_from_the_weights_of_a_better_one(tmp_path: Path) -> None:
    result = search_hyperparameters(
        run_of(tmp_path), first_then(1e-2, 1e-12), num_trials=2, budget_tokens=BUDGET, scheduler="pbt", seed=1,
        stream=io.StringIO(),
    )  # fmt: skip
    assert {record.status for record in result.trials} == {"finished"}
    changed = [record for record in result.trials if record.changes]
    assert changed, [record.params for record in result.trials]
    for record in changed:
        assert record.changes[0]["donor"] == 1 - record.index
        log = (record.directory / "train.log").read_text()
        assert "going on after step" in log
    curves = [dict(record.curve("validation_loss", 8 * 24)) for record in result.trials]
    ends = [curve[max(curve)] for curve in curves]
    start = max(read_metrics(record.directory)[0]["loss"] for record in result.trials)
    assert all(end < start - 0.3 for end in ends), (start, ends)  # with 1e-12 alone nothing is learnt
    wait_until_free()


@pytest.mark.slow
def test_a_sweep_whose_every_trial_fails_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        SweepError,
        match=r"all 2 ended trials of sweep 'small-sweep' failed; .*\(2 times\): step \d+: the loss is nan",
    ):
        search_hyperparameters(
            run_of(tmp_path), {"optimizer.lr": 1e30}, num_trials=2, budget_tokens=BUDGET, stream=io.StringIO()
        )
    wait_until_free()


def test_cores_that_others_hold_are_said_to_be_missing(tmp_path: Path) -> None:
    @ray.remote(num_cpus=2)
    class Holder:
        def ready(self) -> bool:
            return True

    holder = Holder.remote()
    assert ray.get(holder.ready.remote())
    try:
        with pytest.raises(SweepError, match="of which 0 cores and 0 GPUs are free: wait until other jobs have ended"):
            search_hyperparameters(run_of(tmp_path), first_then(1e-2), num_trials=2, stream=io.StringIO())
    finally:
        ray.kill(holder)
    wait_until_free()


@pytest.mark.slow
def test_architectures_are_measured_and_the_front_is_told(tmp_path: Path) -> None:
    space = {"model.num_hidden_layers": [1, 6], "model.first_k_dense_replace": 1}
    result = search_architecture(
        space, config=run_of(tmp_path), num_trials=2, budget_tokens=BUDGET, seed=1, stream=io.StringIO()
    )
    latency = {record.sample["model.num_hidden_layers"]: record.metrics["latency_ms"] for record in result.trials}
    assert set(latency) == {1, 6}
    assert latency[1] < latency[6]
    assert result.pareto_front[0] == result.best_trial
