"""Goals are read off results files, and what is missed is seen."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.results_file import newest_by_hardware
from benchmarks.sections.goals import GOALS, Goal, goals_section


def results(ratio: float) -> dict[str, Any]:
    """Of a machine on which frames and training are `ratio` times what they are compared with."""
    return {
        "frame_round_trip": {"microseconds": {"bare": 50.0, "shared_memory": 50.0 * ratio}},
        "training": {
            "rows": [
                {"system": "deepseek_ray", "tokens_per_second": 700.0 * ratio},
                {"system": "transformers", "tokens_per_second": 700.0},
            ]
        },
    }


@pytest.mark.parametrize(
    ("wanted", "at_most", "figure", "met"),
    [(1.5, False, 1.5, True), (1.5, False, 1.49, False), (1.3, True, 1.3, True), (1.3, True, 1.31, False)],
)
def test_a_goal_is_met_as_it_is_printed(wanted: float, at_most: bool, figure: float, met: bool) -> None:
    goal = Goal("speed", wanted, lambda results: [figure, figure + 0.001, figure - 0.001], at_most=at_most)
    cell = f"{figure:.2f}" if met else f"**{figure:.2f}**"
    assert goal.cell({}) == " / ".join([cell] * 3)


def test_what_is_missed_is_bold_and_explained_and_what_was_not_measured_is_a_dash() -> None:
    page = goals_section({"slow": results(1.4), "fast": results(1.2), "unknown": {}})
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.startswith("| ")}
    (frames,) = (line for what, line in rows.items() if what.startswith("frame"))
    (training,) = (line for what, line in rows.items() if what.startswith("training"))
    assert frames.endswith("<= 1.3 | **1.40** | 1.20 | - |")
    assert training.endswith(">= 1.5 | **1.40** | **1.20** | - |")
    explained = page.split("missed:")[1]
    assert explained.count("\n- ") == 2
    assert "training" in explained
    assert "prefill" not in explained


def test_whatever_is_missed_in_the_results_is_explained() -> None:
    measured = {"generation", "http_load", "startup", "frame_round_trip", "long_context", "training", "quantization"}
    by_question = {question: newest_by_hardware(question) for question in measured}
    for hardware in by_question["generation"]:
        own = {what: results[hardware] for what, results in by_question.items() if hardware in results}
        for goal in GOALS:
            assert goal.where or "**" not in goal.cell(own), (hardware, goal.what)
