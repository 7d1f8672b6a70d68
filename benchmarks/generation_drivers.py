"""One process per system under test: `python -m benchmarks.generation_drivers SYSTEM MODEL_DIR THREADS`.

Reads one JSON request a line, `{"sequences": n, "prompt": p, "tokens": t, "seed": s}`, and answers with the seconds of
the prefill and of every decode step. Every sequence samples at temperature 1: greedy decoding of a random model
collapses onto one token, hence onto few experts.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.engine.offline import LocalBackend, OfflineBackend
from deepseek_ray.messages import GenerateRequest, SamplingParams, TokenEvent

Measure = Callable[[dict[str, Any]], dict[str, Any]]


def main() -> None:
    system, model_dir, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    measure = DRIVERS[system](model_dir, threads)
    print(json.dumps({"ready": system}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)


def transformers_driver(model_dir: str, threads: int) -> Measure:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def measure(request: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(request["seed"])
        ids = torch.tensor(prompts(request))
        seconds, cache = [], None
        for _ in range(request["tokens"]):
            started = time.perf_counter()
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            seconds.append(time.perf_counter() - started)
        return {"prefill": seconds[0], "steps": seconds[1:]}

    return measure


def local_driver(model_dir: str, threads: int, **changes: Any) -> Measure:
    return measure_backend(LocalBackend(local_config(model_dir, threads).model_copy(update=changes)))


def fast_driver(model_dir: str, threads: int) -> Measure:
    engine = local_config(model_dir, threads).engine.model_copy(update={"deterministic": False})
    return local_driver(model_dir, threads, engine=engine)


def actors_driver(model_dir: str, threads: int) -> Measure:
    from deepseek_ray.actors.offline import ActorsBackend

    return measure_backend(ActorsBackend(actors_config(model_dir, threads)))


def one_replica_driver(model_dir: str, threads: int) -> Measure:
    """Each of two shards has its half of the experts."""
    from deepseek_ray.actors.offline import ActorsBackend

    return measure_backend(ActorsBackend(local_config(model_dir, threads)))


DRIVERS: dict[str, Callable[[str, int], Measure]] = {
    "transformers": transformers_driver,
    "local": local_driver,
    "bfloat16": local_driver,
    "actors": actors_driver,
    "one replica": one_replica_driver,
    "fast": fast_driver,
    "int8": functools.partial(local_driver, quantization="int8"),
    "int4": functools.partial(local_driver, quantization="int4"),
}


def prompts(request: dict[str, Any], vocab_size: int = 32000) -> list[list[int]]:
    generator = torch.Generator().manual_seed(request["seed"])
    return torch.randint(vocab_size, (request["sequences"], request["prompt"]), generator=generator).tolist()


def local_config(model_dir: str, threads: int) -> DeploymentConfig:
    # Rounds repeat their prompts, and each is to be computed.
    engine = EngineConfig(max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=1024, prefix_caching=False)
    return DeploymentConfig(model_dir=model_dir, dtype="bfloat16", threads=threads, engine=engine)


def actors_config(model_dir: str, threads: int) -> DeploymentConfig:
    """Two shards that hold all experts: on one node they share the memory of the packed files."""
    return local_config(model_dir, threads).model_copy(update={"expert_replicas": 2})


def measure_backend(backend: OfflineBackend) -> Measure:
    def measure(request: dict[str, Any]) -> dict[str, Any]:
        requests = [
            GenerateRequest(
                request_id=f"{request['seed']}-{index}-{time.monotonic_ns()}",
                prompt_token_ids=ids,
                params=SamplingParams(max_tokens=request["tokens"], seed=index, ignore_eos=True),
            )
            for index, ids in enumerate(prompts(request))
        ]
        started = time.perf_counter()
        times = list(_full_steps(backend.run(requests), request["sequences"]))
        return {"prefill": times[0] - started, "steps": [b - a for a, b in itertools.pairwise(times)]}

    return measure


def _full_steps(events: Iterator[TokenEvent], sequences: int) -> Iterator[float]:
    """The time at which every sequence has its k-th token, for k = 1, 2, ..."""
    counts: dict[str, int] = {}
    done = 0
    for event in events:
        assert event.error is None, event.error
        counts[event.request_id] = counts.get(event.request_id, 0) + len(event.token_ids)
        if len(counts) == sequences and min(counts.values()) > done:
            done = min(counts.values())
            yield time.perf_counter()


if __name__ == "__main__":
    main()
