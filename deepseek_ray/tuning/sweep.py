"""A sweep without Ray: which trial comes next, what became of it, and what is left to do after a kill.

Everything is written to the study before it has an effect elsewhere, so that a driver that was killed anywhere finds
every trial once: started ones are resumed in their own directory, ended ones are left alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError, SweepError
from deepseek_ray.tuning.settings import TRIALS_DIR, SweepSettings, trial_name
from deepseek_ray.tuning.space import Sample, Space, sampled_config
from deepseek_ray.tuning.study import open_study

_MOST_REFUSALS = 500
"""Samples refused in a row before the sweep gives up: its limits leave (almost) nothing of its space."""

Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Proposal:
    """A trial to start, or to go on with."""

    number: int
    """In the study."""
    index: int
    """In the sweep, from 0; names the trial's directory."""
    params: Mapping[str, Any]
    """What the space asked for."""
    config: PretrainConfig


@dataclass
class Sweep:
    """The state of a sweep; the caller holds its lock."""

    settings: SweepSettings
    directory: Path
    space: Space
    measure_latency: Callable[[ModelConfig], float]
    """Milliseconds per decoded token."""
    study: optuna.Study = field(init=False)
    unfinished: list[Proposal] = field(init=False)
    """Started by an earlier process and not ended; they come first."""
    num_started: int = field(init=False)

    def __post_init__(self) -> None:
        self.study = open_study(self.directory, self.settings)
        started = [trial for trial in self.study.get_trials(deepcopy=False) if "index" in trial.user_attrs]
        for trial in started:
            if not trial.state.is_finished() and "status" in trial.user_attrs:
                self._tell(trial)  # killed between the two writes of an ending
        left = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
        for trial in left:
            if "index" not in trial.user_attrs:  # killed between asking and accepting: it never was a trial
                self.study.tell(trial.number, state=TrialState.FAIL)
        accepted = [trial for trial in left if "index" in trial.user_attrs]
        self.unfinished = sorted((self._again(trial) for trial in accepted), key=lambda trial: trial.index)
        self.num_started = len(started)

    def next(self) -> Proposal | None:
        """The next trial; None when all have been started. SweepError when the space gives nothing that may start."""
        if self.unfinished:
            return self.unfinished.pop(0)
        if self.num_started >= self.settings.num_trials:
            return None
        refusals: Counter[str] = Counter()
        for _ in range(_MOST_REFUSALS):
            trial = self.study.ask()
            sample = dict(self.space(trial, self.settings.base))
            refused, config = self._refusal(trial, sample)
            if config is not None:
                return self._accept(trial, sample, config)
            trial.set_user_attr("refused", refused)
            self.study.tell(trial, state=TrialState.FAIL)
            refusals[_without_figures(refused)] += 1
        message, count = refusals.most_common(1)[0]
        raise SweepError(
            f"{_MOST_REFUSALS} samples in a row were refused, the most frequent reason ({count} times): {message}, for "
            f"example {refused}; widen the limits or narrow the space"
        )

    def report(self, number: int, tokens: int, value: float) -> None:
        """Remember a trial's metric after `tokens` tokens, for samplers that learn from trials stopped early."""
        trial = self._trial(number)
        if len(self.settings.objectives) == 1 and tokens not in trial.intermediate_values:
            self.study._storage.set_trial_intermediate_value(trial._trial_id, tokens, value)

    def change(self, number: int, donor: int, tokens: int, params: Mapping[str, Any], sample: Sample) -> None:
        """Population based training: the trial goes on from the weights of trial `donor` with other settings."""
        trial = self._trial(number)
        changes = [*trial.user_attrs.get("changes", ()), {"donor": donor, "tokens": tokens, "params": dict(params)}]
        self._note(trial, changes=changes, params=dict(params), sample=dict(sample))

    def finish(
        self, number: int, status: Status, metrics: Mapping[str, float], tokens: int, failure: str | None = None
    ) -> None:
        """Record how a trial ended. `metrics` are those of its last validation."""
        trial = self._trial(number)
        ended = {"metrics": dict(metrics), "tokens": tokens, "seconds": time.time() - trial.user_attrs["started"]}
        self._note(trial, **ended, failure=failure, status=status)
        self._tell(self._trial(number))

    def _tell(self, trial: FrozenTrial) -> None:
        attributes = trial.user_attrs
        values = [attributes["metrics"].get(name, attributes.get(name)) for name in self.settings.objectives]
        if attributes["status"] == "failed" or None in values:
            self.study.tell(trial.number, state=TrialState.FAIL)
        elif attributes["status"] == "stopped" and trial.intermediate_values:
            self.study.tell(trial.number, state=TrialState.PRUNED)
        else:
            self.study.tell(trial.number, values)

    def _refusal(self, trial: optuna.Trial, sample: Sample) -> tuple[str, PretrainConfig | None]:
        """Why a sample may not start, or its configuration. What is cheap to find out comes first."""
        try:
            config = sampled_config(self.settings.base, sample)
        except ConfigError as error:
            return error.message, None
        if refused := self.settings.limits.refusal(config):
            return refused, None
        if self.settings.measures_latency:
            latency = self.measure_latency(config.model)
            limit = self.settings.limits.latency_ms
            if limit is not None and latency > limit:
                return f"latency_ms is {latency:.3f}, above the limit of {limit}", None
            trial.set_user_attr("latency_ms", latency)
        return "", config

    def _accept(self, trial: optuna.Trial, sample: Sample, config: PretrainConfig) -> Proposal:
        trial.set_user_attr("parameters", config.model.num_parameters)
        trial.set_user_attr("active_parameters", config.model.num_active_parameters)
        trial.set_user_attr("sample", dict(sample))
        trial.set_user_attr("params", dict(trial.params))
        trial.set_user_attr("started", time.time())
        trial.set_user_attr("index", self.num_started)  # last: with an index it is a trial of the sweep
        self.num_started += 1
        return Proposal(trial.number, self.num_started - 1, trial.params, config)

    def _again(self, trial: FrozenTrial) -> Proposal:
        attributes = trial.user_attrs
        config = sampled_config(self.settings.base, attributes["sample"])
        return Proposal(trial.number, attributes["index"], attributes["params"], config)

    def _trial(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _note(self, trial: FrozenTrial, **attributes: Any) -> None:
        for name, value in attributes.items():
            self.study._storage.set_trial_user_attr(trial._trial_id, name, value)


def run_dir(sweep_dir: Path, index: int) -> Path:
    """Where trial `index` trains."""
    return sweep_dir / TRIALS_DIR / trial_name(index)


def _without_figures(refusal: str) -> str:
    """The kind of a refusal, so that 500 of them can be counted: `parameters is 12,345, above ...` -> `parameters`."""
    return refusal.split(" is ")[0] if " is " in refusal else refusal
