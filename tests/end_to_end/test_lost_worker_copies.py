"""An attention worker is killed under long sequences: its peer goes on from the copies and computes next to nothing."""

from __future__ import annotations

import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.llm import LLM
from deepseek_ray.messages import GenerateRequest, SamplingParams
from tests.live_requests import kill, pid_of, row_of, wait_for

pytestmark = pytest.mark.cluster

NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 8, 240, 200
STRIKE_AFTER = 24
"""Tokens that every request has when the worker is killed."""
BLOCK_SIZE = DeploymentConfig(model_dir="m").engine.block_size


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def backend(ray_cluster: None, trained_model: Path, dtype: str) -> Iterator[ActorsBackend]:
    transport = "auto" if dtype == "float32" else "tcp"
    config = DeploymentConfig(
        model_dir=str(trained_model), dtype=dtype, transport=transport, attention_workers=2, kv_copies=True
    )
    backend = ActorsBackend(config)
    yield backend
    backend.shutdown()


@pytest.fixture(scope="module")
def prompts(backend: ActorsBackend) -> list[list[int]]:
    """No two begin alike, so nothing is found but what was copied."""
    assert backend.tokenizer is not None
    ids = backend.tokenizer.encode(inspect.getsource(textwrap))
    return [ids[131 * number :][:PROMPT_TOKENS] for number in range(2 * NUM_REQUESTS)]


def params_of(number: int) -> SamplingParams:
    return SamplingParams(temperature=0.8 * (number % 2), seed=number, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(trained_model: Path, dtype: str, prompts: list[list[int]]) -> list[list[int]]:
    with LLM(trained_model, dtype=dtype) as llm:
        outputs = llm.generate(prompts, [params_of(number) for number in range(len(prompts))])
    return [output.outputs[0].token_ids for output in outputs]


def figures(backend: ActorsBackend, worker: int) -> dict[str, float]:
    return backend.deployment.stats()[f"attention_worker/{worker}"]


def test_the_peer_computes_next_to_nothing_again(
    backend: ActorsBackend, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    wait_for(lambda: are_ready(backend, (0, 0), (1, 0)), 60)
    kill_under_requests(backend, prompts, expected, range(NUM_REQUESTS), victim=1, survivor=0)
    wait_for(lambda: are_ready(backend, (0, 0), (1, 1)), 60)
    # The process that took the victim's place keeps copies like the one before.
    later = range(NUM_REQUESTS, 2 * NUM_REQUESTS)
    kill_under_requests(backend, prompts, expected, later, victim=0, survivor=1)


def are_ready(backend: ActorsBackend, *restarts: tuple[int, int]) -> bool:
    """Whether the workers (id, restarts) take requests."""
    rows = [(row_of(backend, "attention_worker", id), count) for id, count in restarts]
    return all((row["state"], row["restarts"]) == ("ready", count) for row, count in rows)


def kill_under_requests(
    backend: ActorsBackend,
    prompts: list[list[int]],
    expected: list[list[int]],
    numbers: range,
    victim: int,
    survivor: int,
) -> None:
    before = figures(backend, survivor)
    requests = [
        GenerateRequest(
            request_id=f"{victim}-{number}",
            prompt_token_ids=prompts[number],
            params=params_of(number),
            deadline_seconds=120,
        )
        for number in numbers
    ]
    tokens: dict[int, list[int]] = defaultdict(list)
    resent: dict[int, int] = {}
    struck = False
    for event in backend.run(requests):
        number = int(event.request_id.rsplit("-", 1)[1])
        assert event.error is None
        assert event.index == len(tokens[number]), "a token was lost or repeated"
        if event.attempt > 0:
            resent.setdefault(number, event.index)
        tokens[number] += event.token_ids
        if not struck and min(len(tokens[number]) for number in numbers) >= STRIKE_AFTER:
            now = figures(backend, survivor)
            copied = now["kv_blocks_received"] - before["kv_blocks_received"]
            # Each worker is told of the other in its own time: the survivor may be the later one.
            gave = now["kv_blocks_sent"] > before["kv_blocks_sent"]
            if gave and copied >= NUM_REQUESTS // 2 * PROMPT_TOKENS // BLOCK_SIZE:
                struck = True
                kill(pid_of(backend, "attention_worker", victim))
    assert struck, "the prompts' blocks were not copied in time, or the survivor gave none"
    assert {number: tokens[number] for number in numbers} == {number: expected[number] for number in numbers}
    assert len(resent) == NUM_REQUESTS // 2, "half of them ran there"

    looked_up = NUM_REQUESTS // 2 * PROMPT_TOKENS + sum(PROMPT_TOKENS + index for index in resent.values())
    wait_for(lambda: figures(backend, survivor)["num_prefix_cache_queries"] == queries(before) + looked_up)
    after = figures(backend, survivor)
    found = after["num_prefix_cache_hits"] - before.get("num_prefix_cache_hits", 0)
    computed_again = sum(PROMPT_TOKENS + index for index in resent.values()) - found
    # The last block is not full, and the one before may have been on its way.
    print(f"{len(resent)} requests looked up, {found:g} tokens found, {computed_again:g} computed again")
    assert 0 < computed_again <= len(resent) * 2 * BLOCK_SIZE
    assert after["kv_blocks_received"] - before["kv_blocks_received"] >= found / BLOCK_SIZE


def queries(stats: dict[str, float]) -> float:
    return stats.get("num_prefix_cache_queries", 0)
