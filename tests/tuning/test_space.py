"""Spaces: dotted keys are checked before anything starts, dictionaries and functions mean the same."""

from __future__ import annotations

import optuna
import pytest
from ray import tune
from training_runs import small_config

from deepseek_ray.errors import ConfigError, SweepError
from deepseek_ray.tuning.settings import CHANGEABLE_KEYS, FIXED_KEYS, budgeted
from deepseek_ray.tuning.space import as_space, check_space, sampled_config
from tune_spaces import moe_architecture, pretraining

BASE = budgeted(small_config(), 24 * 512)


def asked_study(seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimizer.lrr": 1.0}, "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ({"optimzer.lr": 1.0}, "unknown key 'optimzer.lr'; did you mean 'optimizer'?"),
        ({"schedule.zzz": 1}, "unknown key 'schedule.zzz'; known keys: warmup_steps, floor"),
        ({"optimizer.lr.low": 1}, "optimizer.lr has no keys inside"),
        ({"training.tokens": [1, 2]}, "'training.tokens', which follows from budget_tokens"),
        ({"distributed.data_parallel_size": [1]}, "decides how many trials fit the cluster"),
        ({"optimizer.lr": tune.randn()}, "cannot be searched; use tune.uniform"),
        ({}, "give a function of"),
        (lambda trial, config: None, "the space returned None"),
    ],
)
def test_what_cannot_be_searched_is_named_before_anything_starts(space: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("?", r"\?")):
        check_space(as_space(space), BASE, FIXED_KEYS)  # type: ignore[arg-type]


def test_a_misspelt_key_in_a_rare_branch_is_found() -> None:
    def space(trial: optuna.Trial, config: object) -> dict:
        rare = trial.suggest_int("rare", 0, 9) == 0
        return {"optimizer.epss": 1e-8} if rare else {"optimizer.eps": 1e-8}

    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.eps'"):
        check_space(space, BASE, FIXED_KEYS)


def test_a_space_without_one_valid_sample_quotes_the_most_frequent_reason() -> None:
    with pytest.raises(SweepError, match=r"none of 64 samples .* \(64 times\): optimizer.lr is -1.0"):
        check_space(as_space({"optimizer.lr": -1.0}), BASE, FIXED_KEYS)


def test_ray_domains_become_the_same_ranges() -> None:
    space = as_space(
        {
            "optimizer.lr": tune.loguniform(1e-5, 1e-3),
            "optimizer.weight_decay": tune.uniform(0.01, 0.1),
            "schedule.floor": tune.quniform(0.2, 0.6, 0.2),
            "schedule.warmup_steps": tune.randint(1, 4),
            "training.global_batch_size": tune.choice([8, 16]),
            "training.micro_batch_size": [4, 8],
            "balance.bias_update_speed": 1e-3,
        }
    )
    trial = asked_study().ask()
    sample = space(trial, BASE)
    ranges = trial.distributions
    assert (ranges["optimizer.lr"].low, ranges["optimizer.lr"].high, ranges["optimizer.lr"].log) == (1e-5, 1e-3, True)
    assert not ranges["optimizer.weight_decay"].log
    assert ranges["schedule.floor"].step == 0.2
    assert (ranges["schedule.warmup_steps"].low, ranges["schedule.warmup_steps"].high) == (1, 3)  # randint's upper end
    assert ranges["training.global_batch_size"].choices == (8, 16)
    assert ranges["training.micro_batch_size"].choices == (4, 8)
    assert sample["balance.bias_update_speed"] == 1e-3


def test_a_sample_changes_its_keys_and_nothing_else() -> None:
    config = sampled_config(BASE, {"optimizer.lr": 0.5, "optimizer.betas": (0.5, 0.6)})
    assert (config.optimizer.lr, config.optimizer.betas) == (0.5, (0.5, 0.6))
    changed = config.model_copy(update={"optimizer": BASE.optimizer})
    assert changed == BASE


def test_every_sample_of_the_pretraining_space_is_a_valid_run_of_the_same_tokens() -> None:
    study, space = asked_study(), pretraining.space()
    seen = set()
    for _ in range(100):
        sample = space(study.ask(), BASE)
        config = sampled_config(BASE, sample)
        assert config.training.tokens == BASE.training.tokens
        assert 1e-5 <= config.optimizer.lr <= 1e-3
        assert 0.01 <= config.optimizer.weight_decay <= 0.1
        assert config.schedule.warmup_steps <= 0.2 * config.total_steps + 1
        seen.add((config.training.global_batch_size, "optimizer.betas" in sample))
    assert seen == {(batch, searched) for batch in (16, 32, 64, 128, 256) for searched in (False, True)}


def test_the_changeable_space_keeps_to_what_may_change_in_mid_run() -> None:
    for key in check_space(pretraining.changeable(), BASE, FIXED_KEYS):
        assert key.startswith(CHANGEABLE_KEYS)


def test_genes_reach_every_dimension_and_most_are_valid_models() -> None:
    study, space = asked_study(), moe_architecture.space()
    valid, keys = 0, set()
    for _ in range(60):
        sample = space(study.ask(), BASE)
        keys |= set(sample)
        try:
            sampled_config(BASE, sample)
            valid += 1
        except ConfigError:
            continue
    assert valid > 40
    assert {key.partition(".")[2] for key in keys} >= {
        *("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "hidden_size", "moe_intermediate_size"),
        *("num_hidden_layers", "kv_lora_rank", "q_lora_rank", "num_attention_heads"),
    }
