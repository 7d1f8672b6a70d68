"""Log-probabilities of the prompt's own tokens: the same whatever the chunks, the company and the preemptions."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import FakeDecoder, byte_tokenizer, run_to_end

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.messages import GenerateRequest, SamplingParams, TokenLogprob

PROMPT = list(b"the quick brown fox")


def make_request(request_id: str, prompt: list[int] = PROMPT, **fields: object) -> GenerateRequest:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=prompt, params=params, **{"prompt_logprobs": 2, **fields}
    )


def make_engine(**settings: int) -> Engine:
    config = {"block_size": 4, "kv_cache_bytes": 2**18, **settings}
    return Engine(FakeDecoder(), byte_tokenizer(), EngineConfig(**config))


def scores(engine: Engine, *requests: GenerateRequest) -> list[list[TokenLogprob] | None]:
    ended = run_to_end(engine, requests)
    for request in requests:
        later = ended[request.request_id].events[1:]
        assert all(event.prompt_logprobs is None for event in later)
    return [ended[request.request_id].events[0].prompt_logprobs for request in requests]


@pytest.fixture(scope="module")
def expected() -> list[TokenLogprob]:
    """Token by token: what generating the prompt's next token after those before it reports."""
    found = []
    for place in range(1, len(PROMPT)):
        bias = SamplingParams(temperature=0, max_tokens=1, logprobs=2, logit_bias={PROMPT[place]: 100})
        request = GenerateRequest(request_id="r", prompt_token_ids=PROMPT[:place], params=bias)
        (entry,) = run_to_end(make_engine(), [request])["r"].logprobs
        assert entry.token_id == PROMPT[place]
        found.append(entry)
    return found


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_every_prompt_token_but_the_first_is_scored(expected: list[TokenLogprob], chunk: int) -> None:
    assert scores(make_engine(max_num_batched_tokens=chunk), make_request("a")) == [expected]


def test_company_and_preemption_change_nothing(expected: list[TokenLogprob]) -> None:
    block = 2 * 4 * 6 * 4  # layers x block_size x latent width x bytes
    engine = make_engine(kv_cache_bytes=12 * block, max_num_batched_tokens=8, max_model_len=40)
    asked = [make_request("a"), make_request("b", PROMPT[::-1]), make_request("c", prompt_logprobs=None)]
    found = scores(engine, *asked)
    assert engine.stats().num_preemptions > 0
    assert (found[0], found[2]) == (expected, None)
    assert found[1] == scores(make_engine(), asked[1])[0]


def test_a_retry_with_output_does_not_score_again() -> None:
    first = run_to_end(make_engine(), [make_request("a")])["a"]
    retried = make_request("a", attempt=1, output_token_ids=first.token_ids[:3])
    assert scores(make_engine(), retried) == [None]


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    assert scores(make_engine(), make_request("a", PROMPT[:1])) == [[]]


def test_logits_that_are_not_finite_end_the_request() -> None:
    engine = make_engine(max_num_batched_tokens=3)
    engine._runner._decoder.poisoned_tokens = {PROMPT[4]}  # type: ignore[attr-defined]
    ended = run_to_end(engine, [make_request("a"), make_request("b", [1, 2, 3])])
    assert (ended["a"].error_kind, ended["b"].finish_reason) == ("GenerationError", "length")
    assert np.isfinite([entry.logprob for entry in ended["b"].events[0].prompt_logprobs]).all()
