"""Measured latency: the time of a token's layers, and the process is as it was."""

from __future__ import annotations

import pytest
import torch
from training_runs import small_config

from deepseek_ray.models.paged_layer import Layer, LayerEnd
from deepseek_ray.tuning import latency
from deepseek_ray.tuning.latency import measure_decode_latency


class LayerClock:
    """Stands for `time`: every layer that computes takes a second."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        begin = Layer.begin

        def counted(layer: Layer, *arguments: object) -> LayerEnd:
            self.now += 1.0
            return begin(layer, *arguments)  # type: ignore[arg-type]

        self.now = 0.0
        patch.setattr(Layer, "begin", counted)
        patch.setattr(latency, "time", self)

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("layers", [2, 8])
def test_a_token_takes_as_long_as_its_layers(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    LayerClock(monkeypatch)
    config = small_config(model={"num_hidden_layers": layers})
    assert measure_decode_latency(config.model) == 1000 * layers


def test_a_real_clock_gives_a_time_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()
    assert measure_decode_latency(small_config().model) > 0
    assert torch.get_num_threads() == threads


def test_one_slow_token_does_not_move_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.5] * 31 + [90.0]
    monkeypatch.setattr(latency, "_decode", lambda *_: seconds)
    assert measure_decode_latency(small_config().model) == 500


def test_a_context_of_a_few_tokens_can_be_measured() -> None:
    config = small_config(model={"max_position_embeddings": 24})
    assert measure_decode_latency(config.model) > 0
