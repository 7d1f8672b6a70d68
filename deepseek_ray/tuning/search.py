"""`search_hyperparameters` and `search_architecture`: a sweep on Ray Tune from its start, or from where it was."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from deepseek_ray.config.load import load_pretrain_config
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError, SweepError
from deepseek_ray.tuning.result import SearchResult
from deepseek_ray.tuning.settings import CHANGEABLE_KEYS, FIXED_KEYS, SWEEP_FILE, Limits, SweepSettings, budgeted
from deepseek_ray.tuning.space import Space, as_space, check_space
from deepseek_ray.tuning.tuner import absolute_paths, run_sweep, sweep_directory

Resume = Literal["auto", "must", "never"]
_LOCK_FILE = ".lock"


def search_hyperparameters(
    config: str | Path | PretrainConfig,
    space: Space | Mapping[str, Any],
    num_trials: int = 16,
    budget_tokens: int | None = None,
    metric: str = "validation_loss",
    mode: Literal["min", "max"] = "min",
    scheduler: Literal["asha", "pbt", "none"] = "asha",
    searcher: Literal["optuna", "random"] = "optuna",
    max_concurrent: int | None = None,
    storage: str | Path | None = None,
    name: str | None = None,
    resume: Resume = "auto",
    seed: int = 0,
    stream: TextIO | None = None,
) -> SearchResult:
    """Train `num_trials` variations of `config` and return what came out.

    `space`: what a function of `tune_spaces/` returns, see `tuning/space.py`. `budget_tokens`: tokens of each trial
    (None: the run file's length); `scheduler` "asha" stops the worse half at 1/8, 1/4 and 1/2 of it, "pbt" lets them go
    on from the better ones' weights. `searcher` "optuna" is TPE. `max_concurrent`: trials at once (None: as many as fit
    the free cores). The sweep lives in `storage`/`name` (None: the run's storage_path, `<run>-sweep`); the same name
    again resumes it ("auto"), which "must" demands and "never" refuses. Prints to `stream` (None: stdout).

    Uses the Ray this process is connected to, else the cluster of RAY_ADDRESS, else a local one for the while. Raises
    ConfigError for what cannot be honoured and SweepError when nothing fits, nothing may start, or every trial fails.
    """
    settings = _settings(config, name, num_trials, budget_tokens, (metric,), (mode,), scheduler, searcher, seed)
    return _search(settings, config, space, max_concurrent, storage, resume, stream)


def search_architecture(
    space: Space | Mapping[str, Any],
    budget_tokens: int | None = None,
    num_trials: int = 16,
    objectives: Sequence[str] = ("validation_loss", "latency_ms"),
    *,
    config: str | Path | PretrainConfig,
    max_parameters: int | None = None,
    max_active_parameters: int | None = None,
    max_latency_ms: float | None = None,
    searcher: Literal["nsga2", "optuna", "random"] | None = None,
    scheduler: Literal["asha", "none"] = "none",
    max_concurrent: int | None = None,
    storage: str | Path | None = None,
    name: str | None = None,
    resume: Resume = "auto",
    seed: int = 0,
    stream: TextIO | None = None,
) -> SearchResult:
    """Search model shapes, all objectives as small as possible; `pareto_front` of the result holds the compromises.

    `config` gives the data and the training of every trial; the space sets `model.*` keys. `latency_ms` is measured:
    the engine decodes with random weights of the architecture on one thread, before the trial starts. Genes that are no
    valid model or above a limit never start; another sample takes their place. `searcher` None takes NSGA-II for
    several objectives and TPE for one. The rest is as in `search_hyperparameters`.
    """
    chosen = searcher or ("nsga2" if len(objectives) > 1 else "optuna")
    limits = Limits(parameters=max_parameters, active_parameters=max_active_parameters, latency_ms=max_latency_ms)
    modes = ("min",) * len(objectives)
    settings = _settings(
        config, name, num_trials, budget_tokens, tuple(objectives), modes, scheduler, chosen, seed, limits
    )
    return _search(settings, config, space, max_concurrent, storage, resume, stream)


def _settings(
    config: str | Path | PretrainConfig,
    name: str | None,
    num_trials: int,
    budget_tokens: int | None,
    objectives: tuple[str, ...],
    modes: tuple[str, ...],
    scheduler: str,
    searcher: str,
    seed: int,
    limits: Limits | None = None,
) -> SweepSettings:
    base = config if isinstance(config, PretrainConfig) else load_pretrain_config(config)
    base = budgeted(absolute_paths(base), budget_tokens)
    return SweepSettings.parse(
        {
            "name": name or f"{base.name[:57]}-sweep",
            "num_trials": num_trials,
            "budget_tokens": base.training.tokens,
            "objectives": objectives,
            "modes": modes,
            "scheduler": scheduler,
            "searcher": searcher,
            "seed": seed,
            "limits": limits or Limits(),
            "base": base,
        },
        "the sweep's settings",
    )


def _search(
    settings: SweepSettings,
    config: str | Path | PretrainConfig,
    space: Space | Mapping[str, Any],
    max_concurrent: int | None,
    storage: str | Path | None,
    resume: Resume,
    stream: TextIO | None,
) -> SearchResult:
    if max_concurrent is not None and max_concurrent < 1:
        raise ConfigError(f"max_concurrent is {max_concurrent}; give at least 1, or None for as many as fit")
    asked = as_space(space)
    keys = check_space(asked, settings.base, FIXED_KEYS)
    if settings.scheduler == "pbt":
        _require_changeable(keys)
    directory = sweep_directory(settings, storage)
    with _lock(directory):
        _begin(settings, directory, resume)
        error = run_sweep(settings, directory, asked, max_concurrent, stream or sys.stdout)
    result = SearchResult.read(directory)
    if error is not None and not any(trial.status in ("finished", "stopped") for trial in result.trials):
        raise error
    result.best_trial  # noqa: B018 - raises when every trial failed
    if error is not None:
        raise SweepError(f"{error.message}. The {len(result.trials)} trials so far are in {directory}")
    return result


def _require_changeable(keys: Sequence[str]) -> None:
    for key in keys:
        if not any(key == name or key.startswith(name + ".") for name in CHANGEABLE_KEYS):
            raise ConfigError(
                f"the space sets {key!r}, which cannot change in mid-run as population based training does; search it "
                f"with scheduler 'asha', or keep to {', '.join(CHANGEABLE_KEYS)} (tune_spaces.pretraining.changeable)"
            )


def _begin(settings: SweepSettings, directory: Path, resume: Resume) -> None:
    """Write what the sweep is, or check that it is the one that is there."""
    if resume not in ("auto", "must", "never"):
        raise ConfigError(f"resume is {resume!r}; give 'auto', 'must' or 'never'")
    exists = (directory / SWEEP_FILE).exists()
    if exists and resume == "never":
        raise ConfigError(f"{directory} holds a sweep already and resume is 'never'; give this one another name")
    if not exists and resume == "must":
        raise ConfigError(f"{directory} holds no sweep and resume is 'must'; check name and storage")
    if exists:
        settings.require_same(SweepSettings.read(directory))
    settings.write(directory)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One driver per sweep. The system frees the lock when a driver dies."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / _LOCK_FILE).open("w")
    except OSError as error:
        raise SweepError(f"{directory} cannot be written ({error}); set storage to a directory that can") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SweepError(
                f"sweep {directory.name!r} in {directory.parent} is being run by another process; wait for it, or give "
                "this one another name"
            ) from None
        yield
