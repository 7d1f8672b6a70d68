"""The same two pictures in characters, for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_SHADES = " ░▒▓█"
_DOTS = "⠀⠁⠂⠄⡀"  # one braille column, from nothing to each of its four rows


def line_chart(values: Sequence[float], width: int = 64, height: int = 8) -> str:
    """A curve of any number of values, averaged into `width` columns; the highest and lowest are written beside it."""
    columns = _averages(values, width)
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    levels = height * 4 - 1
    rows = [[_DOTS[0]] * len(columns) for _ in range(height)]
    for x, value in enumerate(columns):
        from_top = round((high - value) / span * levels)
        rows[from_top // 4][x] = _DOTS[1 + from_top % 4]
    labels = [f"{high:8.3f} ┤"] + [" " * 9 + "│"] * (height - 2) + [f"{low:8.3f} ┤"]
    return "\n".join(label + "".join(row) for label, row in zip(labels, rows, strict=True))


def heat_map(relative: Sequence[Sequence[float]], layers: Sequence[int]) -> str:
    """relative: [layers][experts], 1.0 being an even share; a full block is twice that or more."""
    lines = [
        f"layer {layer:>3} │" + "".join(_shade(value) * 2 for value in row) + "│"
        for layer, row in zip(layers, relative, strict=True)
    ]
    scale = "".join(f" {shade * 2} {2 * step / (len(_SHADES) - 1):.1f}" for step, shade in enumerate(_SHADES))
    return "\n".join([*lines, f"share of an even load:{scale}+"])


def _shade(value: float) -> str:
    return _SHADES[min(len(_SHADES) - 1, round(value / 2 * (len(_SHADES) - 1)))]


def _averages(values: Sequence[float], width: int) -> list[float]:
    width = min(width, len(values))
    edges = [len(values) * column // width for column in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
