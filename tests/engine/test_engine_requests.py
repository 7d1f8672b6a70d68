from __future__ import annotations

import pytest

from deepseek_ray.engine.requests import check_request, expand_request, max_output_tokens, sampling_seed
from deepseek_ray.errors import RequestError
from deepseek_ray.messages import GenerateRequest, SamplingParams


def make_request(prompt: list[int] | None = None, output: list[int] | None = None, **params: object) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=[1, 2] if prompt is None else prompt,
        output_token_ids=output or [],
        params=SamplingParams(**params),
    )


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (make_request(prompt=[]), "prompt", "empty"),
        (make_request(prompt=[0] * 10), "prompt", r"10 tokens; the context holds 10 .*shorten the prompt"),
        (make_request(prompt=[5, 100]), "prompt", r"id 100; .* 0 to 99"),
        (make_request(prompt=[-1]), "prompt", "id -1"),
        (make_request(output=[100]), "output_token_ids", "id 100"),
        (make_request(stop_token_ids=[100]), "stop_token_ids", "100"),
        (make_request(max_tokens=0), "max_tokens", "max_tokens is 0; it must be between 1 and"),
        (make_request(n=2), "n", "expand"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: GenerateRequest, param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        check_request(request_, vocab_size=100, max_model_len=10)
    assert caught.value.param == param


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    request = make_request(prompt=[0] * 9)
    check_request(request, vocab_size=100, max_model_len=10)
    assert max_output_tokens(request, max_model_len=10) == 1
    assert max_output_tokens(make_request(max_tokens=None), max_model_len=10) == 8
    assert max_output_tokens(make_request(max_tokens=3), max_model_len=10) == 3


def test_expansion_gives_ids_and_seeds() -> None:
    single = make_request(seed=5)
    assert expand_request(single) == [single]
    several = expand_request(make_request(n=3, seed=5))
    assert [request.request_id for request in several] == ["r-0", "r-1", "r-2"]
    assert [request.params.seed for request in several] == [5, 6, 7]
    assert all(request.params.n == 1 for request in several)
    wrapped = expand_request(make_request(n=2, seed=2**63 - 1))
    assert [request.params.seed for request in wrapped] == [2**63 - 1, -(2**63)]
    wrapped[1].params.validate()


def test_seeds_of_requests_that_bring_none() -> None:
    assert sampling_seed(make_request(seed=7), engine_seed=0) == 7
    without = make_request()
    assert sampling_seed(without, 0) == sampling_seed(without, 0)
    assert sampling_seed(without, 0) != sampling_seed(without, 1)
    first, second = expand_request(make_request(n=2))
    assert sampling_seed(first, 0) != sampling_seed(second, 0)
