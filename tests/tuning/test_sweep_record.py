"""A sweep's record: killed between any two writes, no trial is lost and none is started twice."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray import tune
from training_runs import small_config

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import ConfigError, SweepError
from deepseek_ray.tuning import study
from deepseek_ray.tuning.settings import Limits, SweepSettings, budgeted
from deepseek_ray.tuning.space import Space, as_space
from deepseek_ray.tuning.study import JOURNAL_FILE, read_trials
from deepseek_ray.tuning.sweep import Proposal, Sweep

BASE = budgeted(small_config(), 24 * 8 * 12)
LR = as_space({"optimizer.lr": tune.loguniform(1e-4, 1e-1)})
WIDTHS = as_space({"model.moe_intermediate_size": [8, 16, 32, 64], "model.n_routed_experts": [2, 4, 8]})


def settings(**changes: Any) -> SweepSettings:
    values: dict[str, Any] = {
        "name": "sweep", "num_trials": 4, "budget_tokens": BASE.training.tokens, "objectives": ("validation_loss",),
        "modes": ("min",), "scheduler": "asha", "searcher": "optuna", "seed": 0, "base": BASE,
    }  # fmt: skip
    return SweepSettings.parse({**values, **changes})


def no_latency(model: ModelConfig) -> float:
    raise AssertionError("not asked for")


def open_sweep(
    directory: Path, space: Space = LR, latency: Callable[[ModelConfig], float] = no_latency, **changes: Any
) -> Sweep:
    return Sweep(settings(**changes), directory, space, latency)


def loss_of(proposal: Proposal) -> float:
    return abs(proposal.config.optimizer.lr - 0.01)


def finish_all(sweep: Sweep) -> dict[int, float]:
    """Run what is left with two trials at a time; learning rate by index."""
    rates, running = {}, []
    while True:
        while len(running) < 2 and (proposal := sweep.next()):
            assert proposal.index not in rates
            rates[proposal.index] = proposal.config.optimizer.lr
            running.append(proposal)
        if not running:
            return rates
        proposal = running.pop(0)
        sweep.report(proposal.number, 100, loss_of(proposal) + 1)
        status = "stopped" if proposal.index == 1 else "finished"
        sweep.finish(proposal.number, status, {"validation_loss": loss_of(proposal)}, 200)  # type: ignore[arg-type]


@pytest.mark.parametrize("torn", [False, True], ids=["between-lines", "within-a-line"])
def test_killed_after_any_write_every_trial_runs_once(tmp_path: Path, torn: bool) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    finish_all(open_sweep(whole))
    lines = (whole / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
    for killed_at in range(len(lines)):
        directory = tmp_path / f"killed{killed_at}"
        directory.mkdir()
        tail = lines[killed_at][: len(lines[killed_at]) // 2] if torn else b""
        (directory / JOURNAL_FILE).write_bytes(b"".join(lines[:killed_at]) + tail)
        accepted = {trial.user_attrs["index"]: trial for trial in read_trials(directory)}
        ended = {index for index, trial in accepted.items() if "status" in trial.user_attrs}
        rates = finish_all(open_sweep(directory))
        assert set(rates) == set(range(4)) - ended, f"killed at line {killed_at}"
        for index in set(accepted) - ended:
            assert rates[index] == accepted[index].user_attrs["sample"]["optimizer.lr"]
        records = read_trials(directory)
        assert [trial.user_attrs["index"] for trial in records] == [0, 1, 2, 3]
        assert all(trial.state.is_finished() for trial in records)
        shutil.rmtree(directory)


def test_every_fact_is_on_disk_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; a machine without power only what was not forced to disk."""
    forced: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        forced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(study.os, "fsync", watched)
    written: list[int] = []
    append = study._Journal.append_logs

    def measured(journal: study._Journal, logs: list[dict[str, Any]]) -> None:
        append(journal, logs)
        written.append((tmp_path / JOURNAL_FILE).stat().st_size)

    monkeypatch.setattr(study._Journal, "append_logs", measured)
    finish_all(open_sweep(tmp_path))
    assert forced == written != []


def test_a_larger_num_trials_goes_on_where_the_sweep_ended(tmp_path: Path) -> None:
    assert set(finish_all(open_sweep(tmp_path))) == {0, 1, 2, 3}
    assert set(finish_all(open_sweep(tmp_path, num_trials=6))) == {4, 5}


def test_a_resumed_study_does_not_draw_again_what_it_drew_first(tmp_path: Path) -> None:
    first = open_sweep(tmp_path, searcher="random").next()
    second = open_sweep(tmp_path, searcher="random")
    assert second.unfinished[0].params == first.params  # type: ignore[union-attr]
    second.next()
    assert second.next().params != first.params  # type: ignore[union-attr]


def test_the_sampler_learns_from_stopped_trials(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path)
    finish_all(sweep)
    states = [trial.state for trial in sweep.study.trials]
    assert states.count(optuna.trial.TrialState.PRUNED) == 1
    assert states.count(optuna.trial.TrialState.COMPLETE) == 3


def test_genes_over_a_budget_never_start_and_are_replaced(tmp_path: Path) -> None:
    limit = 55_000
    sweep = open_sweep(tmp_path, WIDTHS, num_trials=8, searcher="random", limits=Limits(parameters=limit))
    found = [sweep.next() for _ in range(8)]
    assert [proposal.index for proposal in found] == list(range(8))  # type: ignore[union-attr]
    assert all(proposal.config.model.num_parameters <= limit for proposal in found)  # type: ignore[union-attr]
    refused = [trial.user_attrs["refused"] for trial in sweep.study.trials if "refused" in trial.user_attrs]
    assert refused
    assert all(f"above the limit of {limit:,}" in reason for reason in refused)
    assert sweep.next() is None


def test_invalid_genes_never_start(tmp_path: Path) -> None:
    space = as_space({"model.n_routed_experts": [2, 4], "model.num_experts_per_tok": [2, 3]})
    sweep = open_sweep(tmp_path, space, num_trials=10, searcher="random")
    for _ in range(10):
        model = sweep.next().config.model  # type: ignore[union-attr]
        assert model.num_experts_per_tok <= model.n_routed_experts
    assert any("refused" in trial.user_attrs for trial in sweep.study.trials)


def test_slow_genes_never_start_and_the_latency_is_kept(tmp_path: Path) -> None:
    sweep = open_sweep(
        tmp_path,
        WIDTHS,
        latency=lambda model: model.moe_intermediate_size / 10,
        scheduler="none",
        searcher="nsga2",
        objectives=("validation_loss", "latency_ms"),
        modes=("min", "min"),
        limits=Limits(latency_ms=2.0),
    )
    for _ in range(4):
        proposal = sweep.next()
        assert proposal.config.model.moe_intermediate_size <= 16  # type: ignore[union-attr]
        sweep.finish(proposal.number, "finished", {"validation_loss": random.random()}, 10)  # type: ignore[union-attr]
    values = [trial.values for trial in read_trials(tmp_path)]
    assert {latency for _, latency in values} <= {0.8, 1.6}


def test_limits_that_leave_nothing_say_so(tmp_path: Path) -> None:
    sweep = open_sweep(tmp_path, WIDTHS, limits=Limits(parameters=10))
    with pytest.raises(SweepError, match=r"500 samples in a row were refused.*\(500 times\): parameters.*limit of 10"):
        sweep.next()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ("accuracy",)}, "objective 'accuracy' is not known; known are validation_loss"),
        ({"objectives": ("latency_ms",)}, "the first objective is 'latency_ms'"),
        ({"objectives": ("validation_loss", "latency_ms"), "modes": ("min", "min")}, "scheduler is 'asha' for 2 obj"),
        ({"searcher": "nsga2"}, "searcher is 'nsga2' for one objective"),
        ({"scheduler": "pbt", "num_trials": 1}, "a population needs at least 2"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_resuming_with_other_settings_names_the_difference() -> None:
    settings(num_trials=9).require_same(settings())
    with pytest.raises(ConfigError, match=r"num_trials was 4 and is 3"):
        settings(num_trials=3).require_same(settings())
    other = budgeted(small_config(optimizer={"lr": 0.5}), 24 * 8 * 12)
    with pytest.raises(ConfigError, match=r"base.optimizer.lr was 0.01 and is 0.5"):
        settings(base=other).require_same(settings())


def test_trials_validate_at_equal_distances_in_tokens(tmp_path: Path) -> None:
    trial = settings().trial_config(BASE, 3, tmp_path, threads=2)
    assert trial.run_dir == tmp_path / "trials" / "trial-0003"
    assert (trial.total_steps, trial.training.validation_interval) == (12, 2)
    assert (trial.training.checkpoint_interval, trial.training.threads_per_worker) == (2, 2)


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"budget_tokens is 10, below the 192 tokens of one optimiser step"):
        budgeted(small_config(), 10)
