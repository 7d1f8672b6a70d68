"""Sizes that do not fit are refused when the configuration is read."""

from __future__ import annotations

from typing import Any

import pytest
from training_runs import small_config

from deepseek_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("distributed", "model", "message"),
    [
        ({"strategy": "tensor", "tensor_parallel_size": 3}, {}, r"size is 3, .* model.num_attention_heads 2; .* of 2"),
        ({"strategy": "tensor", "tensor_parallel_size": 2}, {"intermediate_size": 49}, r"model.intermediate_size 49"),
        ({"strategy": "tensor", "tensor_parallel_size": 2}, {"moe_intermediate_size": 15}, r"moe_intermediate_size 15"),
        ({"strategy": "expert", "expert_parallel_size": 2}, {"n_routed_experts": 5}, r"is 2, .*n_routed_experts 5"),
        (
            {"strategy": "pipeline", "pipeline_parallel_size": 3},
            {},
            r"is 3, above model.num_hidden_layers 2: .* most 2",
        ),
        ({"strategy": "tensor"}, {}, r"strategy is 'tensor' and tensor_parallel_size is 1; set it to at least 2"),
        ({"strategy": "expert", "tensor_parallel_size": 2}, {}, r"tensor_parallel_size is 2, but strategy 'expert'"),
        ({"pipeline_parallel_size": 2}, {}, r"pipeline_parallel_size is 2, but strategy 'ddp' .* to 'pipeline'"),
        ({"strategy": "expert", "expert_parallel_size": 2, "data_parallel_size": 4}, {}, r"4 times 8, .* x expert_par"),
    ],
)
def test_sizes_that_do_not_fit(distributed: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(distributed=distributed, model=model)


def test_a_pipeline_needs_micro_batches() -> None:
    distributed = {"strategy": "pipeline", "pipeline_parallel_size": 2}
    with pytest.raises(
        ConfigError, match=r"1f1b needs .* stages, 2, but there are 1; .* set pipeline_schedule to gpipe"
    ):
        small_config(distributed=distributed, training={"micro_batch_size": 8})
    config = small_config(distributed={**distributed, "pipeline_schedule": "gpipe"}, training={"micro_batch_size": 8})
    assert config.accumulation_steps == 1


def test_sizes_multiply_to_the_workers_and_readers_share_the_batch() -> None:
    expert = small_config(
        distributed={"strategy": "expert", "expert_parallel_size": 2}, training={"micro_batch_size": 2}
    )
    assert (expert.num_workers, expert.accumulation_steps) == (2, 2)
    sizes = {"strategy": "tensor", "tensor_parallel_size": 2, "data_parallel_size": 2}
    tensor = small_config(distributed=sizes, training={"micro_batch_size": 2})
    assert (tensor.num_workers, tensor.accumulation_steps) == (4, 2)
