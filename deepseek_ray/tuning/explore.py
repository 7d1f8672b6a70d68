"""Population based training's next settings: a better trial's, each a little changed (arXiv 1711.09846, section 4)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.tuning.space import Sample, Space, sampled_config

_FACTORS = (0.8, 1.2)
_RESAMPLE = 0.25
"""Chance of a parameter to be drawn afresh instead of changed."""
_TRIES = 20


class PerturbingChooser:
    """Answers a space's questions with a donor's answers, changed; questions it was never asked are drawn.

    So a conditional parameter that comes into being with a changed choice gets a value too.
    """

    def __init__(self, donor: Mapping[str, Any], generator: random.Random) -> None:
        self._donor, self._random = donor, generator
        self.params: dict[str, Any] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        value = self._number(name, low, high, log)
        if step is not None:
            value = low + round((value - low) / step) * step
        return self._answer(name, min(max(value, low), high))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        value = low + round((self._number(name, low, high, log) - low) / step) * step
        return self._answer(name, min(max(value, low), high))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        keep = name in self._donor and self._random.random() >= _RESAMPLE
        return self._answer(name, self._donor[name] if keep else self._random.choice(list(choices)))

    def _number(self, name: str, low: float, high: float, log: bool) -> float:
        if name in self._donor and self._random.random() >= _RESAMPLE:
            return self._donor[name] * self._random.choice(_FACTORS)
        share = self._random.random()
        return low * (high / low) ** share if log else low + share * (high - low)

    def _answer(self, name: str, value: Any) -> Any:
        self.params[name] = value
        return value


def explore(
    space: Space, base: PretrainConfig, donor: Mapping[str, Any], generator: random.Random
) -> tuple[dict[str, Any], Sample, PretrainConfig]:
    """New (params, sample, configuration) near the donor's params; ConfigError when twenty tries give no valid run."""
    for attempt in range(1, _TRIES + 1):
        chooser = PerturbingChooser(donor, generator)
        sample = space(chooser, base)
        try:
            return chooser.params, sample, sampled_config(base, sample)
        except ConfigError:
            if attempt == _TRIES:
                raise
    raise AssertionError("unreachable")
