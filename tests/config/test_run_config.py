"""The run configuration: derived values, and one clear error for each thing that cannot be honoured."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError

MODEL = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip


def run_values(**sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "run",
        "model": MODEL,
        "data": {"vocab_size": 512, "sequence_length": 64},
        "schedule": {"warmup_steps": 2},
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
    return values


def parse(**sections: Any) -> PretrainConfig:
    return PretrainConfig.parse(run_values(**sections))


def test_derived_values() -> None:
    config = parse(distributed={"data_parallel_size": 2}, storage_path="/runs")
    assert config.num_workers == 2
    assert config.accumulation_steps == 2  # 8 sequences / (2 per forward x 2 workers)
    assert config.tokens_per_step == 8 * 64
    assert config.total_steps == 10
    assert str(config.run_dir) == "/runs/run"


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    assert parse(training={"steps": None, "tokens": 8 * 64 * 3 + 1}).total_steps == 4


def test_vocabulary_follows_the_tokenizer_to_train() -> None:
    assert parse().model.vocab_size == 512
    assert parse(model={"vocab_size": 1024}).model.vocab_size == 1024


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"distributed": {"strategy": "magic"}}, r"distributed.strategy is 'magic'.*'ddp'"),
        ({"distributed": {"tensor_parallel_size": 2}}, r"tensor_parallel_size is 2, but strategy 'ddp' .* to 'tensor'"),
        ({"distributed": {"data_parallel_size": 3}}, r"global_batch_size is 8, not a multiple.*data_parallel_size 3"),
        ({"distributed": {"gradient_accumulation_steps": 3}}, r"gradient_accumulation_steps is 3, but.* is 4"),
        ({"training": {"steps": None}}, r"steps is None and training.tokens is None; set exactly one"),
        ({"training": {"tokens": 5}}, r"steps is 10 and training.tokens is 5; set exactly one"),
        ({"training": {"precision": "fp16"}}, r"training.precision is 'fp16'.*'bf16' or 'fp32'"),
        ({"training": {"stepz": 5}}, r"unknown key 'training.stepz'; did you mean 'steps'"),
        ({"data": {"sequence_length": 256}}, r"sequence_length is 256, above model.max_position_embeddings 128"),
        ({"model": {"vocab_size": 500}}, r"data.vocab_size is 512, above model.vocab_size 500"),
        ({"data": {"tokenizer": "somewhere"}}, r"model.vocab_size is missing and data.tokenizer is 'somewhere'"),
        ({"schedule": {"warmup_steps": 11}}, r"warmup_steps is 11, above the 10 steps"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"betas is \[0.9, 1.0\]"),
        ({"name": "../escape"}, r"name is '../escape'"),
        ({"optimiser": {"lr": 1}}, r"unknown key 'optimiser'; did you mean 'optimizer'"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**sections)


def test_it_is_frozen() -> None:
    config = parse()
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 5  # type: ignore[misc]


def test_it_survives_json() -> None:
    config = parse()
    assert PretrainConfig.parse(config.model_dump(mode="json")) == config
