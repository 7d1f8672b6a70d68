"""What a sweep is, kept in `sweep.json` in its directory so that it can be resumed and read again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError, SweepError

SWEEP_FILE = "sweep.json"
TRIALS_DIR = "trials"

REPORTS_PER_TRIAL = 8
"""Validations of a trial, at equal distances in tokens; schedulers decide at these."""

MEASURED = ("validation_loss", "validation_bits_per_byte", "loss")
"""Metrics of training; known only when a trial has trained."""
OF_ARCHITECTURE = ("latency_ms", "parameters", "active_parameters")
"""Metrics of a model; known before it trains."""

FIXED_KEYS = {
    "name": "is the trial's",
    "storage_path": "is the sweep's",
    "training.steps": "follows from budget_tokens",
    "training.tokens": "follows from budget_tokens",
    "training.validation_interval": "follows from budget_tokens, so that trials are compared at equal tokens",
    "training.checkpoint_interval": "follows from budget_tokens",
    "training.threads_per_worker": "follows from max_concurrent and the cluster",
    "training.device": "is the same for all trials: set it in the run file",
    "distributed": "decides how many trials fit the cluster: set it in the run file",
}
CHANGEABLE_KEYS = ("optimizer", "schedule", "balance", "training.clip_grad_norm", "training.mtp_loss_weight")
"""What population based training may change in mid-run; the rest belongs to the weights or to the order of the data."""


class Limits(FrozenConfig):
    """What an architecture may cost at most; None is no limit."""

    parameters: int | None = Field(default=None, ge=1)
    active_parameters: int | None = Field(default=None, ge=1)
    """Parameters that one token uses."""
    latency_ms: float | None = Field(default=None, gt=0)
    """Median milliseconds of one decoded token on one thread."""

    def refusal(self, config: PretrainConfig) -> str | None:
        """Why an architecture is over budget, before its latency is measured; None when it is not."""
        found = {"parameters": config.model.num_parameters, "active_parameters": config.model.num_active_parameters}
        for name, value in found.items():
            limit = getattr(self, name)
            if limit is not None and value > limit:
                return f"{name} is {value:,}, above the limit of {limit:,}"
        return None


class SweepSettings(FrozenConfig):
    """One sweep. A sweep is resumed with the settings it was started with; only `num_trials` may grow."""

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$")
    num_trials: int = Field(ge=1)
    budget_tokens: int = Field(ge=1)
    """Tokens that one trial trains on unless it is stopped early."""
    objectives: tuple[str, ...] = Field(min_length=1)
    modes: tuple[Literal["min", "max"], ...]
    scheduler: Literal["asha", "pbt", "none"]
    searcher: Literal["optuna", "random", "nsga2"]
    seed: int = Field(ge=0, lt=2**31)
    limits: Limits = Limits()
    base: PretrainConfig
    """The run that every trial varies."""

    @property
    def metric(self) -> str:
        return self.objectives[0]

    @property
    def mode(self) -> Literal["min", "max"]:
        return self.modes[0]

    @property
    def measures_latency(self) -> bool:
        return "latency_ms" in self.objectives or self.limits.latency_ms is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = MEASURED + OF_ARCHITECTURE
        for objective in self.objectives:
            if objective not in known:
                raise ConfigError(f"objective {objective!r} is not known; known are {', '.join(known)}")
        if self.metric not in MEASURED:
            raise ConfigError(f"the first objective is {self.metric!r}; it must be one of {', '.join(MEASURED)}")
        if len(self.objectives) > 1 and self.scheduler != "none":
            raise ConfigError(
                f"scheduler is {self.scheduler!r} for {len(self.objectives)} objectives; a scheduler compares one "
                "figure in mid-run, so use scheduler 'none' or one objective"
            )
        if self.searcher == "nsga2" and len(self.objectives) == 1:
            raise ConfigError("searcher is 'nsga2' for one objective; use 'optuna' (TPE), or name two objectives")
        if self.scheduler == "pbt" and self.num_trials < 2:
            raise ConfigError("scheduler is 'pbt' for 1 trial; a population needs at least 2: raise num_trials")
        return self

    def trial_config(self, config: PretrainConfig, index: int, sweep_dir: Path, threads: int) -> PretrainConfig:
        """The run of trial `index`, whose sampled configuration is `config`."""
        values = config.model_dump(mode="json")
        values |= {"name": trial_name(index), "storage_path": str(sweep_dir / TRIALS_DIR)}
        interval = math.ceil(config.total_steps / REPORTS_PER_TRIAL)
        values["training"] |= {
            "validation_interval": interval,
            "checkpoint_interval": interval,
            "threads_per_worker": threads,
        }
        return PretrainConfig.parse(values)

    def write(self, directory: Path) -> None:
        path = directory / SWEEP_FILE
        hidden = path.with_suffix(".writing")
        hidden.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        hidden.replace(path)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """SweepError when `directory` holds no sweep."""
        path = directory / SWEEP_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SweepError(f"{directory} holds no sweep (no {SWEEP_FILE}); give the directory of one") from None
        except (OSError, ValueError) as error:
            raise SweepError(f"{path} cannot be read ({error}); start the sweep again under another name") from None
        return cls.parse(values, str(path))

    def require_same(self, before: SweepSettings) -> None:
        """ConfigError when resuming under these settings would mix two different sweeps."""
        old, new = before.model_dump(mode="json"), self.model_dump(mode="json")
        changed = _differences(old, new)
        if self.num_trials >= before.num_trials:
            changed.pop("num_trials", None)
        if changed:
            listed = ", ".join(f"{key} was {was!r} and is {now!r}" for key, (was, now) in changed.items())
            raise ConfigError(
                f"sweep {self.name!r} was started with other settings: {listed}. Resume it with those (num_trials may "
                "grow), or give this sweep another name"
            )


def budgeted(base: PretrainConfig, budget_tokens: int | None) -> PretrainConfig:
    """`base` with its length in tokens, so that a sampled batch size does not change how much a trial reads."""
    tokens = budget_tokens if budget_tokens is not None else base.total_steps * base.tokens_per_step
    if tokens < base.tokens_per_step:
        raise ConfigError(
            f"budget_tokens is {tokens:,}, below the {base.tokens_per_step:,} tokens of one optimiser step; raise it"
        )
    values = base.model_dump(mode="json")
    values["training"] |= {"steps": None, "tokens": tokens}
    steps = math.ceil(tokens / base.tokens_per_step)
    values["schedule"]["warmup_steps"] = min(values["schedule"]["warmup_steps"], steps)
    return PretrainConfig.parse(values)


def trial_name(index: int) -> str:
    return f"trial-{index:04d}"


def _differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**old, **new}:
            found |= _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return found
    return {} if old == new else {key: (old, new)}
