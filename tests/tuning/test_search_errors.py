"""What a person can get wrong is told before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from training_runs import small_config

import deepseek_ray
from deepseek_ray.errors import ConfigError, SweepError
from deepseek_ray.tuning.search import _lock
from tune_spaces import pretraining

SPACE = {"optimizer.lr": tune.loguniform(1e-4, 1e-2)}


def search(tmp_path: Path, **options: Any) -> None:
    values = {"config": small_config(), "space": SPACE, "storage": str(tmp_path), **options}
    deepseek_ray.search_hyperparameters(**values)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"space": {"optimizer.lrr": 1}}, ConfigError, "did you mean 'optimizer.lr'"),
        ({"config": "nowhere.yaml"}, ConfigError, "nowhere.yaml does not exist"),
        ({"num_trials": 0}, ConfigError, "num_trials is 0"),
        ({"scheduler": "hyperband"}, ConfigError, "scheduler is 'hyperband': Input should be 'asha', 'pbt' or 'none'"),
        ({"metric": "accuracy"}, ConfigError, "objective 'accuracy' is not known"),
        ({"max_concurrent": 0}, ConfigError, "max_concurrent is 0"),
        ({"budget_tokens": 3}, ConfigError, "budget_tokens is 3"),
        ({"resume": "must"}, ConfigError, "holds no sweep and resume is 'must'"),
        ({"resume": "perhaps"}, ConfigError, "resume is 'perhaps'"),
        ({"name": "a/b"}, ConfigError, "name is 'a/b'"),
        ({"scheduler": "pbt", "space": pretraining.space()}, ConfigError, "cannot change in mid-run"),
    ],
)
def test_mistakes_are_told_before_ray_starts(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as told:
        search(tmp_path, **options)
    assert message in str(told.value)
    assert not ray.is_initialized()


def test_a_second_driver_of_the_same_sweep_is_refused(tmp_path: Path) -> None:
    with _lock(tmp_path / "small-sweep"), pytest.raises(SweepError, match="being run by another process"):
        search(tmp_path)


def test_a_relative_storage_is_refused_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="relative to the working directory of a Ray job"):
        search(tmp_path, storage="sweeps")


def test_the_architecture_search_needs_a_run_to_start_from() -> None:
    with pytest.raises(TypeError, match="config"):
        deepseek_ray.search_architecture(SPACE)
