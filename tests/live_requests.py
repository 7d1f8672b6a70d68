"""Requests that run while something is done to the deployment under them, and what became of their tokens."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.llm import LLM
from deepseek_ray.messages import GenerateRequest, SamplingParams, TokenEvent

PROMPTS = [
    "def __init__(self, ",
    "import os\n\nclass Path",
    "    return",
    "for line in",
    "if name ==",
    "try:\n    ",
    "# This",
    '"""Test that',
    "class Error(Exception):",
    "x = 0x7f\n",
    "while True:\n",
    "Copyright (c)",
    "@property\n",
    "a, b = ",
]
"""Enough texts that one wrong expert shows in them: see test_experts_matter."""
NUM_TOKENS = 80
WORK = [
    (text, SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS, seed=index, ignore_eos=True))
    for temperature in (0.0, 0.8)
    for index, text in enumerate(PROMPTS)
]


def requests_for(backend: ActorsBackend, tag: str) -> list[GenerateRequest]:
    """Every prompt twice, greedy and sampled with a seed: both must survive."""
    assert backend.tokenizer is not None
    return [
        GenerateRequest(
            request_id=f"{tag}-{index}",
            prompt_token_ids=backend.tokenizer.encode(text),
            params=params,
            deadline_seconds=120,
        )
        for index, (text, params) in enumerate(WORK)
    ]


def expected_tokens(model: Path, dtype: str) -> dict[int, list[int]]:
    with LLM(model, dtype=dtype) as llm:
        outputs = llm.generate([text for text, _ in WORK], [params for _, params in WORK])
    return {index: output.outputs[0].token_ids for index, output in enumerate(outputs)}


class Watched:
    """Runs requests, calls `strike` once after a few tokens of each, and counts tokens on both sides of it."""

    def __init__(self, backend: ActorsBackend, tag: str, strike: Callable[[], None]) -> None:
        self.before = self.after = 0
        self.resent: dict[int, int] = {}
        """For each request that was sent again: the tokens it had by then."""
        self.errors: list[str] = []
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.text: dict[int, str] = defaultdict(str)
        struck = False
        for event in backend.run(requests_for(backend, tag)):
            self._take(event)
            if struck:
                self.after += len(event.token_ids)
            else:
                self.before += len(event.token_ids)
            if not struck and min(len(self.tokens[index]) for index in range(len(WORK))) >= 6:
                struck = True
                strike()

    def _take(self, event: TokenEvent) -> None:
        index = int(event.request_id.rsplit("-", 1)[1])
        if event.error:
            self.errors.append(event.error)
        assert event.index == len(self.tokens[index]), "a token was lost or repeated"
        if event.attempt > 0:
            self.resent.setdefault(index, event.index)
        self.tokens[index] += event.token_ids
        self.text[index] += event.text


def row_of(backend: ActorsBackend, role: str, id: int = 0) -> dict[str, Any]:
    rows = backend.deployment.status()["actors"]
    return next(row for row in rows if row["role"] == role and row["id"] == id)


def pid_of(backend: ActorsBackend, role: str, id: int = 0) -> int:
    return row_of(backend, role, id)["pid"]


def restarts_of(backend: ActorsBackend, role: str, id: int = 0) -> int:
    return row_of(backend, role, id)["restarts"]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    psutil.Process(pid).wait(timeout=10) if psutil.pid_exists(pid) else None


def assert_unharmed(watched: Watched, expected: dict[int, list[int]]) -> None:
    assert not watched.errors
    assert watched.before > 0
    assert watched.after > 0
    assert dict(watched.tokens) == expected


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Reports arrive twice a second: look until they did."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.1)
