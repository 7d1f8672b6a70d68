"""What a person sees of a sweep: one line for each trial that ended, and on a terminal a status line below them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from deepseek_ray.tuning.records import TrialRecord
from deepseek_ray.tuning.settings import SweepSettings, trial_name


class SweepLine:
    """Prints to `stream`; `read` gives the record of a trial that has ended."""

    def __init__(self, stream: TextIO, settings: SweepSettings, read: Callable[[int], TrialRecord], ended: int) -> None:
        self._stream, self._settings, self._read = stream, settings, read
        self._is_terminal = stream.isatty()
        self._num_ended, self._started = ended, time.monotonic()
        self._running: dict[int, tuple[int, float]] = {}
        self._drawn = 0

    def note(self, text: str) -> None:
        """A sentence on a line of its own."""
        self._stream.write("\r" * bool(self._drawn) + text.ljust(self._drawn) + "\n")
        self._stream.flush()
        self._drawn = 0

    def validated(self, index: int, tokens: int, value: float) -> None:
        self._running[index] = (tokens, value)
        self._draw()

    def ended(self, index: int) -> None:
        self._running.pop(index, None)
        self._num_ended += 1
        self.note(
            f"[{self._num_ended}/{self._settings.num_trials}] {describe_trial(self._read(index), self._settings)}"
        )
        self._draw()

    def close(self) -> None:
        if self._drawn:
            self.note("")

    def _draw(self) -> None:
        if not self._is_terminal:
            return
        budget = self._settings.budget_tokens
        running = "  ".join(
            f"{trial_name(index)} {100 * tokens // budget}% {value:.4f}"
            for index, (tokens, value) in sorted(self._running.items())
        )
        seconds = round(time.monotonic() - self._started)
        text = (
            f"{self._num_ended}/{self._settings.num_trials} ended after {seconds // 60}:{seconds % 60:02d}  {running}"
        )
        self._stream.write("\r" + text.ljust(self._drawn))
        self._stream.flush()
        self._drawn = len(text)


def describe_trial(record: TrialRecord, settings: SweepSettings) -> str:
    """One line for an ended trial."""
    parts = [record.name, record.status]
    if record.failure:
        return "  ".join([*parts, record.failure])
    parts += [f"{name} {record.metrics[name]:.4f}" for name in settings.objectives if name in record.metrics]
    parts.append(f"{record.tokens:,} tokens")
    parts += [
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in record.params.items()
    ]
    return "  ".join(parts)
