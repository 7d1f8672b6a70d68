"""The trials of a sweep as anybody can read them from its directory, while it runs and afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial

from deepseek_ray.training.checkpoint import CheckpointStore
from deepseek_ray.training.loop import CHECKPOINTS_DIR
from deepseek_ray.training.metrics import read_metrics
from deepseek_ray.tuning.settings import MEASURED, OF_ARCHITECTURE, SweepSettings, trial_name
from deepseek_ray.tuning.study import read_trials
from deepseek_ray.tuning.sweep import run_dir


@dataclass(frozen=True)
class TrialRecord:
    """One trial."""

    index: int
    status: Literal["running", "finished", "stopped", "failed"]
    """`stopped`: by the scheduler, before its budget was used up."""
    params: dict[str, Any]
    """What the space asked for; of population based training the latest."""
    sample: dict[str, Any]
    """Dotted keys of the run file."""
    metrics: dict[str, float]
    """Of the last validation, and of the architecture."""
    tokens: int
    seconds: float | None
    """From the trial's first start to its end, a killed driver's pause included; None while it runs."""
    failure: str | None
    changes: tuple[dict[str, Any], ...]
    """Population based training: {"donor", "tokens", "params"} of each time it went on from another trial's weights."""
    directory: Path

    @property
    def name(self) -> str:
        return trial_name(self.index)

    @property
    def checkpoint(self) -> Path | None:
        """The newest valid one, which can be served."""
        newest = CheckpointStore(self.directory / CHECKPOINTS_DIR, keep=1).latest()
        return newest[1] if newest else None

    def curve(self, metric: str, tokens_per_step: int) -> list[tuple[int, float]]:
        """(tokens, metric) of every validation."""
        lines = [line for line in read_metrics(self.directory) if "validation_loss" in line]
        return [(line["step"] * tokens_per_step, line[metric]) for line in lines]


def read_records(directory: Path, settings: SweepSettings) -> list[TrialRecord]:
    return [_record(trial, directory, settings) for trial in read_trials(directory)]


def tokens_per_step(record: TrialRecord, settings: SweepSettings) -> int:
    """Of a trial, whose batch size may be sampled."""
    training, data = settings.base.training, settings.base.data
    batch = record.sample.get("training.global_batch_size", training.global_batch_size)
    return int(batch) * int(record.sample.get("data.sequence_length", data.sequence_length))


def best_first(records: Sequence[TrialRecord], settings: SweepSettings) -> list[TrialRecord]:
    """Those with the first objective, best first: trials that used up their budget come before stopped ones."""
    sign = 1 if settings.mode == "min" else -1
    measured = [
        record for record in records if record.status in ("finished", "stopped") and settings.metric in record.metrics
    ]
    return sorted(measured, key=lambda record: (record.status != "finished", sign * record.metrics[settings.metric]))


def pareto_front(records: Sequence[TrialRecord], settings: SweepSettings) -> list[TrialRecord]:
    """Finished trials that no other beats in one objective without losing in another; best first objective first."""
    signs = [1 if mode == "min" else -1 for mode in settings.modes]

    def values(record: TrialRecord) -> tuple[float, ...]:
        return tuple(sign * record.metrics[name] for sign, name in zip(signs, settings.objectives, strict=True))

    finished = [
        record
        for record in records
        if record.status == "finished" and all(name in record.metrics for name in settings.objectives)
    ]
    front = [record for record in finished if not any(_dominates(values(other), values(record)) for other in finished)]
    return sorted(front, key=values)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _record(trial: FrozenTrial, directory: Path, settings: SweepSettings) -> TrialRecord:
    attributes, where = trial.user_attrs, run_dir(directory, trial.user_attrs["index"])
    metrics = {name: attributes[name] for name in OF_ARCHITECTURE if name in attributes}
    record = TrialRecord(
        index=attributes["index"],
        status=attributes.get("status", "running"),
        params=attributes["params"],
        sample=attributes["sample"],
        metrics=metrics | attributes.get("metrics", {}),
        tokens=attributes.get("tokens", 0),
        seconds=attributes.get("seconds") if "status" in attributes else None,
        failure=attributes.get("failure"),
        changes=tuple(attributes.get("changes", ())),
        directory=where,
    )
    return _with_progress(record, settings) if record.status == "running" else record


def _with_progress(record: TrialRecord, settings: SweepSettings) -> TrialRecord:
    """A running trial's last validation, from its own metrics file."""
    lines = [line for line in read_metrics(record.directory) if "validation_loss" in line]
    if not lines:
        return record
    last = {name: lines[-1][name] for name in MEASURED}
    tokens = lines[-1]["step"] * tokens_per_step(record, settings)
    return TrialRecord(**{**record.__dict__, "metrics": record.metrics | last, "tokens": tokens})
