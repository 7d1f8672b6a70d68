"""Ray's schedulers as a resumed sweep needs them, without a cluster."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from training_runs import small_config

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.tuning.explore import PerturbingChooser, explore
from deepseek_ray.tuning.schedulers import NoScheduler, Population, ResumableAsha
from deepseek_ray.tuning.settings import budgeted
from deepseek_ray.tuning.space import Chooser
from tune_spaces.pretraining import changeable

BASE = budgeted(small_config(), 24 * 8 * 12)


@dataclass(eq=False)
class FakeTrial:
    """What a scheduler sees of a trial."""

    config: dict[str, Any]
    status: str = Trial.RUNNING
    experiment_tag: str = ""
    trial_id: str = field(default_factory=Trial.generate_id)

    def is_finished(self) -> bool:
        return self.status == Trial.TERMINATED


@dataclass
class FakeController:
    trials: list[FakeTrial]

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def get_live_trials(self) -> set[FakeTrial]:
        return {trial for trial in self.trials if not trial.is_finished()}


def asha(history: dict[int, list[tuple[int, float]]] | None = None, mode: str = "min") -> ResumableAsha:
    return ResumableAsha("validation_loss", mode, budget_tokens=800, history=history or {})


def decide(scheduler: Any, trial: FakeTrial, tokens: int, value: float) -> str:
    return scheduler.on_trial_result(FakeController([]), trial, {"tokens": tokens, "validation_loss": value})


def test_a_resumed_asha_decides_as_the_one_that_died() -> None:
    history = {0: [(100, 5.0), (200, 4.0)], 1: [(100, 6.0)]}
    trials = [FakeTrial({"index": index}) for index in range(4)]
    undisturbed = asha()
    for trial in trials:
        undisturbed.on_trial_add(FakeController([]), trial)
    for index, results in history.items():
        for tokens, value in results:
            decide(undisturbed, trials[index], tokens, value)
    again = [FakeTrial({"index": index}) for index in range(4)]
    resumed = asha(history)
    for trial in again:
        resumed.on_trial_add(FakeController([]), trial)
    for index, tokens, value in ((2, 100, 5.7), (3, 100, 4.9), (3, 200, 4.5), (0, 400, 3.9)):
        assert decide(resumed, again[index], tokens, value) == decide(undisturbed, trials[index], tokens, value)
    assert [sorted(recorded.values()) for _, recorded in resumed._brackets[0]._rungs] == [
        sorted(recorded.values()) for _, recorded in undisturbed._brackets[0]._rungs
    ]


def test_a_resumed_trial_that_repeats_a_rung_is_not_counted_twice() -> None:
    scheduler = asha({0: [(100, 5.0)]})
    trial = FakeTrial({"index": 0})
    scheduler.on_trial_add(FakeController([]), trial)
    decide(scheduler, trial, 100, 5.5)
    first_rung = scheduler._brackets[0]._rungs[-1][1]
    assert list(first_rung.values()) == [-5.0]


@pytest.mark.parametrize(("mode", "worse"), [("min", 7.0), ("max", 3.0)])
def test_asha_stops_the_worse_half_at_a_rung_and_nobody_in_between(mode: str, worse: float) -> None:
    scheduler = asha({0: [(100, 5.0)], 1: [(100, 5.0)]}, mode)
    trial = FakeTrial({"index": 2})
    scheduler.on_trial_add(FakeController([]), trial)
    assert decide(scheduler, trial, 50, worse) == TrialScheduler.CONTINUE
    assert decide(scheduler, trial, 110, worse) == TrialScheduler.STOP


def test_seats_are_counted_from_trials_that_run_or_are_about_to() -> None:
    scheduler = NoScheduler()
    assert scheduler.num_running() == 0
    trials = [FakeTrial({}, status) for status in (Trial.RUNNING, Trial.PENDING, Trial.PAUSED, Trial.TERMINATED)]
    scheduler.on_trial_add(FakeController(trials), trials[0])
    assert scheduler.num_running() == 2


def population(more_to_come: bool, seats: int = 2, explored: Any = None) -> Population:
    return Population("validation_loss", "min", 200, explored, seats=seats, more_to_come=lambda: more_to_come, seed=0)


def test_a_trial_gives_up_its_seat_at_a_perturbation_while_others_have_had_none() -> None:
    trials = [FakeTrial({"index": 0})]
    scheduler = population(more_to_come=True)
    scheduler.on_trial_add(FakeController(trials), trials[0])
    assert scheduler.on_trial_result(FakeController(trials), trials[0], {"tokens": 100, "validation_loss": 5.0}) == (
        TrialScheduler.CONTINUE
    )
    result = {"tokens": 200, "validation_loss": 5.0}
    assert scheduler.on_trial_result(FakeController(trials), trials[0], result) == TrialScheduler.PAUSE


def test_a_paused_trial_waits_for_a_seat() -> None:
    paused = FakeTrial({"index": 0}, Trial.PAUSED)
    trials = [paused, FakeTrial({"index": 1})]
    scheduler = population(more_to_come=False, seats=1)
    for trial in trials:
        scheduler.on_trial_add(FakeController(trials), trial)
    assert scheduler.choose_trial_to_run(FakeController(trials)) is None
    trials[1].status = Trial.TERMINATED
    assert scheduler.choose_trial_to_run(FakeController(trials)) is paused


def test_trials_go_on_when_the_one_they_wait_for_has_failed() -> None:
    waiting, failed = FakeTrial({"index": 0}), FakeTrial({"index": 1})
    controller = FakeController([waiting, failed])
    scheduler = population(more_to_come=False)
    for trial in controller.trials:
        scheduler.on_trial_add(controller, trial)
    result = {"tokens": 200, "validation_loss": 5.0}
    assert scheduler.on_trial_result(controller, waiting, result) == TrialScheduler.PAUSE
    waiting.status = Trial.PAUSED
    assert scheduler.choose_trial_to_run(controller) is None
    failed.status = Trial.TERMINATED
    assert scheduler.choose_trial_to_run(controller) is waiting


def test_the_exploiting_trial_keeps_its_own_name() -> None:
    seen = []

    def explored(own: dict, donor: dict, tokens: int) -> dict:
        seen.append((own["index"], donor["index"], tokens))
        return {"index": own["index"]}

    scheduler = population(more_to_come=False, explored=explored)
    trials = [FakeTrial({"index": 0}), FakeTrial({"index": 1})]
    for trial in trials:
        scheduler.on_trial_add(FakeController(trials), trial)
    scheduler._trial_state[trials[1]].last_train_time = 400
    config, _ = scheduler._get_new_config(trials[0], trials[1])
    assert (config, seen) == ({"index": 0}, [(0, 1, 400)])


def test_a_perturbed_number_is_a_fifth_away_or_drawn_afresh_and_never_outside() -> None:
    moved = set()
    for seed in range(200):
        chooser = PerturbingChooser({"lr": 1e-3}, random.Random(seed))
        value = chooser.suggest_float("lr", 1e-5, 1.1e-3, log=True)
        assert 1e-5 <= value <= 1.1e-3
        moved.add(round(value / 1e-3, 6) if value in (8e-4, 1.1e-3) else "drawn")
    assert moved == {0.8, 1.1, "drawn"}


def test_a_conditional_parameter_that_comes_into_being_gets_a_value() -> None:
    donor = {
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.05,
        "moments": "deepseek",
        "balance.bias_update_speed": 1e-3,
    }
    seen = set()
    for seed in range(60):
        params, sample, config = explore(changeable(), BASE, donor, random.Random(seed))
        assert ("beta1" in params) == (params["moments"] == "searched") == ("optimizer.betas" in sample)
        assert config.optimizer.lr == params["optimizer.lr"]
        seen.add(params["moments"])
    assert seen == {"deepseek", "searched"}


def test_explored_settings_are_valid_or_it_is_an_error() -> None:
    def never_valid(trial: Chooser, config: PretrainConfig) -> dict:
        return {"optimizer.lr": -trial.suggest_float("lr", 1, 2)}

    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        explore(never_valid, BASE, {"lr": 1.5}, random.Random(0))
