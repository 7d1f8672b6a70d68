"""What a sweep found. Read from its directory, so the same while it runs, when it has ended, and a year later."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import SweepError
from deepseek_ray.tuning.records import TrialRecord, best_first, pareto_front, read_records
from deepseek_ray.tuning.settings import SweepSettings
from deepseek_ray.tuning.space import sampled_config

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class SearchResult:
    """A sweep's trials and the best of them."""

    directory: Path
    settings: SweepSettings
    trials: tuple[TrialRecord, ...]
    """By index; those of a running sweep as they stand."""

    @classmethod
    def read(cls, directory: str | Path) -> SearchResult:
        """Of a running or ended sweep. SweepError when there is none in `directory`."""
        path = Path(directory).expanduser().absolute()
        settings = SweepSettings.read(path)
        return cls(path, settings, tuple(read_records(path, settings)))

    @property
    def best_trial(self) -> TrialRecord:
        """The best first objective among trials that used their whole budget (with several objectives: of the Pareto
        front). SweepError when no trial has been measured."""
        ranked = best_first(self.trials, self.settings)
        if not ranked:
            raise SweepError(_nothing_to_show(self.trials, self.settings))
        return ranked[0]

    @property
    def best_config(self) -> PretrainConfig:
        """The run that the best trial was: train it longer with `training.tokens` raised and a name of its own."""
        name = f"{self.settings.name[:57]}-best"
        return sampled_config(self.settings.base, self.best_trial.sample).model_copy(update={"name": name})

    @property
    def best_metrics(self) -> dict[str, float]:
        return dict(self.best_trial.metrics)

    @property
    def best_checkpoint(self) -> Path:
        """A model directory that `deepseek-ray serve` and `LLM` take."""
        checkpoint = self.best_trial.checkpoint
        if checkpoint is None:
            raise SweepError(f"{self.best_trial.directory} has no valid checkpoint any more; run the sweep again")
        return checkpoint

    @property
    def pareto_front(self) -> tuple[TrialRecord, ...]:
        """Trials that no other beats in every objective, the best first objective first."""
        return tuple(pareto_front(self.trials, self.settings))

    def dataframe(self) -> pandas.DataFrame:
        """One row per trial: status, `params.*`, metrics, tokens, seconds, checkpoint, failure."""
        import pandas

        return pandas.DataFrame([_row(record) for record in self.trials])

    def plot(self, directory: str | Path) -> list[Path]:
        """Write learning curves, parallel coordinates, parameter importance and (several objectives) the Pareto front
        as PNG files; returns those that could be drawn from what the sweep has so far."""
        from deepseek_ray.tuning.plots import plot_sweep

        path = Path(directory).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return plot_sweep(self.trials, self.settings, path)

    def describe(self) -> str:
        counts = Counter(record.status for record in self.trials)
        listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        best = self.best_trial
        figures = ", ".join(f"{name} {best.metrics[name]:.4f}" for name in self.settings.objectives)
        sample = ", ".join(f"{key}={_short(value)}" for key, value in best.sample.items())
        return (
            f"{len(self.trials)} trials: {listed}\nbest: {best.name}, {figures}\n{sample}\ncheckpoint {best.checkpoint}"
        )


def _row(record: TrialRecord) -> dict[str, Any]:
    return {
        "trial": record.name,
        "status": record.status,
        **{f"params.{name}": value for name, value in record.params.items()},
        **record.metrics,
        "tokens": record.tokens,
        "seconds": record.seconds,
        "checkpoint": None if record.checkpoint is None else str(record.checkpoint),
        "failure": record.failure,
    }


def _nothing_to_show(trials: tuple[TrialRecord, ...], settings: SweepSettings) -> str:
    failures = Counter(record.failure for record in trials if record.status == "failed")
    if not failures:
        return f"sweep {settings.name!r} has no result yet: {len(trials)} of {settings.num_trials} trials were started"
    message, count = failures.most_common(1)[0]
    return (
        f"all {failures.total()} ended trials of sweep {settings.name!r} failed; the most frequent failure ({count} "
        f"times): {message}. Change the run file or the space and give the sweep another name"
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"[{', '.join(map(_short, value))}]" if isinstance(value, list | tuple) else str(value)
