"""Structured outputs over HTTP through a deployment whose worker is killed, and what Prometheus is told of it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
from openai import OpenAI

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.config.serving import IngressConfig
from deepseek_ray.metrics import METRICS
from tests.ports import free_port

pytestmark = pytest.mark.cluster

MODEL = "trained"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 30, "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["def", "class", "import"]}, "minItems": 6, "maxItems": 8},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ANSWER_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@dataclass
class Client:
    """A strict client that keeps count of what it receives."""

    openai: OpenAI
    worker_pid: Callable[[], int]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outputs: int = 0
    aborted: int = 0

    def stream(self, seed: int, after: int = 0, strike: Callable[[], None] = lambda: None) -> tuple[str, str]:
        """Text and finish reason of one structured answer; `strike` is called once `after` chunks have come."""
        text, reason = "", ""
        chunks = self.openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Describe a person."}],
            response_format=ANSWER_FORMAT,  # type: ignore[call-overload]
            max_tokens=200,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
        )
        for number, chunk in enumerate(chunks, start=1):
            if chunk.usage is not None:
                self.prompt_tokens += chunk.usage.prompt_tokens
                self.completion_tokens += chunk.usage.completion_tokens
                self.outputs += 1
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            if number == after:
                strike()
        return text, reason

    def kill_worker(self) -> None:
        pid = self.worker_pid()
        os.kill(pid, signal.SIGKILL)
        psutil.Process(pid).wait(timeout=10) if psutil.pid_exists(pid) else None


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def client(trained_model: Path, metrics_port: int) -> Iterator[Client]:
    import ray
    from ray import serve

    from deepseek_ray.actors.deployment import start_deployment
    from deepseek_ray.serving.app import build_api_app
    from deepseek_ray.serving.auth import ApiKeys

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        num_cpus=2,
        _metrics_export_port=metrics_port,
        _system_config={"metrics_report_interval_ms": 200},
    )
    config = DeploymentConfig(
        name="structured", model_dir=str(trained_model), served_model_name=MODEL, dtype="float32", threads=2
    )
    deployment = start_deployment(config)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_api_app(config, IngressConfig(max_replicas=1), ApiKeys()), name="structured", route_prefix="/")

    def worker_pid() -> int:
        rows = deployment.status()["actors"]
        return next(row["pid"] for row in rows if row["role"] == "attention_worker")

    url = f"http://127.0.0.1:{port}/v1"
    openai = OpenAI(base_url=url, api_key="none", _strict_response_validation=True, max_retries=0)
    yield Client(openai, worker_pid)
    serve.shutdown()
    deployment.stop()
    ray.shutdown()


def test_a_structured_answer_survives_its_worker(client: Client) -> None:
    calm = client.stream(seed=5)
    text, reason = calm
    jsonschema.validate(json.loads(text), PERSON)
    assert reason == "stop"
    before = client.worker_pid()
    assert client.stream(seed=5, after=12, strike=client.kill_worker) == calm
    assert client.worker_pid() != before


def test_a_constraint_that_cannot_be_used_is_a_400(client: Client) -> None:
    reply = httpx.post(
        f"{client.openai.base_url}completions",
        json={"model": MODEL, "prompt": "x", "structured_outputs": {"regex": "(a"}},
        timeout=60,
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "structured_outputs.regex"


def test_prometheus_shows_what_the_client_received(client: Client, metrics_port: int) -> None:
    client.stream(seed=1)
    expected = {
        "ray_vllm_prompt_tokens_total": client.prompt_tokens,
        "ray_vllm_generation_tokens_total": client.completion_tokens,
        'ray_vllm_request_success_total{finished_reason="stop"}': client.outputs,
        "ray_vllm_time_to_first_token_seconds_count": client.outputs,
        "ray_vllm_e2e_request_latency_seconds_count": client.outputs,
        "ray_vllm_request_queue_time_seconds_count": client.outputs,
        "ray_vllm_inter_token_latency_seconds_count": client.completion_tokens - client.outputs,
        "ray_moe_engine_restarts": 1,
        "ray_moe_engine_up": 1,
        "ray_moe_requests_in_flight": 0,
        'ray_moe_shard_up{shard="0"}': 1,
        'ray_moe_shard_up{shard="1"}': 1,
    }
    samples: dict[str, float] = {}
    end = time.monotonic() + 20
    while time.monotonic() < end:
        samples = scrape(metrics_port)
        if {name: samples.get(name) for name in expected} == expected:
            break
        time.sleep(0.2)  # figures travel in steps of a second
    assert {name: samples.get(name) for name in expected} == expected
    assert 0 <= samples["ray_vllm_kv_cache_usage_perc"] < 1
    # Each layer sends top_k experts per token: pairs that shards computed are tokens that the gate sent.
    sent = sum(value for name, value in samples.items() if name.startswith("ray_moe_expert_tokens_total"))
    assert sent > client.completion_tokens
    assert all(samples[f'ray_moe_shard_pairs_total{{shard="{shard}"}}'] > 0 for shard in (0, 1))
    present = {name.partition("{")[0].removeprefix("ray_") for name in samples}
    histograms = {f"{name}_count" for name, metric in METRICS.items() if metric.kind == "histogram"}
    others = {name for name, metric in METRICS.items() if metric.kind != "histogram"}
    # A counter appears when it first rises.
    not_yet = {"vllm_num_preemptions_total", "moe_frames_resent_total", "moe_frames_hedged_total"}
    not_yet |= {"moe_experts_wrong_total", "vllm_prefix_cache_hits_total"}
    not_yet |= {f"vllm_spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted")}
    not_yet |= {f"moe_kv_blocks_{what}_total" for what in ("sent", "received", "dropped")}
    assert (histograms | others) - present <= not_yet


def scrape(port: int) -> dict[str, float]:
    """Samples of ours by name and those labels that tell them apart; processes that are gone still count."""
    own = {"finished_reason", "shard", "layer", "expert"}
    samples: dict[str, float] = {}
    for line in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text.splitlines():
        found = re.fullmatch(r"(ray_(?:vllm|moe)_\w+)\{(.*)\} (\S+)", line)
        if found is None or found[1].endswith("_bucket"):
            continue
        labels: dict[str, Any] = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
        kept = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()) if name in own)
        key = found[1] + (f"{{{kept}}}" if kept else "")
        is_gauge = METRICS.get(found[1].removeprefix("ray_"))
        if is_gauge is not None and is_gauge.kind == "gauge":
            samples[key] = float(found[3])
        else:
            samples[key] = samples.get(key, 0.0) + float(found[3])
    return samples
