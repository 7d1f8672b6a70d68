"""Ray's schedulers, with what a resumed sweep and few cores need.

Ray's own state of a scheduler is lost when its driver dies. ASHA's is a table of results per rung, which is filled
again from the trials' own metrics, so that nothing is lost. Population based training keeps each trial's settings and
weights (in the sweep's record and in the trial's directory); who was how good is learnt anew from the next results.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.schedulers.pbt import _PBTTrialState

from deepseek_ray.tuning.settings import REPORTS_PER_TRIAL

_REDUCTION = 2
"""ASHA lets the better half of each rung go on; rungs are at 1/8, 1/4 and 1/2 of the budget."""

History = Mapping[int, Iterable[tuple[int, float]]]
"""Index of a trial -> its validations so far: (tokens, metric)."""


class Seats:
    """Counts the trials that run or are about to: the searcher starts another only when there is a free seat."""

    controller: Any = None

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self.controller = tune_controller
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]

    def num_running(self) -> int:
        if self.controller is None:
            return 0
        return sum(trial.status in (Trial.PENDING, Trial.RUNNING) for trial in self.controller.get_trials())


class NoScheduler(Seats, FIFOScheduler):
    """Every trial runs to its end."""


class ResumableAsha(Seats, AsyncHyperBandScheduler):
    """Asynchronous successive halving (arXiv 1810.05934) over tokens."""

    def __init__(self, metric: str, mode: str, budget_tokens: int, history: History) -> None:
        super().__init__(
            time_attr="tokens",
            metric=metric,
            mode=mode,
            max_t=budget_tokens,
            grace_period=max(1, budget_tokens // REPORTS_PER_TRIAL),
            reduction_factor=_REDUCTION,
            stop_last_trials=False,  # the last step ends a trial
        )
        for index, validations in history.items():
            for tokens, value in validations:
                self._brackets[0].on_result(_Past(index), tokens, (1 if mode == "max" else -1) * value)  # type: ignore[arg-type]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        for _, recorded in self._brackets[0]._rungs:
            if (earlier := _Past(trial.config["index"]).trial_id) in recorded:
                recorded[trial.trial_id] = recorded.pop(earlier)


class _Past:
    """A trial of an earlier start, as a rung knows it."""

    def __init__(self, index: int) -> None:
        self.trial_id = f"index {index}"


class Population(Seats, PopulationBasedTraining):
    """Population based training (arXiv 1711.09846): the worse trials go on from the better ones' weights.

    Synchronous: at every perturbation all trials pause, are compared at equal tokens, and go on. `explore(own, donor,
    tokens)` gives the new configuration of trial `own` (its Tune configuration) after the example of trial `donor`.
    `seats`: trials that may run at once; a larger population takes turns. `more_to_come`: whether the population is not
    complete yet.
    """

    def __init__(
        self,
        metric: str,
        mode: str,
        interval_tokens: int,
        explore: Callable[[dict[str, Any], dict[str, Any], int], dict[str, Any]],
        seats: int,
        more_to_come: Callable[[], bool],
        seed: int,
    ) -> None:
        super().__init__(
            time_attr="tokens",
            metric=metric,
            mode=mode,
            perturbation_interval=interval_tokens,
            custom_explore_fn=lambda config: config,
            log_config=False,
            require_attrs=False,
            synch=True,
        )
        self._explore_trial, self._num_seats, self._more_to_come = explore, seats, more_to_come
        random.seed(seed)  # Ray draws the donor with the global generator

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # Not Ray's: it refuses searchers, because most would learn from settings that a trial no longer has.
        self.controller = tune_controller
        self._trial_state[trial] = _PBTTrialState(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict) -> str:
        state = self._trial_state[trial]
        due = result["tokens"] - state.last_perturbation_time >= self._perturbation_interval
        if due and self._more_to_come():
            self._save_trial_state(state, result["tokens"], result, trial)
            return TrialScheduler.PAUSE  # those who have not had a turn come first
        return super().on_trial_result(tune_controller, trial, result)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        running = self.num_running()
        if running >= self._num_seats:
            return None
        chosen = super().choose_trial_to_run(tune_controller)
        paused = [trial for trial in tune_controller.get_trials() if trial.status == Trial.PAUSED]
        if chosen is None and paused and not running and not self._more_to_come():
            # The one that all were waiting for has failed or ended: they go on as they are.
            reached = max(self._trial_state[trial].last_train_time for trial in paused)
            self._next_perturbation_sync = reached + self._perturbation_interval
            chosen = super().choose_trial_to_run(tune_controller)
        return chosen

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict, dict]:
        tokens = int(self._trial_state[trial_to_clone].last_train_time)
        return self._explore_trial(trial.config, trial_to_clone.config, tokens), {}
