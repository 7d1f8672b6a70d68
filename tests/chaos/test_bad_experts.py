"""Experts that crash over one request, or whose weights go bad in memory: real shards, real requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ray.engine.offline import tokenizer_beside
from deepseek_ray.llm import LLM
from deepseek_ray.messages import SamplingParams
from deepseek_ray.models.expert_store import LocalExperts
from tests.live_requests import PROMPTS

pytestmark = [pytest.mark.cluster, pytest.mark.apart]

MUTANTS = Path(__file__).parent / "mutants"
NUM_TOKENS = 40
POISONED = "raise SystemExit"

# Runs prompts at once through actors; prints what came of each, and the figures of all members.
PROGRAM = """
import json, sys, time
from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.messages import GenerateRequest, SamplingParams

backend = ActorsBackend(DeploymentConfig(model_dir=sys.argv[1], dtype="float32"))
params = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)
requests = [
    GenerateRequest(request_id=text, prompt_token_ids=backend.tokenizer.encode(text), params=params)
    for text in json.loads(sys.argv[3])
]
outcomes = {request.request_id: {"tokens": [], "error": None} for request in requests}
for event in backend.run(requests):
    outcome = outcomes[event.request_id]
    assert event.index == len(outcome["tokens"])
    outcome["tokens"] += event.token_ids
    outcome["error"] = event.error_kind and f"{event.error_kind}: {event.error}"
end = time.monotonic() + 30  # a crash is answered before Ray has started the process again
while (restarts := sum(row["restarts"] for row in backend.deployment.status()["actors"])) < int(sys.argv[4]):
    assert time.monotonic() < end, f"{restarts} restarts after 30 s"
    time.sleep(0.2)
time.sleep(1.5)  # members report twice a second
reloaded = sum(figures.get("experts_reloaded", 0) for figures in backend.deployment.stats().values())
backend.shutdown()
print(json.dumps({"outcomes": outcomes, "restarts": restarts, "reloaded": reloaded}))
"""


def run(model: Path, prompts: list[str], *, restarts: int = 0, **environment: str) -> tuple[dict[str, Any], str]:
    """What the program printed once there were that many restarts, and what was said on the way."""
    path = os.pathsep.join(filter(None, [str(MUTANTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), str(NUM_TOKENS), json.dumps(prompts), str(restarts)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def expected(model: Path, prompts: list[str]) -> dict[str, list[int]]:
    with LLM(model, dtype="float32") as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
    return {prompt: list(output.outputs[0].token_ids) for prompt, output in zip(prompts, outputs, strict=True)}


def last_row(model: Path, prompt: str, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Activations [hidden] with which the first layer of experts computes the prompt's last token."""
    seen: list[torch.Tensor] = []
    dispatch = LocalExperts.dispatch

    def remember(self: LocalExperts, layer: int, hidden: torch.Tensor, *others: Any) -> Any:
        seen.append(hidden.clone())
        return dispatch(self, layer, hidden, *others)

    with monkeypatch.context() as patch, LLM(model, dtype="float32") as llm:
        patch.setattr(LocalExperts, "table", lambda *_: None)  # which dispatches nothing
        patch.setattr(LocalExperts, "dispatch", remember)
        llm.generate([prompt], SamplingParams(max_tokens=1))
    tokenizer = tokenizer_beside(str(model))
    assert tokenizer is not None
    assert len(seen[0]) == len(tokenizer.encode(prompt))
    return seen[0][-1]


def test_a_request_that_crashes_shards_fails_and_no_other(trained_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = last_row(trained_model, POISONED, monkeypatch).numpy().tobytes().hex()
    wanted = expected(trained_model, PROMPTS)
    printed, said = run(trained_model, [*PROMPTS, POISONED], restarts=2, MUTANT="poison", POISON=poison)
    outcomes = printed["outcomes"]
    poisoned = outcomes.pop(POISONED)
    assert poisoned["tokens"] == []
    assert "crashed the process of its experts twice" in poisoned["error"], said
    assert outcomes == {prompt: {"tokens": tokens, "error": None} for prompt, tokens in wanted.items()}
    assert 2 <= printed["restarts"] <= 4  # its experts may be on both shards, and fall with both twice


@pytest.mark.slow
def test_weights_that_go_bad_are_read_anew_and_no_token_is_wrong(trained_model: Path) -> None:
    printed, _ = run(trained_model, PROMPTS, MUTANT="bad")
    wanted = expected(trained_model, PROMPTS)
    assert printed["outcomes"] == {prompt: {"tokens": tokens, "error": None} for prompt, tokens in wanted.items()}
    assert printed["restarts"] == 0
    assert printed["reloaded"] >= 2, "at least one on each shard"
