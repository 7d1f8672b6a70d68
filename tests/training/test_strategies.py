"""Data-parallel strategies over gloo against one worker: the same curve, the same biases, the same checkpoints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from strategy_runs import Run, assert_near_in_bf16, launch, lora_config, strategy_config
from transformers import AutoModelForCausalLM

from deepseek_ray.models.load import load_model
from deepseek_ray.training.metrics import read_metrics

Answers = dict[str, list[dict[str, Any]]]
"""By the name of a run, what each rank said."""

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
SHORT = {"steps": 6, "checkpoint_interval": 3}
LAST_OF_SHORT = "checkpoints/step-00000006"
WEIGHTS, ADAPTER = "model.safetensors", "adapter"
SHARED = ("ddp", "fsdp", "zero1", "zero2", "zero3")
ADAPTED = ("ddp", "fsdp", "zero1", "zero3", "chain")


def config(name: str, workers: int = 2, model: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    choice = dict(STRATEGIES[name])
    return strategy_config(choice.pop("strategy"), workers, distributed=choice, training=training, model=model or {})


def short_runs(name: str, directory: Path, workers: int = 2) -> list[Run]:
    """A model whose head is the embedding, one in bf16, and adapters of the model that `one` trained."""
    prefix = name if workers == 2 else "one"
    return [
        Run(f"{prefix}_tied", config(name, workers, {"tie_word_embeddings": True}, **SHORT)),
        Run(f"{prefix}_bf16", config(name, workers, precision="bf16", **SHORT)),
        Run(f"{prefix}_lora", lora_config(config(name, workers, **SHORT), directory / "one" / LAST)),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    """Every run of this file, in three process starts: the directory, and each run's answers by rank."""
    directory = tmp_path_factory.mktemp("strategies")
    alone = [Run("one", config("ddp", 1)), *short_runs("ddp", directory, 1)]
    together = [Run(name, config(name)) for name in STRATEGIES]
    together += [Run(f"{name}_recomputing", config(name, recompute_activations=True)) for name in ("fsdp", "zero3")]
    together += [
        Run("chain", config(name, checkpoint_interval=4), stop_after=None if step == 20 else step)
        for name, step in zip(CHAIN, range(4, 21, 4), strict=True)
    ]
    together += [run for name in SHARED for run in short_runs(name, directory) if run.directory != "zero2_lora"]
    lora = {name: lora_config(config(name, **SHORT), directory / "one" / LAST) for name in ("fsdp", "zero2")}
    together += [Run("chain_lora", lora["fsdp"], stop_after=3), Run("chain_lora", lora["zero2"])]
    together += [Run("grown", config("zero3"), start=("one", 10))]
    afterwards = [Run("shrunk", config("ddp", 1), start=("fsdp", 10))]
    answers: Answers = {}
    for size, part in ((1, alone), (2, together), (1, afterwards)):
        for run, *by_rank in zip(part, *launch(directory, size, part, timeout=500), strict=True):
            answers[run.directory] = by_rank
    return directory, answers


def assert_same_curve(directory: Path, name: str, reference: str = "one", steps: int = 20) -> None:
    """Equal to 1e-5: sums over workers are float32 in another order, and 20 steps at lr 1e-2 carry that on."""
    lines, expected = read_metrics(directory / name), read_metrics(directory / reference)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, steps + 1))
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


@pytest.mark.parametrize("name", SHARED)
def test_a_tied_embedding_stays_one_parameter(runs: Any, name: str) -> None:
    directory, _ = runs
    assert_same_curve(directory, f"{name}_tied", "one_tied", SHORT["steps"])
    ours, expected = (load_file(directory / run / LAST_OF_SHORT / WEIGHTS) for run in (f"{name}_tied", "one_tied"))
    assert ours.keys() == expected.keys()
    assert "lm_head.weight" not in ours
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", SHARED)
def test_bf16_stays_near_one_workers_bf16(runs: Any, name: str) -> None:
    """Losses to 1e-3 over 6 steps: gradients are summed in float32, but in another order, and what that moves a weight
    by is enough to round single activations to the next of bf16's 8 bits."""
    directory, _ = runs
    assert_near_in_bf16(directory, f"{name}_bf16", "one_bf16", "one")


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_those_of_one_worker(runs: Any, name: str) -> None:
    """Their curve, their own files, and the weights they are merged into; chain: fsdp, then ZeRO 2 after step 3."""
    directory, answers = runs
    assert [answer["error"] for answer in answers[f"{name}_lora"]] == [None] * 2
    assert_same_curve(directory, f"{name}_lora", "one_lora", SHORT["steps"])
    ours, expected = (directory / run / LAST_OF_SHORT for run in (f"{name}_lora", "one_lora"))
    assert (ours / ADAPTER / "adapter_config.json").read_bytes() == (
        expected / ADAPTER / "adapter_config.json"
    ).read_bytes()
    for file in (f"{ADAPTER}/adapter_model.safetensors", WEIGHTS):
        found, wanted = load_file(ours / file), load_file(expected / file)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_transformers_loads_what_a_sharded_run_wrote(runs: Any, name: str) -> None:
    directory, _ = runs
    ids = torch.arange(16).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(directory / name / LAST, dtype=torch.float32)
    ours = load_model(directory / name / LAST)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
