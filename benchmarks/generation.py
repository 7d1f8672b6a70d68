"""Prefill and decode speed of `LLM` (local, actors, int8, int4) against transformers, llama.cpp and vLLM on bench-mini.

    python -m benchmarks.generation [--rounds 3] [--threads 2] [--systems local llama.cpp ...]

Every round starts the systems anew. Those that fit into memory together take turns case by case (A B C, A B C, ...),
since a machine's speed changes within minutes; the others follow alone. The table holds medians over rounds and turns
of the median step. Peers that are not installed are left out with a word: python -m benchmarks.peers.setup.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench_model import BENCH_MINI, bench_mini_dir
from benchmarks.peers.environments import gguf_of, is_there, python_of
from benchmarks.results_file import write_results
from benchmarks.roofline import Probes, probe, step_seconds

CASES = ((1, 128, 24), (8, 128, 12), (32, 32, 8))
"""(sequences, prompt tokens, output tokens)."""
WARM_UP = {"sequences": 2, "prompt": 8, "tokens": 4, "seed": 0}
PEERS = {"llama.cpp": "llama_cpp", "vllm": "vllm", "llama.cpp Q8_0": "llama_cpp", "llama.cpp Q4_0": "llama_cpp"}
"""Name in the table -> environment."""
GROUPS = (
    *(("llama.cpp", "local", "actors"), ("bfloat16", "int8", "int4", "llama.cpp Q8_0", "llama.cpp Q4_0")),
    *(("transformers",), ("vllm",), ("fast",)),
)
"""Systems that are in memory at once; "bfloat16" is "local" once more, beside weights of fewer bits."""
SYSTEMS = tuple(system for group in GROUPS for system in group)
_TURNS = 2
"""Of each case and system in a round."""


class Driver:
    """One system in a process of its own."""

    def __init__(self, system: str, model_dir: Path, threads: int, **environment: str) -> None:
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        started = time.perf_counter()
        self._process = subprocess.Popen(
            _command(system, model_dir, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **variables, **environment},
        )
        self.process = psutil.Process(self._process.pid)
        self._answer()
        self.start_seconds = time.perf_counter() - started

    def measure(self, **request: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a driver ended with status {self._process.wait()}")
        return json.loads(line)


def _command(system: str, model_dir: Path, threads: int) -> list[str]:
    if system not in PEERS:
        return [sys.executable, "-m", "benchmarks.generation_drivers", system, str(model_dir), str(threads)]
    peer = PEERS[system]
    model = gguf_of(model_dir, system.partition(" ")[2]) if peer == "llama_cpp" else model_dir
    return [str(python_of(peer)), f"benchmarks/peers/{peer}_driver.py", str(model), str(threads)]


def main() -> None:
    options = read_options(__doc__, SYSTEMS)
    result = measure(options.systems, options.rounds, options.threads)
    for row in result["rows"]:
        print(
            f"{row['system']:>12}  {row['sequences']:>2} sequences  prefill {row['prefill_tokens_per_second']:7.1f}  "
            f"decode {row['decode_tokens_per_second']:7.1f} tokens/s"
        )
    path = write_results("generation", result)
    plot(result["rows"], result["roofline_step_milliseconds"], path.with_suffix(".png"))


def read_options(description: str | None, systems: Sequence[str]) -> argparse.Namespace:
    """`rounds`, `threads` and `systems` of the command line, less the peers that are not installed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems)
    options = parser.parse_args()
    options.systems = [name for name in options.systems if name not in PEERS or is_there(PEERS[name])]
    return options


def measure(systems: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """What the results file holds: a row for each case and system, seconds to ready, and the machine's limits."""
    model_dir = bench_mini_dir()
    samples: dict[tuple[str, int], list[dict[str, Any]]] = {}
    starts: dict[str, list[float]] = {}
    probes: list[Probes] = []
    for seed in range(1, rounds + 1):
        for group in GROUPS:
            drivers = {system: Driver(system, model_dir, threads) for system in group if system in systems}
            if not drivers:
                continue
            for system, driver in drivers.items():
                starts.setdefault(system, []).append(driver.start_seconds)
                print(f"round {seed}: {system}, ready after {driver.start_seconds:.1f} s", flush=True)
                driver.measure(**WARM_UP)
            for (sequences, prompt, tokens), turn in itertools.product(CASES, range(_TURNS)):
                if "local" in group:
                    probes.append(probe(threads))  # takes its turn: the limit is as unsteady as what it limits
                for system, driver in drivers.items():
                    request = {"sequences": sequences, "prompt": prompt, "tokens": tokens, "seed": seed + 100 * turn}
                    samples.setdefault((system, sequences), []).append(driver.measure(**request))
            for driver in drivers.values():
                driver.close()
    return {
        "threads": threads,
        "rounds": rounds,
        "rows": [_row(system, case, samples[system, case[0]]) for case in CASES for system in systems],
        "ready_seconds": {system: statistics.median(seconds) for system, seconds in starts.items()},
        "roofline_step_milliseconds": {
            sequences: _bound(probes, sequences, prompt + tokens // 2) for sequences, prompt, tokens in CASES
        },
        "probes": [each._asdict() for each in probes],
    }


def plot(rows: list[dict[str, Any]], bounds: dict[int, float], path: Path) -> None:
    """Decode, with the machine's limit as a line, and prefill of every system at every number of sequences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(bounds), figsize=(11, 7.2), layout="constrained")
    for column, (sequences, bound) in enumerate(bounds.items()):
        own = [row for row in rows if row["sequences"] == sequences]
        colours = ["tab:grey" if row["system"] in ("transformers", *PEERS) else "tab:blue" for row in own]
        names = [row["system"] for row in own]
        for axis, phase in zip(axes[:, column], ("decode", "prefill"), strict=True):
            bars = axis.barh(names, [row[f"{phase}_tokens_per_second"] for row in own], color=colours)
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
            axis.set_xlabel(f"{phase} tokens/s")
            axis.invert_yaxis()
            axis.margins(x=0.15)
        limit = 1000 * sequences / bound
        axes[0, column].axvline(limit, color="black", linewidth=1, linestyle="--", label="limit, bfloat16")
        axes[0, column].set_title(f"{sequences} sequence{'s' if sequences > 1 else ''}")
        axes[1, column].set_title(f"{own[0]['sequences']} x {own[0]['prompt']}")
    axes[0, 0].legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=110)


def _bound(probes: list[Probes], sequences: int, context: int) -> float:
    """Milliseconds, median over rounds."""
    return 1000 * statistics.median(step_seconds(BENCH_MINI, sequences, context, each) for each in probes)


def _row(system: str, case: tuple[int, int, int], samples: list[dict[str, Any]]) -> dict[str, Any]:
    sequences, prompt, _ = case
    step = statistics.median(statistics.median(sample["steps"]) for sample in samples)
    prefill = statistics.median(sample["prefill"] for sample in samples)
    return {
        "system": system,
        "sequences": sequences,
        "prompt": prompt,
        "prefill_tokens_per_second": sequences * prompt / prefill,
        "decode_tokens_per_second": sequences / step,
        "decode_step_milliseconds": step * 1000,
    }


if __name__ == "__main__":
    main()
