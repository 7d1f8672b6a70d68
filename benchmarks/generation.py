"""Prefill and decode speed of `LLM` (local and actors) against transformers on bench-mini, in one run.

    python -m benchmarks.generation [--rounds 3] [--threads 2]

Rounds are interleaved (A B C, A B C, ...); the table holds medians over rounds of the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_model import bench_mini_dir
from benchmarks.results_file import write_results

CASES = ((1, 128, 24), (8, 128, 16), (32, 128, 8))
"""(sequences, prompt tokens, output tokens)."""
SYSTEMS = ("transformers", "local", "actors")


class Driver:
    """One system in a process of its own, alive for the whole run."""

    def __init__(self, system: str, model_dir: Path, threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
        }
        command = [sys.executable, "-m", "benchmarks.generation_drivers", system, str(model_dir), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._answer()["ready"] == system

    def measure(self, **request: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a driver ended with status {self._process.wait()}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows = measure_systems(SYSTEMS, arguments.rounds, arguments.threads)
    write_results("generation", {"threads": arguments.threads, "rounds": arguments.rounds, "rows": rows})


def measure_systems(systems: Sequence[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each case and system, medians over interleaved rounds; says them as well."""
    model_dir = bench_mini_dir()
    drivers = {system: Driver(system, model_dir, threads) for system in systems}
    samples: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for round_index in range(rounds + 1):  # the first one warms up
        for sequences, prompt, tokens in CASES:
            for system, driver in drivers.items():
                measured = driver.measure(sequences=sequences, prompt=prompt, tokens=tokens, seed=round_index)
                if round_index:
                    samples.setdefault((system, sequences), []).append(measured)
    for driver in drivers.values():
        driver.close()
    rows = [_row(system, case, samples[system, case[0]]) for case in CASES for system in systems]
    for row in rows:
        print(
            f"{row['system']:>12}  {row['sequences']:>2} sequences  prefill {row['prefill_tokens_per_second']:7.1f}  "
            f"decode {row['decode_tokens_per_second']:7.1f} tokens/s"
        )
    return rows


def _row(system: str, case: tuple[int, int, int], samples: list[dict[str, Any]]) -> dict[str, Any]:
    sequences, prompt, _ = case
    step = statistics.median(statistics.median(sample["steps"]) for sample in samples)
    prefill = statistics.median(sample["prefill"] for sample in samples)
    return {
        "system": system,
        "sequences": sequences,
        "prefill_tokens_per_second": sequences * prompt / prefill,
        "decode_tokens_per_second": sequences / step,
        "decode_step_milliseconds": step * 1000,
    }


if __name__ == "__main__":
    main()
