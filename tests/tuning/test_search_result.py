"""What a sweep found, read from its directory: best, front, table, pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from ray import tune
from training_runs import small_config

import deepseek_ray
from deepseek_ray.errors import SweepError
from deepseek_ray.tuning.result import SearchResult
from deepseek_ray.tuning.settings import SweepSettings, budgeted
from deepseek_ray.tuning.space import as_space
from deepseek_ray.tuning.sweep import Sweep, run_dir

BASE = budgeted(small_config(), 24 * 8 * 12)
SPACE = as_space({"optimizer.lr": tune.loguniform(1e-4, 1e-1), "training.global_batch_size": [8, 16]})
OBJECTIVES: dict[str, Any] = {
    "objectives": ("validation_loss", "latency_ms"), "modes": ("min", "min"), "scheduler": "none", "searcher": "nsga2",
}  # fmt: skip


def write_curve(directory: Path, losses: list[float], every: int = 2) -> None:
    """A metrics file as training writes it, with a validation every few steps."""
    directory.mkdir(parents=True)
    lines = [
        {
            "step": every * place,
            "validation_loss": loss,
            "validation_bits_per_byte": loss / 2,
            "loss": loss,
            "time": place,
        }
        for place, loss in enumerate(losses, start=1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_sweep(directory: Path, outcomes: list[tuple[str, list[float]]], **changes: Any) -> SearchResult:
    """A sweep with these (status, losses)."""
    values: dict[str, Any] = {
        "name": "sweep", "num_trials": len(outcomes), "budget_tokens": BASE.training.tokens, "scheduler": "asha",
        "objectives": ("validation_loss",), "modes": ("min",), "searcher": "random", "seed": 0, "base": BASE,
    }  # fmt: skip
    settings = SweepSettings.parse({**values, **changes})
    settings.write(directory)
    latencies = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    sweep = Sweep(settings, directory, SPACE, lambda model: next(latencies))
    for status, losses in outcomes:
        proposal = sweep.next()
        assert proposal is not None
        write_curve(run_dir(directory, proposal.index), losses)
        measured = {"validation_loss": losses[-1]} if losses else {}
        if status != "running":
            failure = f"step 1: the loss is {losses}" if status == "failed" else None
            sweep.finish(proposal.number, status, measured, 100 * len(losses), failure)  # type: ignore[arg-type]
    return SearchResult.read(directory)


def test_the_best_is_the_best_of_those_that_used_up_their_budget(tmp_path: Path) -> None:
    result = make_sweep(
        tmp_path, [("finished", [5.0, 4.0]), ("stopped", [3.5]), ("finished", [5.0, 3.8]), ("failed", [])]
    )
    assert result.best_trial.index == 2
    assert result.best_metrics["validation_loss"] == 3.8
    assert result.best_config.optimizer.lr == result.trials[2].sample["optimizer.lr"]
    assert result.best_config.name == "sweep-best"


def test_more_is_better_when_the_mode_says_so(tmp_path: Path) -> None:
    result = make_sweep(tmp_path, [("finished", [5.0]), ("finished", [4.0])], modes=("max",))
    assert result.best_trial.index == 0


def test_a_running_sweep_can_be_read(tmp_path: Path) -> None:
    result = make_sweep(tmp_path, [("finished", [4.0]), ("running", [6.0, 5.0])])
    running = result.trials[1]
    assert (running.status, running.metrics["validation_loss"]) == ("running", 5.0)
    assert running.tokens == 4 * 24 * running.sample["training.global_batch_size"]
    assert result.best_trial.index == 0


def test_the_table_has_one_row_per_trial(tmp_path: Path) -> None:
    table = make_sweep(tmp_path, [("finished", [4.0]), ("failed", []), ("stopped", [5.0])]).dataframe()
    assert list(table["trial"]) == ["trial-0000", "trial-0001", "trial-0002"]
    assert list(table["status"]) == ["finished", "failed", "stopped"]
    assert {"params.optimizer.lr", "params.training.global_batch_size", "seconds", "checkpoint"} <= set(table.columns)
    assert math.isnan(table["validation_loss"][1]) and "the loss is" in table["failure"][1]
    assert list(table["tokens"]) == [100, 0, 100]


def test_the_front_holds_what_nobody_beats(tmp_path: Path) -> None:
    # (loss, latency): (4, 3) is beaten by (3.5, 2); (5, 1) is the fastest.
    result = make_sweep(
        tmp_path, [("finished", [4.0]), ("finished", [5.0]), ("finished", [3.5]), ("finished", [3.6])], **OBJECTIVES
    )
    assert [record.index for record in result.pareto_front] == [2, 1]
    assert result.best_trial.index == 2


def test_pictures_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    outcomes = [("finished", [5.0 - 0.1 * place, 4.0 - 0.1 * place]) for place in range(5)] + [("stopped", [6.0])]
    result = make_sweep(tmp_path, outcomes, **OBJECTIVES)
    written = result.plot(tmp_path / "plots")
    assert [path.name for path in written] == [
        "learning_curves.png", "pareto_front.png", "importance.png", "parallel_coordinates.png",
    ]  # fmt: skip
    for path in written:
        pixels = imread(path)
        assert pixels.shape[0] > 100 and pixels.std() > 0.02  # not an empty sheet


def test_pictures_of_a_sweep_that_has_just_begun(tmp_path: Path) -> None:
    assert make_sweep(tmp_path, [("running", [])]).plot(tmp_path / "plots") == []


def test_a_sweep_whose_every_trial_failed_quotes_the_most_frequent_failure(tmp_path: Path) -> None:
    result = make_sweep(tmp_path, [("failed", []), ("failed", [1.0]), ("failed", [])])
    with pytest.raises(
        SweepError, match=r"all 3 ended trials of sweep 'sweep' failed; .*\(2 times\): step 1: the loss is \[\]"
    ):
        result.best_trial  # noqa: B018


def test_a_directory_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"holds no sweep \(no sweep.json\)"):
        SearchResult.read(tmp_path)
    assert deepseek_ray.SearchResult is SearchResult
