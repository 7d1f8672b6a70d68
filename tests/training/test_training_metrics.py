"""metrics.jsonl holds each step once, also after a kill and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.errors import TrainingError
from deepseek_ray.training.metrics import METRICS_FILE, MetricsWriter, read_metrics


def write_steps(directory: Path, last_step: int, steps: range, loss: float) -> None:
    writer = MetricsWriter(directory, last_step)
    for step in steps:
        writer.write({"step": step, "loss": loss, "learning_rate": 0.1})
    writer.close()


def test_each_line_is_there_before_the_next_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, last_step=0)
    for step in (1, 2):
        writer.write({"step": step, "loss": 1 / 3})
        assert read_metrics(tmp_path)[-1] == {"step": step, "loss": 1 / 3}
    writer.close()


def test_resume_drops_the_steps_that_are_computed_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 8), loss=1.0)
    write_steps(tmp_path, 4, range(5, 10), loss=2.0)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["loss"] for line in lines] == [1.0] * 4 + [2.0] * 5


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 4), loss=1.0)
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    write_steps(tmp_path, 3, range(4, 6), loss=1.0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_step_and_remedy(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, last_step=0)
    writer.write({"step": 1, "loss": 1.0})
    with Path("/dev/full").open("a") as full:
        writer._file = full
        with pytest.raises(TrainingError, match=r"step 2: .*metrics.jsonl cannot be written.*free some space"):
            writer.write({"step": 2, "loss": 1.0})
        writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, range(1, 3), loss=1.0)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_no_file_means_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
