"""Streams over HTTP at once: `deepseek-ray serve` against vLLM's server on bench-mini, and what is Serve's own share.

    python -m benchmarks.http_load [--rounds 2] [--threads 2] [--systems serve vllm]

Each stream asks for 32 tokens after a prompt of 128 random ones; 1, 4, 16 and 64 at once (vLLM up to 16: its prefill of
64 takes minutes on two cores). Time to first token, time between tokens, tokens per second over all streams. `trivial`
is a Serve application that sends bytes at once: the first of them is what no model behind Serve can beat. `small` is
`deepseek-ray serve` with a model of 4 M parameters and a prompt of 8 tokens: what is left when the model costs next
to nothing. `llm` is `LLM(backend="actors")` with the same work and no HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.bench_model import BENCH_MINI, bench_mini_dir, bench_small_dir
from benchmarks.generation import Driver
from benchmarks.peers.environments import is_there, python_of
from benchmarks.results_file import write_results

_TOKENS, _PROMPT = 32, 128
_LLM_STREAMS = 16
_START_SECONDS = 600.0


@dataclass(frozen=True)
class Case:
    """One server, its model and what is asked of it."""

    command: Callable[[Path, int, int], list[str]]
    """Model, threads, port."""
    model_dir: Callable[[], Path]
    prompt: int
    """Tokens."""
    streams: tuple[int, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    options = parser.parse_args()
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in range(options.rounds):
        for system in options.systems:
            if system == "vllm" and not is_there("vllm"):
                continue
            if system == "llm":
                samples.setdefault((system, _LLM_STREAMS), []).append(_llm(options.threads, seed))
                print(f"round {seed}: llm: {samples[system, _LLM_STREAMS][-1]}", flush=True)
                continue
            case = CASES[system]
            model_dir = case.model_dir().absolute()
            with _Server(case.command(model_dir, options.threads, port := _free_port()), port, options.threads) as url:
                asyncio.run(load(url, model_dir, case.prompt, 1, seed=1000 + seed))  # warms up
                for streams in case.streams:
                    measured = asyncio.run(load(url, model_dir, case.prompt, streams, seed))
                    samples.setdefault((system, streams), []).append(measured)
                    print(f"round {seed}: {system}, {streams} streams: {measured}", flush=True)
    rows = [
        {
            "system": system,
            "streams": streams,
            "prompt": _PROMPT if system == "llm" else CASES[system].prompt,
            **{name: _median(found, name) for name in found[0]},
        }
        for (system, streams), found in samples.items()
    ]
    write_results("http_load", {"tokens": _TOKENS, "threads": options.threads, "rounds": options.rounds, "rows": rows})


async def load(url: str, model_dir: Path, prompt: int, streams: int, seed: int) -> dict[str, float]:
    """Milliseconds and tokens per second of so many streams at once."""
    async with httpx.AsyncClient(timeout=600.0, limits=httpx.Limits(max_connections=None)) as client:
        started = time.perf_counter()
        chances = [random.Random(f"{seed}-{streams}-{own}") for own in range(streams)]
        times = await asyncio.gather(*(_stream(client, url, model_dir, prompt, chance) for chance in chances))
        seconds = time.perf_counter() - started
    first = sorted(own[0] - started for own in times)
    gaps = sorted(later - earlier for own in times for earlier, later in itertools.pairwise(own))
    found = {"first_p50": _at(first, 0.5), "first_p90": _at(first, 0.9)}
    found |= {"gap_p50": _at(gaps, 0.5), "gap_p90": _at(gaps, 0.9)} if gaps else {}
    found = {f"{name}_milliseconds": 1000 * value for name, value in found.items()}
    return {**found, "tokens_per_second": sum(map(len, times)) / seconds}


async def _stream(
    client: httpx.AsyncClient, url: str, model_dir: Path, prompt: int, chance: random.Random
) -> list[float]:
    """When each chunk with a token came."""
    body = {
        "model": model_dir.name,
        "prompt": [chance.randrange(BENCH_MINI.vocab_size) for _ in range(prompt)],
        "max_tokens": _TOKENS,
        "temperature": 1.0,
        "seed": chance.randrange(1 << 30),
        "ignore_eos": True,
        "stream": True,
    }
    times = []
    async with client.stream("POST", url, json=body) as answer:
        if answer.status_code != 200:
            raise SystemExit(f"{url} answered {answer.status_code}: {(await answer.aread()).decode()[:500]}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.perf_counter())
    return times


class _Server:
    """One system's server on a free port; the address of its completions."""

    def __init__(self, command: list[str], port: int, threads: int) -> None:
        self._port = port
        self._health = f"http://127.0.0.1:{port}/health"
        variables = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **variables}
        )

    def __enter__(self) -> str:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SystemExit(f"{self._process.args} ended with {self._process.returncode}")
            try:
                if httpx.get(self._health, timeout=2.0).status_code == 200:
                    return f"http://127.0.0.1:{self._port}/v1/completions"
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"{self._process.args} was not ready after {_START_SECONDS:g} s")

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


def _serve(model_dir: Path, threads: int, port: int) -> list[str]:
    command = [sys.executable, "-m", "deepseek_ray.cli.main", "serve", str(model_dir), "--port", str(port)]
    return [*command, "--threads", str(threads), "--no-prefix-caching", "--expert-replicas", "2"]


def _vllm(model_dir: Path, threads: int, port: int) -> list[str]:
    command = [str(python_of("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    command += ["--served-model-name", model_dir.name, "--port", str(port), "--dtype", "bfloat16"]
    return [*command, "--max-model-len", "1024", "--no-enable-prefix-caching"]


def _trivial(model_dir: Path, threads: int, port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.trivial_stream", str(port)]


CASES = {
    "trivial": Case(_trivial, Path, 8, (1,)),
    "small": Case(_serve, bench_small_dir, 8, (1,)),
    "serve": Case(_serve, bench_mini_dir, _PROMPT, (1, 4, 16, 64)),
    "vllm": Case(_vllm, bench_mini_dir, _PROMPT, (1, 4, 16)),
}
SYSTEMS = ("trivial", "small", "serve", "llm", "vllm")


def _llm(threads: int, seed: int) -> dict[str, float]:
    driver = Driver("actors", bench_mini_dir(), threads)
    driver.measure(sequences=1, prompt=_PROMPT, tokens=_TOKENS, seed=1000 + seed)  # warms up
    found = driver.measure(sequences=_LLM_STREAMS, prompt=_PROMPT, tokens=_TOKENS, seed=seed)
    driver.close()
    first, steps = 1000 * found["prefill"], sorted(1000 * step for step in found["steps"])
    times = {"first_p50": first, "first_p90": first, "gap_p50": _at(steps, 0.5), "gap_p90": _at(steps, 0.9)}
    seconds = found["prefill"] + sum(found["steps"])
    rows = {f"{name}_milliseconds": value for name, value in times.items()}
    return {**rows, "tokens_per_second": _LLM_STREAMS * _TOKENS / seconds}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _at(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _median(found: list[dict[str, Any]], name: str) -> float:
    return statistics.median(each[name] for each in found)


if __name__ == "__main__":
    main()
