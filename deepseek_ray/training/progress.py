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

LOG_FILE = "train.log"

_POLL_SECONDS = 0.25
_BAR_WIDTH = 24


class ProgressLine:
    """A status line: drawn over itself on a terminal, one line every few seconds in a log file."""

    def __init__(self, stream: TextIO, total_steps: int, log_interval_seconds: float = 5.0) -> None:
        self._stream = stream
        self._total = total_steps
        self._interval = log_interval_seconds
        self._is_terminal = stream.isatty()
        self._last_print = float("-inf")
        self._drawn = 0

    def show(self, values: dict[str, Any], now: float | None = None) -> None:
        """Take the metrics of one step; print what is due. `now` is a monotonic time in seconds."""
        now = time.monotonic() if now is None else now
        step = int(values["step"])
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


class RunFollower:
    """Reads a run's `metrics.jsonl` and `train.log` from a thread of its own while workers write them, until closed.

    Calls `on_step` with every new line of metrics and `on_note` with every new line of the log.
    """

    def __init__(
        self, directory: Path, on_step: Callable[[dict[str, Any]], None], on_note: Callable[[str], None]
    ) -> None:
        self._metrics, self._log = _Tail(directory / METRICS_FILE), _Tail(directory / LOG_FILE)
        self._on_step, self._on_note = on_step, on_note
        self._last_time = max((line["time"] for line in read_metrics(directory)), default=float("-inf"))
        self._log.skip_to_end()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="run-follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deliver what is left in the files and stop."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._deliver()
        self._deliver()

    def _deliver(self) -> None:
        for line in self._log.new_lines():
            self._on_note(line)
        for line in self._metrics.new_lines():
            values = json.loads(line)
            if values["time"] > self._last_time:  # a resume rewrites the file: the lines it kept are not news
                self._last_time = values["time"]
                self._on_step(values)


class _Tail:
    """Reads what was added to a file since the last look; all of it again when the file was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._identity = 0, -1

    def skip_to_end(self) -> None:
        if self._path.exists():
            status = self._path.stat()
            self._offset, self._identity = status.st_size, status.st_ino

    def new_lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                identity = os.fstat(file.fileno()).st_ino
                if identity != self._identity:
                    self._offset, self._identity = 0, identity
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.decode(errors="replace").splitlines()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
