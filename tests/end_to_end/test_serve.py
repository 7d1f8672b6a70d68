"""`deepseek-ray serve` as a user runs it: a real process, a real Ray cluster, real HTTP, and real kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import OpenAI

from deepseek_ray.kernels.build import cache_directory
from deepseek_ray.llm import LLM
from deepseek_ray.messages import SamplingParams
from tests.ports import free_port

pytestmark = pytest.mark.cluster

PROMPT = "def __init__(self, "
NAME = "under-test"
REPORT_SECONDS = 0.5
"""Workers report twice a second, so what the router knows is up to that much older."""


@dataclass
class Served:
    process: subprocess.Popen[str]
    port: int
    ready_line: str
    environment: dict[str, str]
    errors: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deepseek_ray.cli.main", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False, timeout=120)

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--name", NAME, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key="none", _strict_response_validation=True, max_retries=0)

    def stream(self, num_tokens: int) -> Any:
        """Chunks of a completion."""
        return self.client().completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=num_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )


@pytest.fixture(scope="module")
def served(trained_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = free_port()
    state = tmp_path_factory.mktemp("state")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(state), "XDG_CACHE_HOME": str(state / "cache")}
    environment["DEEPSEEK_RAY_CACHE"] = str(cache_directory())  # the kernels are built already
    environment.pop("RAY_ADDRESS", None)
    options = ["--port", str(port), "--name", NAME, "--dtype", "float32", "--served-model-name", "tiny"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deepseek_ray.cli.main", "serve", str(trained_model), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    stderr = process.stderr
    reader = threading.Thread(target=lambda: errors.extend(stderr), daemon=True)
    reader.start()
    line = process.stdout.readline()
    assert line, "".join(errors)
    yield Served(process, port, line, environment, errors)
    if process.poll() is None:
        process.terminate()
        process.wait(timeout=60)
    reader.join()
    process.stdout.close()
    process.stderr.close()


@pytest.fixture(scope="module")
def expected(trained_model: Path) -> str:
    with LLM(trained_model, dtype="float32") as llm:
        (output,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=160, ignore_eos=True))
    return output.outputs[0].text


def test_it_says_ready_and_is(served: Served) -> None:
    assert served.ready_line == f"ready {served.url}/v1\n"
    assert httpx.get(served.url + "/health").status_code == 200
    assert httpx.get(served.url + "/ready").status_code == 200
    assert [model.id for model in served.client().models.list()] == ["tiny"]


def test_completions_equal_the_local_engine(served: Served, expected: str) -> None:
    whole = served.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=160, temperature=0, extra_body={"ignore_eos": True}
    )
    assert whole.choices[0].text == expected
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 160
    assert "".join(chunk.choices[0].text for chunk in served.stream(160)) == expected


def test_chat_streams_and_does_not(served: Served) -> None:
    client = served.client()
    messages: Any = [{"role": "user", "content": "import os"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_status_lists_every_process(served: Served) -> None:
    shown = served.status()
    assert set(shown) == {"epoch", "actors"}
    roles = [(row["role"], row["id"]) for row in shown["actors"]]
    assert sorted(roles) == [("attention_worker", 0), ("expert_shard", 0), ("expert_shard", 1), ("router", 0)]
    for row in shown["actors"]:
        assert set(row) == {"role", "id", "pid", "node_id", "state", "restarts"}
        assert psutil.pid_exists(row["pid"])
        assert (row["state"], row["restarts"]) == ("ready", 0)


@pytest.mark.timeout(90)
def test_killing_a_shard_in_mid_stream_changes_nothing_for_the_client(served: Served, expected: str) -> None:
    victim = next(row["pid"] for row in served.status()["actors"] if row["role"] == "expert_shard")
    texts: list[str] = []
    killed_after = 0
    for chunk in served.stream(160):
        texts.append(chunk.choices[0].text)
        if len(texts) == 8:
            os.kill(victim, signal.SIGKILL)
            killed_after = len(texts)
        if len(texts) > 8:
            assert httpx.get(served.url + "/ready").status_code == 200
    assert 0 < killed_after < len(texts)
    assert "".join(texts) == expected
    with watched(served) as reports:
        assert next(resent for _, _, resent in reports if resent) >= 1
    restarts = {row["id"]: row["restarts"] for row in served.status()["actors"] if row["role"] == "expert_shard"}
    assert sorted(restarts.values()) == [0, 1]


def test_a_second_server_of_the_name_or_the_port_is_told_so(served: Served, trained_model: Path) -> None:
    same_name = served.command("serve", str(trained_model), "--name", NAME, "--port", str(free_port()))
    assert same_name.returncode == 1
    assert NAME in same_name.stderr
    assert "Traceback" not in same_name.stderr
    same_port = served.command("serve", str(trained_model), "--name", "other", "--port", str(served.port))
    assert same_port.returncode == 1
    assert str(served.port) in same_port.stderr
    assert "Traceback" not in same_port.stderr
    assert not same_name.stdout
    assert not same_port.stdout


@pytest.mark.timeout(120)
def test_a_client_that_leaves_frees_its_blocks_within_a_second(served: Served) -> None:
    # Sixteen sequences of 480 tokens run for seconds: long enough to be seen running, and to be cut short. The best of
    # three tries counts: between other processes of this machine a report may come late, the promise is about ours.
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, "n": 16, "ignore_eos": True}
    with watched(served) as reports, httpx.Client() as client:

        def leave_a_stream() -> float:
            with client.stream("POST", served.url + "/v1/completions", json={**body, "stream": True}) as response:
                lines = response.iter_lines()  # kept: httpx closes the connection with its last iterator
                assert next(lines)
                assert next(used for _, used, _ in reports if used)
            return seconds_until_freed(reports)

        def leave_an_answer() -> float:
            with pytest.raises(httpx.ReadTimeout):
                client.post(served.url + "/v1/completions", json=body, timeout=1.0)
            assert next(used for _, used, _ in reports if used)
            return seconds_until_freed(reports)

        for leave in (leave_a_stream, leave_an_answer):
            assert any(leave() < 1 + REPORT_SECONDS for _ in range(3)), leave.__name__


def seconds_until_freed(reports: Iterator[tuple[float, float, float]]) -> float:
    left = time.monotonic()
    return next(when for when, used, _ in reports if when > left and not used) - left


WATCH = """
import sys, time, ray
from deepseek_ray.actors.record import ask_router

ray.init(address=sys.argv[1], log_to_driver=False)
while True:
    worker = ask_router(sys.argv[2], "stats")["attention_worker/0"]
    print(time.monotonic(), worker["num_kv_blocks_used"], worker["frames_resent"], flush=True)
    time.sleep(0.02)
"""


@contextlib.contextmanager
def watched(served: Served) -> Iterator[Iterator[tuple[float, float, float]]]:
    """(monotonic seconds, KV blocks in use, frames sent again), over and over, as the worker reports them."""
    (state_file,) = Path(served.environment["XDG_RUNTIME_DIR"]).rglob("*.json")
    assert state_file.stat().st_mode & 0o777 == 0o600
    state = json.loads(state_file.read_text())
    process = subprocess.Popen(
        [sys.executable, "-c", WATCH, state["address"], NAME],
        stdout=subprocess.PIPE,
        text=True,
        env={**served.environment, "RAY_AUTH_MODE": state["auth_mode"]},
    )
    assert process.stdout is not None
    lines = process.stdout
    try:
        assert lines.readline()
        yield ((float(when), float(used), float(resent)) for when, used, resent in map(str.split, lines))
    finally:
        process.kill()
        process.wait()
        lines.close()


def test_sigterm_ends_everything_and_exits_with_0(served: Served) -> None:
    family = psutil.Process(served.process.pid).children(recursive=True)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=60) == 0, "".join(served.errors)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert served.process.stdout is not None
    assert served.process.stdout.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url + "/health")
    assert served.command("status", "--name", NAME).returncode == 1
