"""The sampler against slow versions written from the definitions, one probability at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.engine.philox import uniform
from deepseek_ray.engine.sampler import adjust_logits, choose_token, describe_choice, draw, token_weights
from deepseek_ray.errors import GenerationError
from deepseek_ray.kernels.base import Kernels, Place
from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.select import default_kernels
from deepseek_ray.messages import SamplingParams


def row(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def random_row(size: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def weights(logits: Sequence[float] | np.ndarray, **params: float) -> np.ndarray:
    """Normalised probabilities after the sampling parameters."""
    result = token_weights(np.array(logits, dtype=np.float64), SamplingParams(**params))
    return result / result.sum()


def slow_weights(logits: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    scaled = [logit / temperature for logit in logits]
    highest = max(scaled)
    weights = [math.exp(value - highest) for value in scaled]
    weights = [weight if weight >= min_p * max(weights) else 0.0 for weight in weights]
    if 0 < top_k < len(weights):
        last = sorted(weights, reverse=True)[top_k - 1]
        weights = [weight if weight >= last else 0.0 for weight in weights]
    if top_p < 1:
        total, sum_before, kept = sum(weights), 0.0, set()
        for token_id in sorted(range(len(weights)), key=lambda token_id: (-weights[token_id], token_id)):
            if sum_before < top_p * total:
                kept.add(token_id)
            sum_before += weights[token_id]
        weights = [weight if token_id in kept else 0.0 for token_id, weight in enumerate(weights)]
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=200)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.floats(0.05, 5),
    st.integers(-1, 45),
    st.floats(1e-6, 1),
    st.floats(0, 1),
)
def test_weights_are_those_of_the_definition(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    # Whole numbers divided by 4 make equal logits frequent.
    logits = np.round(np.random.default_rng(seed).standard_normal(size) * 8) / 4
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    np.testing.assert_allclose(weights(logits, **params), slow_weights(logits.tolist(), **params), atol=1e-12)


def test_top_p_over_a_vocabulary_larger_than_the_first_cut() -> None:
    logits = random_row(3000, scale=0.3).astype(np.float64)  # nearly flat: 90 % takes far more than 256 tokens
    np.testing.assert_allclose(weights(logits, top_p=0.9), slow_weights(logits.tolist(), 1.0, 0, 0.9, 0.0), atol=1e-12)
    assert np.count_nonzero(weights(logits, top_p=0.9)) > 1000


def test_edges_of_the_filters() -> None:
    logits = [3.0, 1.0, 2.0, 2.0]
    assert np.count_nonzero(weights(logits, top_k=1)) == 1
    assert np.count_nonzero(weights(logits, top_k=2)) == 3, "equals of the last one stay, as in vLLM"
    assert np.count_nonzero(weights(logits, top_p=1e-6)) == 1, "the most likely token always stays"
    assert np.count_nonzero(weights(logits, min_p=1.0)) == 1
    assert np.count_nonzero(weights([1.0, 1.0], min_p=1.0)) == 2
    for unlimited in ({"top_k": 0}, {"top_k": -1}, {"top_k": 4}, {"top_k": 99}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert np.count_nonzero(weights(logits, **unlimited)) == 4
    assert np.flatnonzero(weights([0.0, 0.0], top_p=0.5)).tolist() == [0], "one of two equals is exactly half"
    # 0.5, 0.25, 0.125, 0.125: three quarters are reached by two tokens, a little more takes a third
    halves = np.log([0.5, 0.25, 0.125, 0.125])
    assert np.count_nonzero(weights(halves, top_p=0.7499)) == 2
    assert np.flatnonzero(weights(halves, top_p=0.7501)).tolist() == [0, 1, 2], "the lower id first among equals"


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    assert weights([1.0, 1000.0, -1000.0], temperature=1e-300).tolist() == [0.0, 1.0, 0.0]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    params = SamplingParams(temperature=0)
    assert choose_token(row([1, 5, 5, 2]), params, seed=1, token_ids=[0], num_prompt_tokens=1) == 1


def test_draw_walks_the_cumulative_distribution() -> None:
    table = np.array([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    picked = [draw(table, number) for number in (0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53)]
    assert picked == [1, 1, 3, 3, 4, 4]
    assert draw(np.array([1e-300, 0.0]), 1 - 2**-53) == 0, "the product rounds up to the total"


def test_samples_follow_the_distribution() -> None:
    logits = random_row(12, seed=3, scale=1.5)
    params = SamplingParams(temperature=0.8, top_p=0.95)
    expected = np.array(slow_weights(logits.tolist(), 0.8, 0, 0.95, 0.0))
    num_samples = 20000
    counts = np.zeros(12)
    for position in range(num_samples):
        counts[choose_token(logits, params, 42, [0] * (position + 1), 1)] += 1
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counts - num_samples * expected)[possible] ** 2 / (num_samples * expected[possible])).sum()
    assert chi_square < 31.3  # at most 11 degrees of freedom, p = 0.001


def test_a_sample_depends_on_seed_and_output_position_only() -> None:
    logits, params = random_row(500), SamplingParams()
    first = choose_token(logits, params, 5, [1, 2, 3, 4], 2)
    assert first == choose_token(logits, params, 5, [9, 9, 9, 9, 9, 9], 4), "other prompt, same place in the output"
    assert first == draw(token_weights(logits.astype(np.float64), params), uniform(5, 2))
    others = {choose_token(logits, params, seed, [1, 2, 3, 4], 2) for seed in range(20)}
    assert len(others) > 5


def slow_penalties(
    logits: Sequence[float], prompt: list[int], output: list[int], repetition: float, frequency: float, presence: float
) -> list[float]:
    adjusted = []
    for token_id, logit in enumerate(logits):
        if token_id in prompt or token_id in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * output.count(token_id)
        logit -= presence * (token_id in output)
        adjusted.append(logit)
    return adjusted


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), max_size=8),
    st.floats(0.1, 3),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_are_those_of_the_definition(
    prompt: list[int], output: list[int], repetition: float, frequency: float, presence: float
) -> None:
    logits = random_row(10, seed=len(prompt))
    params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    result = adjust_logits(logits, params, prompt + output, len(prompt), ())
    expected = slow_penalties(logits.tolist(), prompt, output, repetition, frequency, presence)
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, token_ids = random_row(30, seed=5), [3, 3, 8, 29, 0]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([token_ids]), torch.tensor(logits)[None])[0]
    ours = adjust_logits(logits, SamplingParams(repetition_penalty=1.7), token_ids, 2, ())
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


@pytest.mark.parametrize("params", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_filters_keep_what_transformers_keeps(params: dict[str, float]) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warper = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}[next(iter(params))]
    for seed in range(20):
        logits = random_row(50, seed=seed, scale=2)
        theirs = warper(next(iter(params.values())))(torch.tensor([[0]]), torch.tensor(logits)[None])[0]
        kept = np.flatnonzero(weights(logits, **params))
        assert kept.tolist() == torch.isfinite(theirs).nonzero().flatten().tolist()


def test_logit_bias_and_forbidden_tokens() -> None:
    logits = row([0, 1, 2, 3])
    params = SamplingParams(temperature=0, logit_bias={0: 100.0, 3: -100.0})
    assert choose_token(logits, params, 0, [1], 1) == 0
    assert choose_token(logits, params, 0, [1], 1, forbidden_token_ids={0}) == 2, (
        "a bias does not lift what is forbidden"
    )
    with pytest.raises(GenerationError, match="min_tokens"):
        choose_token(logits, params, 0, [1], 1, forbidden_token_ids=range(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationError, match="1 of 4 logits"):
            choose_token(row([0, bad, 2, 3]), SamplingParams(temperature=temperature), 0, [1], 1)


def test_logprobs_are_those_of_log_softmax() -> None:
    logits = random_row(1000, seed=8)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    entry = describe_choice(logits, token_id=17, num_top=20)
    top = expected.topk(20)
    assert [token_id for token_id, _ in entry.top] == top.indices.tolist()
    np.testing.assert_allclose([logprob for _, logprob in entry.top], top.values, atol=1e-9)
    assert entry.logprob == pytest.approx(expected[17].item(), abs=1e-9)
    assert entry.rank == 1 + int((expected > expected[17]).sum())


def test_logprobs_of_equals_and_of_zero_and_of_too_many() -> None:
    logits = row([1, 2, 2, 2, 0])
    assert [token_id for token_id, _ in describe_choice(logits, 2, 2).top] == [1, 2]
    assert describe_choice(logits, 2, 0).top == []
    assert describe_choice(logits, 2, 0).rank == 1
    assert len(describe_choice(logits, 2, 20).top) == 5


@pytest.mark.parametrize("size", [1, 15, 16, 17, 512, 513, 32003])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_the_fast_way_draws_from_the_same_distribution(size: int, temperature: float) -> None:
    """The place of the chosen token in the exact cumulative distribution holds the number, up to rounding."""
    logits = np.stack([random_row(size, seed=size + row, scale=4.0) for row in range(2)])
    seeds = (0, 7, 2**63 + 5, 2**64 - 1)
    places = [Place(temperature, seed, position) for seed in seeds for position in (*range(40), 2**33)]
    rows = [index % 2 for index in range(len(places))]
    tokens = native().draw(logits, rows, places)
    assert tokens is not None
    for row, place, token in zip(rows, places, tokens, strict=True):
        weights = token_weights(logits[row].astype(np.float64), SamplingParams(temperature=temperature))
        ends, number = np.cumsum(weights) / weights.sum(), uniform(place.seed, place.position)
        before = ends[token - 1] if token else 0.0
        assert before - 1e-5 <= number <= ends[token] + 1e-5
        assert weights[token] > 0


def test_the_fast_way_never_takes_a_token_of_no_weight() -> None:
    logits = np.full((1, 1000), -1e4, dtype=np.float32)
    logits[0, 300:400] = 0
    tokens = native().draw(logits, [0] * 3000, [Place(1.0, 1, position) for position in range(3000)])
    assert tokens is not None and set(tokens) == set(range(300, 400))


def test_the_fast_way_takes_the_lowest_of_equals_and_leaves_bad_rows_alone() -> None:
    equal = row([1.0] * 3 + [5.0] + [2.0] * 40 + [5.0] * 9)
    assert native().draw(equal[None], [0], [Place(0.0, 3, 4)]) == [3]
    assert native().draw(equal[None], [], []) == []
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 16, 52):
            spoiled = equal.copy()
            spoiled[place] = bad
            assert native().draw(np.stack([spoiled, equal]), [1, 0], [Place(0.0, 1, 2)] * 2) == [3, -1]
            with pytest.raises(GenerationError, match="1 of 53 logits are NaN or infinite"):
                choose_token(spoiled, SamplingParams(), 0, [0], 1)


def native() -> Kernels:
    kernels = default_kernels()
    if not isinstance(kernels, NativeKernels):
        pytest.skip("no C++ compiler")
    return kernels
