"""Which parameters decide who is among the best: PED-ANOVA (arXiv 2304.10255), by Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

from deepseek_ray.tuning.records import TrialRecord, best_first
from deepseek_ray.tuning.settings import SweepSettings

_FEWEST = 4
"""Trials below which a share says nothing."""
_FEWEST_BEST = 5
"""Trials that count as the best, or half of them: with a tenth of 16 the answer would hang on one trial's luck."""


def parameter_importance(records: Sequence[TrialRecord], settings: SweepSettings) -> dict[str, float]:
    """Share of each parameter that every trial has, largest first; empty for too few trials.

    Empty as well for population based training, whose trials have no one setting. Trials that were stopped early count
    as worse than those that were not: PED-ANOVA asks only who is among the best.
    """
    ranked = best_first(records, settings)
    if len(ranked) < _FEWEST or settings.scheduler == "pbt":
        return {}
    shared = [name for name in ranked[0].params if all(name in record.params for record in ranked)]
    varied = [name for name in shared if len({repr(record.params[name]) for record in ranked}) > 1]
    if not varied:
        return {}
    distributions = {name: _distribution([record.params[name] for record in ranked]) for name in varied}
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    for place, record in enumerate(ranked):  # the rank as the value: stopped trials have a loss at fewer tokens
        params = {name: record.params[name] for name in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=float(place)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        share_of_best = min(0.5, max(0.1, _FEWEST_BEST / len(ranked)))
        evaluator = PedAnovaImportanceEvaluator(target_quantile=share_of_best)
        return get_param_importances(study, evaluator=evaluator, params=varied)


def _distribution(values: list) -> optuna.distributions.BaseDistribution:
    """The range that was tried; logarithmic when it spans more than a decade."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numeric:
        return CategoricalDistribution(sorted(set(values), key=repr))
    low, high = min(values), max(values)
    return FloatDistribution(low, high, log=low > 0 and high / low > 10)
