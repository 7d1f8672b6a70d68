"""`make bench-check`: is `LLM` still as fast beside transformers as the last results say?

    python -m benchmarks.check [--rounds 1] [--allow 0.15]

Measures transformers, local and actors anew and compares ratios to transformers, which do not move with the machine as
absolute figures do. Exits with 1 when a ratio has fallen by more than what is allowed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.generation import measure
from benchmarks.results_file import newest

_BASE, _OWN = "transformers", ("local", "actors")
_PHASES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allow", type=float, default=0.15, help="part of a ratio that may be lost")
    options = parser.parse_args()
    before = newest("generation")
    now = measure((_BASE, *_OWN), options.rounds, options.threads)
    lines, fell = compare(before["rows"], now["rows"], options.allow)
    print("\n".join([f"against transformers, then ({before['file']}) and now:", *lines]))
    sys.exit(1 if fell else 0)


def compare(before: list[dict[str, Any]], now: list[dict[str, Any]], allow: float) -> tuple[list[str], bool]:
    """A line for each ratio that both have, and whether one has fallen by more than `allow` of it."""
    then, fresh = _ratios(before), _ratios(now)
    lines, fell = [], False
    for key in sorted(then.keys() & fresh.keys()):
        has_fallen = fresh[key] < (1 - allow) * then[key]
        fell = fell or has_fallen
        system, sequences, phase = key
        what = f"{system}, {sequences} sequences, {phase.partition('_')[0]}"
        lines.append(f"{what:<36} {then[key]:6.2f}x {fresh[key]:6.2f}x{'  FELL' if has_fallen else ''}")
    return lines, fell


def _ratios(rows: list[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    base = {row["sequences"]: row for row in rows if row["system"] == _BASE}
    return {
        (row["system"], row["sequences"], phase): row[phase] / base[row["sequences"]][phase]
        for row in rows
        if row["system"] in _OWN and row["sequences"] in base
        for phase in _PHASES
    }


if __name__ == "__main__":
    main()
