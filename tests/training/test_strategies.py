"""Data-parallel strategies over gloo against one worker: the same curve, the same biases, the same checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_runs import Run, launch, strategy_config
from transformers import AutoModelForCausalLM

from deepseek_ray.models.load import load_model
from deepseek_ray.training.metrics import read_metrics

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
    "zero3_offload": {"strategy": "deepspeed", "zero_stage": 3, "offload": True},
}
CHAIN = ("ddp", "zero3", "fsdp", "zero2", "zero1")
"""A run that changes its strategy after every fourth step."""
LAST = "checkpoints/step-00000020"


def config(name: str, workers: int = 2, **training: Any) -> dict[str, Any]:
    choice = dict(STRATEGIES[name])
    return strategy_config(choice.pop("strategy"), workers, distributed=choice, training=training)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """Every run of this file, in three process starts: the directory, and each run's answers by rank."""
    directory = tmp_path_factory.mktemp("strategies")
    alone = [Run("one", config("ddp", 1)), Run("grown", config("ddp", 1), stop_after=10)]
    together = [Run(name, config(name)) for name in STRATEGIES]
    together += [Run(f"{name}_recomputing", config(name, recompute_activations=True)) for name in ("fsdp", "zero3")]
    together += [
        Run("chain", config(name, checkpoint_interval=4), stop_after=None if step == 20 else step)
        for name, step in zip(CHAIN, range(4, 21, 4), strict=True)
    ]
    together += [Run("shrunk", config("fsdp"), stop_after=10), Run("grown", config("zero3"))]
    afterwards = [Run("shrunk", config("ddp", 1))]
    answers: dict[str, list[dict[str, Any]]] = {}
    for size, part in ((1, alone), (2, together), (1, afterwards)):
        for run, *by_rank in zip(part, *launch(directory, size, part, timeout=500), strict=True):
            answers[run.directory] = by_rank
    return directory, answers


def assert_same_curve(directory: Path, name: str) -> None:
    """Equal to 1e-5: sums over workers are float32 in another order, and 20 steps at lr 1e-2 carry that on."""
    lines, expected = read_metrics(directory / name), read_metrics(directory / "one")
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, 21))
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["mtp_loss"] == pytest.approx(other["mtp_loss"], rel=1e-5)
        assert line["balance_loss"] == pytest.approx(other["balance_loss"], rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        assert line["max_violation"] == other["max_violation"]
        assert line.get("validation_loss", 0) == pytest.approx(other.get("validation_loss", 0), rel=1e-5)
        assert line.get("expert_counts") == other.get("expert_counts")


@pytest.mark.parametrize("name", [*STRATEGIES, "fsdp_recomputing", "zero3_recomputing", "chain", "shrunk", "grown"])
def test_the_curve_is_that_of_one_worker(runs: Any, name: str) -> None:
    """Alone, with recomputed activations, with another strategy every four steps, with fewer and with more workers."""
    directory, answers = runs
    assert [answer["error"] for answer in answers[name]] == [None] * len(answers[name])
    assert_same_curve(directory, name)


@pytest.mark.parametrize("name", [*STRATEGIES, "fsdp_recomputing", "zero3_recomputing", "chain"])
def test_correction_biases_are_equal_on_all_ranks_and_to_one_workers(runs: Any, name: str) -> None:
    _, answers = runs
    first, second = answers[name]
    assert first["biases"] == second["biases"] == answers["one"][0]["biases"]
    assert any(value for layer in first["biases"] for value in layer)


@pytest.mark.parametrize("name", [*STRATEGIES, "chain"])
def test_the_checkpoint_is_that_of_one_worker(runs: Any, name: str) -> None:
    """Weights to 1e-4 after 20 steps of AdamW, whose first steps are as large for a tiny gradient as for any."""
    directory, _ = runs
    ours, expected = load_model(directory / name / LAST), load_model(directory / "one" / LAST)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-3, atol=1e-4, msg=key)
    names = [sorted(path.name for path in (directory / run / LAST).rglob("*")) for run in (name, "one")]
    assert all(left == right for left, right in pairwise(names))


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_transformers_loads_what_a_sharded_run_wrote(runs: Any, name: str) -> None:
    directory, _ = runs
    ids = torch.arange(16).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(directory / name / LAST, dtype=torch.float32)
    ours = load_model(directory / name / LAST)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
