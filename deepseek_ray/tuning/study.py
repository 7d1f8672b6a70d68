"""The record of a sweep: an Optuna study in a journal file, one line for every fact, each forced to disk.

One process writes (it holds the sweep's lock, which the system frees when it dies: Optuna's own journal file has a lock
that outlives a killed process); others may read meanwhile. A torn last line, left by a killed writer, is
cut off before the next one writes. A trial of the sweep is a trial of the study with an `index`; samples that were
refused have none.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial

from deepseek_ray.tuning.settings import SweepSettings

JOURNAL_FILE = "study.jsonl"

optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_study(directory: Path, settings: SweepSettings) -> optuna.Study:
    """The sweep's study, for the one process that holds its lock; created when there is none."""
    path = directory / JOURNAL_FILE
    _cut_torn_line(path)
    study = optuna.create_study(
        study_name=settings.name,
        storage=JournalStorage(_Journal(path)),
        directions=["minimize" if mode == "min" else "maximize" for mode in settings.modes],
        load_if_exists=True,
    )
    study.sampler = _sampler(settings, len(study.get_trials(deepcopy=False)))
    return study


def read_trials(directory: Path) -> list[FrozenTrial]:
    """Every trial of the sweep that was started, by index; the sweep may be running."""
    path = directory / JOURNAL_FILE
    if not path.exists():
        return []
    storage = JournalStorage(_Journal(path))
    studies = storage.get_all_studies()
    trials = storage.get_all_trials(studies[0]._study_id) if studies else []
    return sorted(
        (trial for trial in trials if "index" in trial.user_attrs), key=lambda trial: trial.user_attrs["index"]
    )


def _sampler(settings: SweepSettings, num_asked: int) -> BaseSampler:
    """`num_asked` moves the seed on: a resumed study must not draw again what it drew first."""
    seed = (settings.seed * 1_000_003 + num_asked) % 2**32
    if settings.searcher == "random" or settings.scheduler == "pbt":
        return RandomSampler(seed=seed)
    if settings.searcher == "nsga2":
        # Named, because Optuna 5 takes TPE for several objectives too when it is not told.
        return NSGAIISampler(population_size=max(4, min(50, settings.num_trials // 4)), seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        startup = max(1, min(10, settings.num_trials // 2))
        # `group` handles parameters that exist only in some trials; `constant_liar` keeps running trials apart.
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


class _Journal(BaseJournalBackend):
    """Optuna's log in a file: only whole lines are read, and every line is on disk before the next step is taken."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        content = self._path.read_bytes() if self._path.exists() else b""
        lines = content[: content.rfind(b"\n") + 1].splitlines()
        return [json.loads(line) for line in lines[log_number_from:]]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode())
            file.flush()
            os.fsync(file.fileno())


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
