"""What determinism costs: `LLM` as it is against `deterministic=False`, prefill and decode on bench-mini, in one run.

    python -m benchmarks.deterministic [--rounds 3] [--threads 2]

Rounds are interleaved (A B, A B, ...); medians over rounds of the median step.
"""

from __future__ import annotations

import argparse

from benchmarks.generation import measure_systems
from benchmarks.results_file import write_results

SYSTEMS = ("local", "fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows = measure_systems(SYSTEMS, arguments.rounds, arguments.threads)
    write_results("deterministic", {"threads": arguments.threads, "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
