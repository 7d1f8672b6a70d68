"""Where the time of a decode step goes, on bench-mini in bfloat16.

    python -m benchmarks.step_profile [--threads 2]

In one process: milliseconds of each part of a step and how fast it reads its weights, beside reading memory with torch;
what is left is Python and torch between the parts. Through actors (1 attention worker, 2 shards that hold
all experts): the step, what the shards compute of it, and what the worker waits for them beyond that.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.bench_model import bench_mini_dir
from benchmarks.generation_drivers import actors_config, local_config, measure_backend
from benchmarks.results_file import write_results
from benchmarks.roofline import probe
from deepseek_ray.actors.offline import ActorsBackend
from deepseek_ray.engine.offline import LocalBackend
from deepseek_ray.kernels.base import PackedWeight
from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.native_attention import NativeAttention
from deepseek_ray.kernels.native_moe import ExpertTable, NativeMoe
from deepseek_ray.kernels.select import default_kernels

SEQUENCES = (1, 8, 32)
_PROMPT, _TOKENS = 16, 24
_REPORT_SECONDS = 1.2
"""Members report twice a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    rows = [*_local(threads), *_actors(threads)]
    for row in rows:
        print(row)
    write_results("step_profile", {"threads": threads, "rows": rows})


def _local(threads: int) -> list[dict[str, Any]]:
    backend = LocalBackend(local_config(str(bench_mini_dir()), threads))
    measure = measure_backend(backend)
    measure({"sequences": 2, "prompt": 8, "tokens": 4, "seed": 0})
    clock = _Clock()
    rows = []
    for sequences in SEQUENCES:
        reads = probe(threads).bytes_per_second
        clock.start()
        steps = measure({"sequences": sequences, "prompt": _PROMPT, "tokens": _TOKENS, "seed": 1})["steps"]
        rows.append(
            {
                "system": "local",
                "sequences": sequences,
                "step_milliseconds": 1000 * statistics.median(steps),
                "read_gigabytes_per_second": reads / 1e9,
                "operators": clock.per_step(_TOKENS - 1),
            }
        )
    backend.shutdown()
    return rows


class _Clock:
    """Times the operators of the C++ kernels in this process, and counts the bytes of weights that each reads."""

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[float, Callable[[], int]]]] = defaultdict(list)
        self._kernels = default_kernels()
        for owner, name, part, size in (
            (NativeAttention, "__call__", "attention", _attention_bytes),
            (NativeMoe, "__call__", "moe", self._moe_bytes),
            (NativeKernels, "mlp", "dense network", lambda _, x, *weights: sum(weight.nbytes for weight in weights)),
            (NativeKernels, "linear", "head", lambda _, x, weight, dtype: weight.nbytes),
            (NativeKernels, "rms_norm", "last norm", lambda *_: 0),
            (NativeKernels, "draw", "draw", lambda *_: 0),
        ):
            setattr(owner, name, self._timed(part, getattr(owner, name), size))

    def start(self) -> None:
        self._calls.clear()

    def per_step(self, steps: int) -> dict[str, dict[str, float]]:
        """Of the last `steps`: milliseconds, calls, gigabytes read per second. The prefill came before them."""
        found = {}
        for name, calls in self._calls.items():
            each = len(calls) // (steps + 1)  # as many calls in the prefill as in a step
            own = calls[-each * steps :]
            seconds, num_bytes = sum(call[0] for call in own), sum(size() for _, size in own)
            found[name] = {
                "milliseconds": 1000 * seconds / steps,
                "calls": len(own) / steps,
                "gigabytes_per_second": num_bytes / seconds / 1e9,
            }
        return found

    def _timed(self, part: str, operator: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = operator(*arguments)
            self._calls[part].append((time.perf_counter() - started, functools.partial(size, *arguments)))
            return result

        return timed

    def _moe_bytes(self, moe: NativeMoe, hidden: torch.Tensor, normed: torch.Tensor, table: ExpertTable) -> int:
        """Afterwards: the gate's choice is made again for it."""
        own = moe.weights
        chosen = self._kernels.route(normed, own.gate, own.kind, own.bias, own.choice)
        assert chosen is not None
        experts = 3 * table.like.nbytes * len(torch.unique(chosen[0]))  # gate and up are twice as large as down
        return experts + sum(weight.nbytes for weight in (own.gate, *(own.shared or ())))


def _attention_bytes(attention: NativeAttention, *_: Any) -> int:
    return sum(part.nbytes for part in attention.weights if isinstance(part, PackedWeight))


def _actors(threads: int) -> list[dict[str, Any]]:
    backend = ActorsBackend(actors_config(str(bench_mini_dir()), threads))
    measure = measure_backend(backend)
    measure({"sequences": 2, "prompt": 8, "tokens": 4, "seed": 0})
    rows = []
    for sequences in SEQUENCES:
        before = _shards(backend)
        request = {"sequences": sequences, "prompt": 1, "tokens": _TOKENS, "seed": 1}  # the prefill is as a step
        found = measure(request)
        after = _shards(backend)
        computed = [1000 * (after[shard] - before[shard]) / _TOKENS for shard in before]
        rows.append(
            {
                "system": "actors",
                "sequences": sequences,
                "step_milliseconds": 1000 * statistics.median(found["steps"]),
                "computed_by_shards": computed,
            }
        )
    backend.shutdown()
    return rows


def _shards(backend: ActorsBackend) -> dict[str, float]:
    """Seconds that each shard has computed."""
    time.sleep(_REPORT_SECONDS)
    stats = backend.deployment.stats()
    return {member: figures["compute_seconds"] for member, figures in stats.items() if "compute_seconds" in figures}


if __name__ == "__main__":
    main()
