"""Measured latency: grows with the model, and leaves the process as it was."""

from __future__ import annotations

import torch
from training_runs import small_config

from deepseek_ray.tuning.latency import measure_decode_latency


def test_a_much_larger_model_takes_longer_per_token() -> None:
    threads = torch.get_num_threads()
    small = measure_decode_latency(small_config().model)
    large = measure_decode_latency(small_config(model={"num_hidden_layers": 8, "intermediate_size": 512}).model)
    assert 0 < 2 * small < large
    assert torch.get_num_threads() == threads


def test_a_context_of_a_few_tokens_can_be_measured() -> None:
    config = small_config(model={"max_position_embeddings": 24})
    assert measure_decode_latency(config.model) > 0
