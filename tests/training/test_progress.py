"""What a person sees: lines in a log file, a line drawn over itself on a terminal, and no step twice after a resume."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

from deepseek_ray.training.metrics import MetricsWriter
from deepseek_ray.training.progress import LOG_FILE, ProgressLine, RunFollower, describe


def metrics_of(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "time": time.time(), "loss": 2.5, "tokens": 1000, "tokens_per_second": 500.0, **more}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_says_step_loss_speed_and_time_left() -> None:
    # 90 steps of 1000 tokens at 500 tokens/s are 180 s.
    assert describe(metrics_of(10), 100) == "step  10/100  loss 2.5000  500 tokens/s  ETA 3:00"
    line = describe(metrics_of(10, validation_loss=2.0, validation_bits_per_byte=1.25), 100)
    assert "validation loss 2.0000 (1.2500 bits per byte)" in line


def test_a_log_file_gets_a_line_every_few_seconds_and_for_what_matters() -> None:
    stream = io.StringIO()
    progress = ProgressLine(stream, total_steps=100, log_interval_seconds=5.0)
    for step in range(1, 21):
        progress.show(metrics_of(step), now=float(step))  # one step a second
    progress.show(metrics_of(21, validation_loss=2.0, validation_bits_per_byte=1.0), now=21.5)
    progress.show(metrics_of(100), now=22.0)
    progress.close()
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [1, 6, 11, 16, 21, 100]
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_one_line_drawn_over_itself() -> None:
    stream = Terminal()
    progress = ProgressLine(stream, total_steps=10)
    for step in range(1, 4):
        progress.show(metrics_of(step))
    progress.note("a note")
    progress.close()
    lines = stream.getvalue().split("\n")
    assert lines[0].count("\r[") == 3
    assert "a note" in lines[0].split("\r")[-1]


def test_follower_tells_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    steps: list[int] = []
    notes: list[str] = []
    seen = threading.Event()

    def on_step(values: dict[str, Any]) -> None:
        steps.append(values["step"])
        if values["step"] == 6:
            seen.set()

    writer = MetricsWriter(tmp_path, 0)
    writer.write(metrics_of(1))  # of an earlier start of the run
    (tmp_path / LOG_FILE).write_text("old\n")
    follower = RunFollower(tmp_path, on_step, notes.append)
    for step in range(2, 7):
        writer.write(metrics_of(step))
    assert seen.wait(10)
    writer.close()
    writer = MetricsWriter(tmp_path, 4)  # the worker died and went on after step 4
    with (tmp_path / LOG_FILE).open("a") as log:
        log.write("going on after step 4\n")
    for step in range(5, 9):
        writer.write(metrics_of(step))
    writer.close()
    follower.close()
    assert steps == [2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert notes == ["going on after step 4"]
