"""What a person sees of a run while it trains: read from the metrics file, so it works wherever the workers are."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from deepseek_ray.training.metrics import METRICS_FILE, read_metrics

_POLL_SECONDS = 0.25
_BAR_WIDTH = 24


class ProgressLine:
    """A status line: drawn over itself on a terminal, one line every few seconds in a log file."""

    def __init__(self, stream: TextIO, total_steps: int, log_interval_seconds: float = 5.0) -> None:
        self._stream = stream
        self._total = total_steps
        self._interval = log_interval_seconds
        self._is_terminal = stream.isatty()
        self._last_step = 0
        self._last_print = float("-inf")
        self._drawn = 0

    def show(self, values: dict[str, Any], now: float | None = None) -> None:
        """Take the metrics of one step; print what is due. `now` is a monotonic time in seconds."""
        now = time.monotonic() if now is None else now
        step = int(values["step"])
        if step <= self._last_step:
            self.note(f"resumed after step {step - 1}")
        self._last_step = step
        validated = "validation_loss" in values
        if self._is_terminal:
            self._draw(f"{self._bar(step)} {describe(values, self._total)}", keep=validated)
        elif validated or step == self._total or now - self._last_print >= self._interval:
            self._last_print = now
            self._stream.write(describe(values, self._total) + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Print a sentence on a line of its own."""
        if self._is_terminal:
            self._draw(text, keep=True)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = 0

    def _bar(self, step: int) -> str:
        filled = _BAR_WIDTH * step // self._total
        return "[" + "#" * filled + "." * (_BAR_WIDTH - filled) + "]"

    def _draw(self, text: str, keep: bool) -> None:
        self._stream.write("\r" + text.ljust(self._drawn) + ("\n" if keep else ""))
        self._drawn = 0 if keep else len(text)


def describe(values: dict[str, Any], total_steps: int) -> str:
    """One line of text for the metrics of one step."""
    step, speed = int(values["step"]), float(values["tokens_per_second"])
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}", f"loss {values['loss']:.4f}"]
    if "validation_loss" in values:
        parts.append(
            f"validation loss {values['validation_loss']:.4f} ({values['validation_bits_per_byte']:.4f} bits per byte)"
        )
    parts.append(f"{speed:,.0f} tokens/s")
    if speed > 0:
        parts.append(f"ETA {_clock((total_steps - step) * values['tokens'] / speed)}")
    return "  ".join(parts)


class MetricsFollower:
    """Calls `on_step` with every new line of a run's `metrics.jsonl`, from a thread of its own, until closed."""

    def __init__(self, directory: Path, on_step: Callable[[dict[str, Any]], None]) -> None:
        self._path = directory / METRICS_FILE
        self._on_step = on_step
        self._offset, self._identity = 0, -1
        self._last_time = float("-inf")
        self._skip_to_end()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="metrics-follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deliver what is left in the file and stop."""
        self._stop.set()
        self._thread.join()

    def _skip_to_end(self) -> None:
        """Lines of an earlier start of the run are not news."""
        self._last_time = max((line["time"] for line in read_metrics(self._path.parent)), default=self._last_time)

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._deliver()
        self._deliver()

    def _deliver(self) -> None:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._identity:  # new, or rewritten by a resume: old lines are told by their time
                    self._offset, self._identity = 0, status.st_ino
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            values = json.loads(line)
            if values["time"] > self._last_time:
                self._last_time = values["time"]
                self._on_step(values)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
