"""What a sweep varies: a space is a function that asks for values and returns dotted keys of a run file.

    def space(trial, config):
        return {"optimizer.lr": trial.suggest_float("optimizer.lr", 1e-5, 1e-3, log=True)}

`trial` has Optuna's `suggest_float`, `suggest_int` and `suggest_categorical`; which are called may depend on earlier
answers, so conditional parameters need nothing special. `config` is the run that the sweep starts from. A dictionary
of `ray.tune` sampling functions (`tune.loguniform(...)`), lists (a choice) and plain values is a space too.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import optuna

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError, SweepError

_PROBES = 64
"""Samples drawn before a sweep starts, to find keys that do not exist and spaces in which nothing is valid."""


class Chooser(Protocol):
    """The part of `optuna.Trial` that a space uses."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


Sample = Mapping[str, Any]
"""Dotted key of the run file -> value."""
Space = Callable[[Any, PretrainConfig], Sample]


def as_space(space: Space | Mapping[str, Any]) -> Space:
    """A function for whatever a person gave. ConfigError for what is neither a function nor a dictionary."""
    if callable(space):
        return space
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(
            f"space is {space!r}; give a function of (trial, config) or a dictionary of dotted keys, such as "
            "tune_spaces.pretraining.space() returns"
        )
    domains = {str(key): _domain(str(key), value) for key, value in space.items()}
    return lambda trial, config: {key: suggest(trial) for key, suggest in domains.items()}


def sampled_config(base: PretrainConfig, sample: Sample) -> PretrainConfig:
    """`base` with the sample's keys set, checked as if read from a file. ConfigError names what is wrong."""
    values = base.model_dump(mode="json")
    for key, value in sample.items():
        section, name = _section(values, key)
        section[name] = list(value) if isinstance(value, tuple) else value
    return PretrainConfig.parse(values, "the sample " + ", ".join(f"{key}={value}" for key, value in sample.items()))


def check_space(space: Space, base: PretrainConfig, fixed: Mapping[str, str]) -> list[str]:
    """Draw samples before anything starts; the dotted keys that the space sets.

    `fixed`: keys that the sweep sets itself -> why. ConfigError for a key that does not exist (with the nearest one
    that does) or is fixed; SweepError when not one sample is a valid run.
    """
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), sampler=sampler)
    keys: dict[str, None] = {}
    refusals: Counter[str] = Counter()
    for _ in range(_PROBES):
        trial = study.ask()
        sample = space(trial, base)
        if not isinstance(sample, Mapping) or not sample:
            raise ConfigError(f"the space returned {sample!r}; it must return a dictionary of dotted keys and values")
        for key in sample:
            _refuse_fixed(key, fixed)
            keys[key] = None
        try:
            sampled_config(base, sample)
        except _MisspeltKeyError:
            raise
        except ConfigError as error:
            refusals[error.message.partition(": ")[2] or error.message] += 1
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    if refusals.total() == _PROBES:
        message, count = refusals.most_common(1)[0]
        raise SweepError(
            f"none of {_PROBES} samples of the space is a valid run; the most frequent reason ({count} times): "
            f"{message}"
        )
    return list(keys)


class _MisspeltKeyError(ConfigError):
    """A key of a space that no run file has."""


def _section(values: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds `key`, and the key's last part."""
    parts = key.split(".")
    section: Any = values
    for depth, part in enumerate(parts):
        if not isinstance(section, dict):
            raise _MisspeltKeyError(f"the space sets {key!r}, but {'.'.join(parts[:depth])} has no keys inside")
        if part not in section:
            near = difflib.get_close_matches(part, list(section), n=1)
            before = ".".join(parts[:depth])
            hint = (
                f"did you mean {'.'.join([*parts[:depth], near[0]])!r}?"
                if near
                else f"known keys: {', '.join(section)}"
            )
            raise _MisspeltKeyError(
                f"the space sets the unknown key {key!r}; {hint}"
                + (f" (in section {before})" if before and not near else "")
            )
        if depth < len(parts) - 1:
            section = section[part]
    return section, parts[-1]


def _refuse_fixed(key: str, fixed: Mapping[str, str]) -> None:
    for name, why in fixed.items():
        if key == name or key.startswith(name + "."):
            raise ConfigError(f"the space sets {key!r}, which {why}; leave it out of the space")


def _domain(key: str, value: Any) -> Callable[[Chooser], Any]:
    """How to ask for one entry of a dictionary."""
    from ray.tune.search.sample import Categorical, Domain

    if isinstance(value, list):
        return lambda trial: trial.suggest_categorical(key, value)
    if not isinstance(value, Domain):
        return lambda trial: value
    if isinstance(value, Categorical):
        return lambda trial: trial.suggest_categorical(key, list(value.categories))
    return _range(key, value)


def _range(key: str, domain: Any) -> Callable[[Chooser], Any]:
    """How to ask for a number of a `ray.tune` domain."""
    from ray.tune.search.sample import Float, Integer, LogUniform, Quantized, Uniform

    sampler: Any = domain.get_sampler()
    quantum = None
    if isinstance(sampler, Quantized):
        sampler, quantum = sampler.sampler, sampler.q
    log = isinstance(sampler, LogUniform)
    finite = isinstance(domain, Float | Integer) and math.isfinite(domain.lower) and math.isfinite(domain.upper)
    if not finite or not isinstance(sampler, LogUniform | Uniform) or (log and quantum not in (None, 1)):
        raise ConfigError(
            f"the space gives {key!r} the domain {domain.domain_str!r}, which cannot be searched; use tune.uniform, "
            "loguniform, quniform, randint, lograndint, qrandint or choice"
        )
    if isinstance(domain, Integer):
        high = domain.upper if quantum not in (None, 1) else domain.upper - 1  # randint leaves the upper end out
        step = 1 if log or quantum is None else int(quantum)
        return lambda trial: trial.suggest_int(key, domain.lower, high, step=step, log=log)
    return lambda trial: trial.suggest_float(key, domain.lower, domain.upper, step=quantum, log=log)
