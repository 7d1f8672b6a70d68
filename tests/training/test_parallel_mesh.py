"""Models divided over one, two or four workers against one worker: curves, biases, gradients, checkpoints, resuming.

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
from strategy_runs import Run, assert_near_in_bf16, launch, lora_config, strategy_config

from deepseek_ray.training.metrics import read_metrics

Answers = dict[str, list[dict[str, Any]]]
"""By the name of a run, what each rank said."""

DIVISIONS = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {"expert_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
}
OTHER_MODEL = {
    "num_hidden_layers": 3, "q_lora_rank": 12, "attention_bias": True, "tie_word_embeddings": True,
    "num_nextn_predict_layers": 2, "vocab_size": 513,
}  # fmt: skip
"""All that the small model lacks; its vocabulary has no divisor."""
TIED_MODEL = {"num_hidden_layers": 4, "tie_word_embeddings": True}
TIED_STEPS = {"steps": 5, "checkpoint_interval": 1, "keep_checkpoints": 5}
CHAINS = {
    "tensor-expert": ["expert"],
    "expert-fsdp-pipeline": ["fsdp", "pipeline"],
    "pipeline-deepspeed-tensor": ["deepspeed", "tensor"],
}
"""Runs that change strategy after step 10, of which the first part is the first strategy's own run, and after 15."""
ADAPTED = {"steps": 6, "checkpoint_interval": 0}
BF16 = {"steps": 6, "checkpoint_interval": 0, "precision": "bf16"}
KEEPING = {"checkpoint_interval": 5, "keep_checkpoints": 4}


def divided(strategy: str, data: int = 1, distributed: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    sizes = {"data_parallel_size": data, **DIVISIONS[strategy], **(distributed or {})}
    return strategy_config(strategy, 1, distributed=sizes, **sections)


def checkpoint(directory: Path, run: str, step: int) -> Path:
    return directory / run / "checkpoints" / f"step-{step:08d}"


def over_two(strategy: str) -> dict[str, Any]:
    """Any strategy over two workers, with checkpoints to go on from."""
    if strategy in DIVISIONS:
        return divided(strategy, training=KEEPING)
    return strategy_config(strategy, 2, training=KEEPING)


def one_step(strategy: str, **sections: Any) -> dict[str, Any]:
    sections = {**sections, "training": {"steps": 1, **sections.get("training", {})}, "schedule": {"warmup_steps": 0}}
    return divided(strategy, **sections) if strategy in DIVISIONS else strategy_config("ddp", 1, **sections)


def one_step_runs(strategies: list[str]) -> list[Run]:
    """One optimiser step of several models: what AdamW then remembers is a tenth of the clipped gradient.

    The tied model goes on from there.
    """
    runs = []
    for strategy in strategies:
        gpipe = {"distributed": {"pipeline_schedule": "gpipe"}} if strategy == "pipeline" else {}
        runs += [
            Run(f"{strategy}-other", one_step(strategy, model=OTHER_MODEL, **gpipe)),
            Run(f"{strategy}-tied", one_step(strategy, model=TIED_MODEL, training=TIED_STEPS)),
            Run(f"{strategy}-again", one_step(strategy, training={"recompute_activations": True})),
        ]
    return runs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("divided")


def launched(directory: Path, world_size: int, runs: list[Run]) -> Answers:
    """Train all runs; none may end with an error. Of a run in several parts, what it said at its end."""
    by_rank = launch(directory, world_size, runs, timeout=500)
    answers = {run.directory: list(said) for run, *said in zip(runs, *by_rank, strict=True)}
    assert [(run, said) for run, said in answers.items() if any(answer["error"] for answer in said)] == []
    return answers


def resumed(name: str, source: str, *parts: dict[str, Any], stop: int | None = None) -> list[Run]:
    """A run that goes on from step 10 of another, five steps in each part but the last."""
    stops = [15] * (len(parts) - 1) + [stop]
    starts = [(source, 10)] + [None] * (len(parts) - 1)
    return [Run(name, part, end, start) for part, end, start in zip(parts, stops, starts, strict=True)]


@pytest.fixture(scope="module")
def one(directory: Path) -> Answers:
    """One process: the runs that all others are compared with."""
    runs = [
        Run("one", strategy_config("ddp", 1, training=KEEPING)),
        Run("ddp-bf16", strategy_config("ddp", 1, training=BF16)),
        *one_step_runs(["ddp"]),
        Run("ddp-lora", adapted(directory, strategy_config("ddp", 1, training=ADAPTED))),
    ]
    return launched(directory, 1, runs)


def adapted(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Adapters of the model that has all kinds of matrices, with biases."""
    return lora_config(config, checkpoint(directory, "ddp-other", 1))


@pytest.fixture(scope="module")
def two(directory: Path, one: Answers) -> Answers:
    """Two processes: each strategy from the start, each from another's and from one worker's checkpoint, and steps."""
    runs = [Run(strategy, divided(strategy)) for strategy in DIVISIONS]
    for name, strategies in CHAINS.items():
        runs += resumed(name, name.partition("-")[0], *(over_two(strategy) for strategy in strategies))
    for strategy in DIVISIONS:
        runs += resumed(f"grown-{strategy}", "one", over_two(strategy), stop=15)
        runs += [Run(f"{strategy}-bf16", divided(strategy, training=BF16))]
        runs += [Run(f"{strategy}-lora", adapted(directory, divided(strategy, training=ADAPTED)))]
    return launched(directory, 2, [*runs, *one_step_runs(list(DIVISIONS))])


@pytest.fixture(scope="module")
def four(directory: Path) -> Answers:
    """2 x 2 processes, 2 micro-batches each: a pipeline's first ten steps, then tensor parallel ones."""
    pipeline, tensor = (divided(strategy, 2, training=KEEPING) for strategy in ("pipeline", "tensor"))
    return launched(directory, 4, [Run("product", pipeline, stop_after=10), Run("product", tensor)])


@pytest.fixture(scope="module")
def alone_again(directory: Path, two: Answers, four: Answers) -> Answers:
    """One process that goes on where two and four left off."""
    alone = strategy_config("ddp", 1, training=KEEPING)
    runs = [resumed(f"shrunk-{source}", source, alone, stop=15) for source in (*DIVISIONS, "product")]
    return launched(directory, 1, [run for parts in runs for run in parts])


def assert_same_curve(directory: Path, run: str, reference: str = "one", steps: int = 20) -> None:
    expected, got = (read_metrics(directory / name)[:steps] for name in (reference, run))
    assert [line["step"] for line in got] == list(range(1, steps + 1))
    for before, after in zip(expected, got, strict=True):
        assert before.keys() == after.keys()
        for key in ("loss", "mtp_loss", "balance_loss", "gradient_norm", "max_violation", "learning_rate"):
            assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-6), (key, after["step"])
        assert after.get("validation_loss", 0) == pytest.approx(before.get("validation_loss", 0), rel=1e-5)
        assert after.get("expert_counts") == before.get("expert_counts")


def assert_same_export(directory: Path, run: str, reference: str = "one", step: int = 20) -> None:
    """Same files, same tensors: equal up to what 20 updates of rounding can do, biases to the last bit."""
    expected, got = (checkpoint(directory, name, step) for name in (reference, run))
    assert (got / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    wanted, found = load_file(expected / "model.safetensors"), load_file(got / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        exact = name.endswith("e_score_correction_bias")
        torch.testing.assert_close(found[name], value, rtol=0, atol=0 if exact else 2e-4, msg=name)


@pytest.mark.parametrize("run", [*DIVISIONS, *CHAINS])
def test_curve_and_export_are_those_of_one_process(directory: Path, two: Answers, run: str) -> None:
    """From the start, and with another strategy after step 10 and after step 15."""
    assert_same_curve(directory, run)
    assert_same_export(directory, run)


@pytest.mark.parametrize("run", [f"grown-{strategy}" for strategy in DIVISIONS])
def test_one_workers_checkpoint_goes_on_divided(directory: Path, one: Answers, two: Answers, run: str) -> None:
    assert_same_curve(directory, run, steps=15)
    assert_same_export(directory, run, step=15)


@pytest.mark.parametrize("source", [*DIVISIONS, "product"])
def test_a_divided_runs_checkpoint_goes_on_alone(directory: Path, alone_again: Answers, source: str) -> None:
    """Two workers' checkpoint, or that of 2 x 2, with one."""
    assert_same_curve(directory, f"shrunk-{source}", steps=15)
    assert_same_export(directory, f"shrunk-{source}", step=15)


def test_two_by_two_workers_resume_as_another_two_by_two(directory: Path, one: Answers, four: Answers) -> None:
    """Pairs of workers hold equal parts of the model, gradients are summed over pairs."""
    assert_same_curve(directory, "product")
    assert_same_export(directory, "product")


def test_biases_are_equal_on_all_workers(one: Answers, two: Answers, four: Answers) -> None:
    expected = one["one"][0]["biases"]
    assert any(any(layer) for layer in expected)
    for run in ("tensor", "expert", "tensor-expert", "pipeline-deepspeed-tensor"):
        assert [answer["biases"] for answer in two[run]] == [expected] * 2, run
    for run in ("pipeline", "expert-fsdp-pipeline"):  # all layers with experts are on the second stage
        assert [answer["biases"] for answer in two[run]] == [expected[:0], expected], run
    assert [answer["biases"] for answer in four["product"]] == [expected] * 4


@pytest.mark.parametrize("strategy", DIVISIONS)
def test_a_tied_embedding_stays_one_parameter(directory: Path, one: Answers, two: Answers, strategy: str) -> None:
    """The embedding is the head as well, on one stage, on two stages, and cut by vocabulary."""
    assert_same_curve(directory, f"{strategy}-tied", "ddp-tied", TIED_STEPS["steps"])
    assert_same_export(directory, f"{strategy}-tied", "ddp-tied", TIED_STEPS["steps"])


@pytest.mark.parametrize("strategy", DIVISIONS)
def test_bf16_stays_near_one_processes_bf16(directory: Path, one: Answers, two: Answers, strategy: str) -> None:
    """Losses to 1e-3 over 6 steps. A bf16 number has 8 bits, so a sum in another order differs by up to 2^-8 of itself
    (a divided product is rounded before the workers' parts are added), and a token whose experts are nearly equal then
    goes to another one. Seen: 2e-4 tensor, 7e-5 expert, 2e-5 pipeline, which only adds the stages' gradients.
    """
    assert_near_in_bf16(directory, f"{strategy}-bf16", "ddp-bf16", "one")


@pytest.mark.parametrize("strategy", DIVISIONS)
def test_adapters_are_those_of_one_process(directory: Path, one: Answers, two: Answers, strategy: str) -> None:
    """Of every matrix: attention, dense, shared and routed experts; cut by rows and by columns, with biases."""
    assert_same_curve(directory, f"{strategy}-lora", "ddp-lora", ADAPTED["steps"])
    assert_same_export(directory, f"{strategy}-lora", "ddp-lora", ADAPTED["steps"])
    wanted, found = (
        load_file(checkpoint(directory, f"{kind}-lora", ADAPTED["steps"]) / "adapter" / "adapter_model.safetensors")
        for kind in ("ddp", strategy)
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4, msg=name)


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


@pytest.mark.slow
def test_data_times_every_strategy(directory: Path, one: Answers) -> None:
    products = {
        "tensor": divided("tensor", 2),
        "expert": divided("expert", 2, training={"micro_batch_size": 1}),
        "pipeline": divided("pipeline", 2),
    }
    launched(directory, 4, [Run(f"{strategy}-product", config) for strategy, config in products.items()])
    for strategy in products:
        assert_same_curve(directory, f"{strategy}-product")
        assert_same_export(directory, f"{strategy}-product")


@pytest.mark.slow
def test_four_stages_and_four_ways(directory: Path, one: Answers) -> None:
    """Middle stages have neither embedding nor head; experts divide until each worker has one."""
    four = {"pipeline": {"pipeline_parallel_size": 4}, "expert": {"expert_parallel_size": 4}}
    model, micro = {"num_hidden_layers": 5}, {"micro_batch_size": 1}
    runs = [
        Run(f"{strategy}-four", one_step(strategy, distributed=sizes, model=model, training=micro))
        for strategy, sizes in four.items()
    ]
    launched(directory, 1, [Run("ddp-four", one_step("ddp", model=model, training=micro))])
    launched(directory, 4, runs)
    for strategy in four:
        test_gradients_are_those_of_one_process(directory, one, {}, strategy, "four")
