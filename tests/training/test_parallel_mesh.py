"""Models divided over two or four workers against one worker: curves, biases, gradients, checkpoints.

Tolerances are for float32. A divided product or a sum over workers adds the same numbers in another order, which moves
a loss by about 1e-7 of itself; over 20 steps AdamW, whose first updates depend on little more than the gradient's sign,
lets that grow, but not beyond 1e-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from strategy_runs import Run, launch, strategy_config

from deepseek_ray.training.metrics import read_metrics

Answers = list[list[dict[str, Any]]]

DIVISIONS = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"expert_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}
NEXT = {"tensor": "expert", "expert": "pipeline", "pipeline": "tensor"}
OTHER_MODEL = {
    "num_hidden_layers": 3, "q_lora_rank": 12, "attention_bias": True, "tie_word_embeddings": True,
    "num_nextn_predict_layers": 2, "vocab_size": 513,
}  # fmt: skip
"""All that the small model lacks; its vocabulary has no divisor."""
TIED_MODEL = {"num_hidden_layers": 4, "tie_word_embeddings": True}


def divided(strategy: str, data: int = 1, distributed: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    sizes = {"data_parallel_size": data, **DIVISIONS[strategy], **(distributed or {})}
    return strategy_config(strategy, 1, distributed=sizes, **sections)


def one_step(strategy: str, **sections: Any) -> dict[str, Any]:
    sections = {**sections, "training": {"steps": 1, **sections.get("training", {})}, "schedule": {"warmup_steps": 0}}
    return divided(strategy, **sections) if strategy in DIVISIONS else strategy_config("ddp", 1, **sections)


def one_step_runs(strategies: list[str]) -> list[Run]:
    """One optimiser step of several models: what AdamW then remembers is a tenth of the clipped gradient."""
    runs = []
    for strategy in strategies:
        gpipe = {"distributed": {"pipeline_schedule": "gpipe"}} if strategy == "pipeline" else {}
        runs += [
            Run(f"{strategy}-other", one_step(strategy, model=OTHER_MODEL, **gpipe)),
            Run(f"{strategy}-tied", one_step(strategy, model=TIED_MODEL)),
            Run(f"{strategy}-again", one_step(strategy, training={"recompute_activations": True})),
        ]
    return runs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("divided")


@pytest.fixture(scope="module")
def one(directory: Path) -> Answers:
    """One process: the runs that all others are compared with."""
    return launch(directory, 1, [Run("one", strategy_config("ddp", 1)), *one_step_runs(["ddp"])])


@pytest.fixture(scope="module")
def two(directory: Path) -> Answers:
    """Two processes: 20 steps of each strategy, then 10 of each and 10 of another, then single steps."""
    whole = [Run(strategy, divided(strategy)) for strategy in DIVISIONS]
    halves = [
        Run(f"{strategy}-resumed", divided(kind), stop)
        for strategy in DIVISIONS
        for kind, stop in ((strategy, 10), (NEXT[strategy], None))
    ]
    return launch(directory, 2, [*whole, *halves, *one_step_runs(list(DIVISIONS))])


def checkpoint(directory: Path, run: str, step: int) -> Path:
    (found,) = (directory / run / "checkpoints").glob(f"*{step}")
    return found


def assert_same_curve(directory: Path, run: str) -> None:
    expected, got = (read_metrics(directory / name) for name in ("one", run))
    assert [line["step"] for line in got] == list(range(1, 21))
    for before, after in zip(expected, got, strict=True):
        assert before.keys() == after.keys()
        for key in ("loss", "mtp_loss", "balance_loss", "gradient_norm", "max_violation", "learning_rate"):
            assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-6), (key, after["step"])
    assert got[-1]["validation_loss"] == pytest.approx(expected[-1]["validation_loss"], rel=1e-5)
    assert got[-1]["expert_counts"] == expected[-1]["expert_counts"]


def assert_same_export(directory: Path, run: str) -> None:
    """Same files, same tensors: equal up to what 20 updates of rounding can do, biases to the last bit."""
    expected, got = (checkpoint(directory, name, 20) for name in ("one", run))
    assert (got / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    wanted, found = load_file(expected / "model.safetensors"), load_file(got / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        exact = name.endswith("e_score_correction_bias")
        torch.testing.assert_close(found[name], value, rtol=0, atol=0 if exact else 2e-4, msg=name)


@pytest.mark.parametrize("run", [*DIVISIONS, *(f"{strategy}-resumed" for strategy in DIVISIONS)])
def test_curve_and_export_are_those_of_one_process(directory: Path, one: Answers, two: Answers, run: str) -> None:
    assert all(answer["error"] is None for answers in (*one, *two) for answer in answers)
    assert_same_curve(directory, run)
    assert_same_export(directory, run)


def test_biases_are_equal_on_all_workers(one: Answers, two: Answers) -> None:
    expected = one[0][0]["biases"]
    assert any(any(layer) for layer in expected)
    for rank in (0, 1):
        tensor, expert, pipeline = (answer["biases"] for answer in two[rank][:3])
        assert tensor == expert == expected
        assert pipeline == ([expected[:0], expected][rank])  # all layers with experts are on the second stage


@pytest.mark.parametrize("model", ["other", "tied", "again"])
@pytest.mark.parametrize("strategy", DIVISIONS)
def test_gradients_are_those_of_one_process(
    directory: Path, one: Answers, two: Answers, strategy: str, model: str
) -> None:
    """Of every parameter, to 1e-5 of its largest entry: a factor of two somewhere would not show in AdamW's updates."""
    wanted, found = (
        load_file(checkpoint(directory, f"{kind}-{model}", 1) / "trainer" / "optimizer.safetensors")
        for kind in ("ddp", strategy)
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * value.abs().max().item(), msg=name)


PRODUCTS = {
    "tensor": divided("tensor", 2),
    "expert": divided("expert", 2, training={"micro_batch_size": 1}),
    "pipeline": divided("pipeline", 2),
}


def assert_products(directory: Path, strategies: list[str]) -> None:
    runs = [Run(f"{strategy}-product", PRODUCTS[strategy]) for strategy in strategies]
    answers = launch(directory, 4, runs)
    assert all(answer["error"] is None for rank in answers for answer in rank)
    for run in runs:
        assert_same_curve(directory, run.directory)
        assert_same_export(directory, run.directory)


def test_data_times_pipeline(directory: Path, one: Answers) -> None:
    """2 x 2 workers and 2 micro-batches each: pairs of workers hold equal stages, gradients are summed over pairs."""
    assert_products(directory, ["pipeline"])


@pytest.mark.slow
def test_data_times_tensor_and_data_times_expert(directory: Path, one: Answers) -> None:
    assert_products(directory, ["tensor", "expert"])


@pytest.mark.slow
def test_four_stages_and_four_ways(directory: Path, one: Answers) -> None:
    """Middle stages have neither embedding nor head; experts divide until each worker has one."""
    four = {"pipeline": {"pipeline_parallel_size": 4}, "expert": {"expert_parallel_size": 4}}
    model, micro = {"num_hidden_layers": 5}, {"micro_batch_size": 1}
    runs = [
        Run(f"{strategy}-four", one_step(strategy, distributed=sizes, model=model, training=micro))
        for strategy, sizes in four.items()
    ]
    launch(directory, 1, [Run("ddp-four", one_step("ddp", model=model, training=micro))])
    launch(directory, 4, runs)
    for strategy in four:
        test_gradients_are_those_of_one_process(directory, one, [], strategy, "four")
