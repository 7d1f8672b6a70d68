"""What a run measured: one JSON line per optimiser step in `metrics.jsonl`, and the same values for TensorBoard."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from deepseek_ray.errors import TrainingError

METRICS_FILE = "metrics.jsonl"

_TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "mtp_loss": "train/mtp_loss",
    "balance_loss": "train/sequence_balance_loss",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "max_violation": "balance/max_violation",
    "tokens_per_second": "speed/tokens_per_second",
    "validation_loss": "validation/loss",
    "validation_bits_per_byte": "validation/bits_per_byte",
}


class MetricsWriter:
    """Appends the metrics of each step. After a resume the file holds every step once, with none missing.

    Every line is flushed when its step ends, so killing the process loses nothing. A run that resumes from the
    checkpoint of step s drops the lines after s (those steps are computed again) and any torn last line.
    """

    def __init__(self, directory: Path, last_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        _keep_steps_up_to(self._path, last_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=last_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """Add the line of one step; `values["step"]` is the optimiser step, counted from 1.

        Raises TrainingError when the disk is full; the line is then left out or torn, and dropped by the next resume.
        """
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"step {values['step']}: {self._path} cannot be written ({error.strerror or error}); free some space "
                "and start the run again: it resumes from the newest checkpoint"
            ) from error
        for name, tag in _TENSORBOARD_TAGS.items():
            if values.get(name) is not None:
                self._board.add_scalar(tag, values[name], values["step"])

    def sync(self) -> None:
        """Force the lines to disk; called before a checkpoint that relies on them is published."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        with suppress(OSError):  # a full disk again: the error of the write is the one to tell
            self._file.close()
        self._board.close()


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Every complete line of a run's `metrics.jsonl`, in order; an empty list when there is none."""
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _keep_steps_up_to(path: Path, last_step: int) -> None:
    """Rewrite the file without later steps, by rename: a kill in between leaves the old file or the new one."""
    if not path.exists():
        return
    kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= last_step]
    rewritten = path.with_name(f".{path.name}.rewritten")
    rewritten.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(rewritten, path)
