"""Ratios to transformers, and what counts as fallen."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.check import compare


def rows(local: float, base: float = 10.0) -> list[dict[str, Any]]:
    speeds = {"transformers": base, "local": local, "vllm": 1.0}
    return [
        {
            "system": system,
            "sequences": 8,
            "prefill_tokens_per_second": base,
            "decode_tokens_per_second": speed,
        }
        for system, speed in speeds.items()
    ]


@pytest.mark.parametrize(
    ("now", "base", "fell"), [(40.0, 10.0, False), (35.0, 10.0, False), (33.0, 10.0, True), (80.0, 20.0, False)]
)
def test_a_ratio_falls_and_the_machine_may_change(now: float, base: float, fell: bool) -> None:
    lines, found = compare(rows(40.0), rows(now, base), allow=0.15)
    assert found is fell
    assert any("local, 8 sequences, decode" in line and "4.00x" in line for line in lines)
    assert len(lines) == 2


def test_systems_that_were_not_measured_are_left_out() -> None:
    lines, fell = compare(rows(40.0), [row for row in rows(1.0) if row["system"] != "local"], allow=0.15)
    assert (lines, fell) == ([], False)
