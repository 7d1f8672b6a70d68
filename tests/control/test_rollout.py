"""Which engine a configuration means."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.control.rollout import engine_change, engine_config

OLD = DeploymentConfig(name="chat", model_dir="/models/a", served_model_name="a")


@pytest.mark.parametrize(
    "change",
    [{}, {"served_model_name": "b"}, {"served_model_name": None}, {"request_timeout_seconds": 5.0}],
    ids=str,
)
def test_what_only_the_api_sees_keeps_the_engine(change: dict[str, Any]) -> None:
    new = OLD.model_copy(update=change)
    assert engine_change(OLD, new) == "keep"
    assert engine_config(OLD) == engine_config(new)


@pytest.mark.parametrize(
    "change",
    [
        {"model_dir": "/models/b"},
        {"dtype": "float32"},
        {"expert_shards": 4},
        {"attention_workers": 2},
        {"threads": 1},
        {"transport": "tcp"},
        {"name": "other"},
        {"engine": EngineConfig(max_num_seqs=8)},
    ],
    ids=str,
)
def test_what_the_engine_computes_with_replaces_it(change: dict[str, Any]) -> None:
    new = OLD.model_copy(update=change)
    assert engine_change(OLD, new) == "replace"
    assert engine_config(OLD).name != engine_config(new).name


def test_an_engine_is_recognised_from_what_it_runs_with() -> None:
    assert engine_change(engine_config(OLD), engine_config(OLD)) == "keep"
    assert engine_change(engine_config(OLD), engine_config(OLD.model_copy(update={"threads": 1}))) == "replace"


@pytest.mark.parametrize("name", ["c", "n" * 63])
def test_names_say_the_model_and_stay_valid(name: str) -> None:
    engine = engine_config(OLD.model_copy(update={"name": name}))
    stem, _, digest = engine.name.rpartition(".")
    assert name.startswith(stem)
    assert len(digest) == 8
    assert DeploymentConfig.parse(engine.model_dump()) == engine
