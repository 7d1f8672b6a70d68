"""Tokens that the temperature alone decides are drawn for a whole step at once, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import FakeDecoder, byte_tokenizer, run_to_end

from deepseek_ray.config.engine import EngineConfig, SpeculativeConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.philox import uniform
from deepseek_ray.engine.sampler import draw, token_weights
from deepseek_ray.kernels.base import Place
from deepseek_ray.messages import GenerateRequest, SamplingParams, StructuredOutputsParams


class Drawing(FakeDecoder):
    """Draws as the sampler does, in numpy, and notes for which places."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Place] = []

    def draw(self, logits: np.ndarray, rows: Sequence[int], places: Sequence[Place]) -> list[int]:
        self.drawn += places
        return [self._one(logits[row], place) for row, place in zip(rows, places, strict=True)]

    def _one(self, row: np.ndarray, place: Place) -> int:
        if not np.isfinite(row).all():
            return -1
        if place.temperature == 0:
            return int(row.argmax())
        weights = token_weights(row.astype(np.float64), SamplingParams(temperature=place.temperature))
        return draw(weights, uniform(place.seed, place.position))


def engine_of(decoder: FakeDecoder, **changes: Any) -> Engine:
    return Engine(decoder, byte_tokenizer(), EngineConfig(block_size=4, max_num_batched_tokens=64, **changes))


def request(name: str, **params: Any) -> GenerateRequest:
    values = {"temperature": 0.8, "max_tokens": 12, "ignore_eos": True, "seed": 5, **params}
    prompt = [(7 * place + len(name)) % 4 for place in range(9)]
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**values))


OTHERS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.9},
    "penalty": {"repetition_penalty": 1.2},
    "bias": {"logit_bias": {3: 2.0}},
    "not yet": {"min_tokens": 12, "ignore_eos": False},
    "structure": {"structured_outputs": StructuredOutputsParams(regex="[a-z]+")},
}
PLAIN: dict[str, dict[str, Any]] = {"plain": {}, "greedy": {"temperature": 0}, "with logprobs": {"logprobs": 2}}


@pytest.mark.parametrize("speculative", [None, SpeculativeConfig(method="ngram", num_tokens=3)])
def test_drawn_or_not_the_outputs_are_the_same(speculative: SpeculativeConfig | None) -> None:
    requests = [request(name, **params) for name, params in {**PLAIN, **OTHERS}.items()]
    drawing = Drawing()
    found = run_to_end(engine_of(drawing, speculative=speculative), requests)
    expected = run_to_end(engine_of(FakeDecoder(), speculative=speculative), requests)
    assert {name: own.token_ids for name, own in found.items()} == {
        name: own.token_ids for name, own in expected.items()
    }
    assert {name: own.logprobs for name, own in found.items()} == {name: own.logprobs for name, own in expected.items()}
    positions = {(place.temperature, place.position) for place in drawing.drawn}
    assert {position for temperature, position in positions if temperature} >= set(range(12))
    assert {position for temperature, position in positions if not temperature} >= set(range(12))


def test_what_the_temperature_does_not_decide_alone_is_not_drawn() -> None:
    drawing = Drawing()
    run_to_end(engine_of(drawing), [request(name, **params) for name, params in OTHERS.items()])
    assert drawing.drawn == []


def test_min_tokens_forbid_until_they_are_there() -> None:
    drawing = Drawing()
    run_to_end(engine_of(drawing), [request("some", min_tokens=5, ignore_eos=False, max_tokens=9)])
    assert [place.position for place in drawing.drawn][:1] == [5]


def test_a_row_that_is_not_finite_ends_its_request_alone() -> None:
    drawing = Drawing()
    good, bad = request("good"), request("bad")
    drawing.poisoned_tokens = {200}
    bad.prompt_token_ids[-1] = 200
    found = run_to_end(engine_of(drawing), [good, bad])
    assert found["bad"].finish_reason == "error" and "NaN or infinite" in (found["bad"].error or "")
    assert len(found["good"].token_ids) == 12
