"""Curves and heat maps in characters."""

from __future__ import annotations

from deepseek_ray.cli.terminal_plots import heat_map, line_chart


def test_a_falling_curve_falls() -> None:
    lines = line_chart([4.0, 3.0, 2.0, 1.0], width=4, height=4).splitlines()
    assert lines[0].startswith("   4.000")
    assert lines[-1].startswith("   1.000")
    places = [next(row for row, line in enumerate(lines) if line[10 + column] != "⠀") for column in range(4)]
    assert places == [0, 1, 2, 3]


def test_many_values_are_averaged_into_columns() -> None:
    lines = line_chart([1.0] * 50 + [3.0] * 50, width=2, height=2).splitlines()
    assert lines[0].startswith("   3.000")
    assert lines[1].startswith("   1.000")
    assert all(len(line) == 12 for line in lines)


def test_a_flat_curve_does_not_divide_by_zero() -> None:
    assert "2.000" in line_chart([2.0, 2.0])


def test_load_is_shown_by_darkness() -> None:
    first, second, _ = heat_map([[0.0, 2.0], [1.0, 5.0]], layers=[1, 2]).splitlines()
    assert first == "layer   1 │  ██│"
    assert second == "layer   2 │▒▒██│"
