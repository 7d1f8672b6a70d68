"""Every job after pre-training through `ray job submit`: each finds what the one before it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversation_files import write_jsonl

from deepseek_ray.models.load import load_model
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.tuning.result import SearchResult
from tests.head_node import HeadNode, head_node, submit_job
from tests.jobs.test_model_jobs import tuning

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_TRIALS, TRIAL_TOKENS = 2, 8192


@pytest.fixture(scope="module")
def cluster() -> Iterator[HeadNode]:
    with head_node() as head:
        yield head


def succeeded(cluster: HeadNode, job: str, *arguments: str) -> str:
    done = submit_job(cluster, "python", f"jobs/{job}.py", *arguments, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finetuned(cluster: HeadNode, trained_model: Path) -> Path:
    """The checkpoint of a submitted fine-tuning run."""
    said = succeeded(cluster, "finetune", *tuning(trained_model, cluster.directory, "training.steps=4"))
    assert "adapters reach" in said
    return cluster.directory / "runs" / "finetune-lora" / "checkpoints" / "step-00000004"


def test_finetune_writes_a_model_and_its_adapter(finetuned: Path, trained_model: Path) -> None:
    assert [line["step"] for line in read_metrics(finetuned.parents[1])] == [1, 2, 3, 4]
    assert (finetuned / "adapter" / "adapter_config.json").is_file()
    assert load_model(finetuned).config == load_model(trained_model).config


def test_evaluate_measures_what_the_run_measured(cluster: HeadNode, finetuned: Path) -> None:
    held_out = str(cluster.directory / "held_out.jsonl")
    said = succeeded(
        cluster, "evaluate", str(finetuned), "--chat", "--data", held_out, "--sequence-length", "64", "--json"
    )
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    values = json.loads(line)
    last = read_metrics(finetuned.parents[1])[-1]
    assert values["nats_per_token"] == pytest.approx(last["validation_loss"], abs=2e-3)
    assert [load["layer"] for load in values["expert_load"]] == [1, 2]


def test_batch_inference_answers_every_row_and_only_once(cluster: HeadNode, finetuned: Path) -> None:
    prompts = write_jsonl(cluster.directory / "prompts.jsonl", [{"prompt": f"say line {n}"} for n in range(5)])
    answers = cluster.directory / "answers"
    arguments = ["--model-dir", str(finetuned), "--input", str(prompts), "--output", str(answers), "--chat",
                 "--max-tokens", "4", "--rows-per-file", "3", "--threads", "1"]  # fmt: skip
    assert f"2 files in {answers}, 0 of them were there before" in succeeded(cluster, "batch_inference", *arguments)
    files = sorted(answers.glob("part-*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(5))
    assert all(1 <= len(row["token_ids"]) <= 4 and row["error"] is None for row in rows)
    assert f"2 files in {answers}, 2 of them were there before" in succeeded(cluster, "batch_inference", *arguments)


def test_tune_trains_every_trial_and_names_the_best(cluster: HeadNode) -> None:
    corpus = cluster.directory / "corpus.txt"
    corpus.write_text("\n".join(f"line {number} of the text says {number * number}" for number in range(3000)))
    overrides = ["schedule.warmup_steps=1", "data.source=text", f"data.paths=[{corpus}]", "data.document_bytes=4000",
                 "data.vocab_size=512", f"data.cache_dir={cluster.directory / 'cache'}"]  # fmt: skip
    sets = [part for override in overrides for part in ("--set", override)]
    storage = cluster.directory / "sweeps"
    said = succeeded(
        cluster, "tune", "configs/tiny.yaml", "--trials", str(NUM_TRIALS), "--tokens", str(TRIAL_TOKENS),
        "--scheduler", "none", "--searcher", "random", "--storage", str(storage), "--name", "sweep", *sets,
    )  # fmt: skip
    result = SearchResult.read(storage / "sweep")
    assert [record.status for record in result.trials] == ["finished"] * NUM_TRIALS
    assert all(math.isfinite(record.metrics["validation_loss"]) for record in result.trials)
    assert result.best_trial.name in said
    assert load_model(result.best_checkpoint).config.n_routed_experts == 4
