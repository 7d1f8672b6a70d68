"""What an attention worker counts of its expert calls: tokens per expert, and where a step's time goes."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_MAX_STEPS = 10_000
"""Steps kept for an export that does not come."""


class ExpertMeter:
    """Written by the engine's thread, read by the exporter's. Times are seconds."""

    def __init__(self) -> None:
        self.num_tokens: dict[int, NDArray[np.int64]] = {}
        """Layer -> [experts]: tokens the gate sent to each expert so far."""
        self._dispatch = self._combine = 0.0
        self._steps: deque[tuple[float, float]] = deque(maxlen=_MAX_STEPS)

    def dispatched(self, layer: int, counts: Tensor, seconds: float) -> None:
        """One layer's calls went out. counts [experts]: tokens of each."""
        before = self.num_tokens.get(layer)
        self.num_tokens[layer] = counts.numpy() if before is None else before + counts.numpy()
        self._dispatch += seconds

    def combined(self, seconds: float) -> None:
        """One layer's answers are here."""
        self._combine += seconds

    def end_step(self) -> None:
        """The engine's step is over; one that called no expert leaves nothing."""
        if self._dispatch:
            self._steps.append((self._dispatch, self._combine))
        self._dispatch = self._combine = 0.0

    def take_steps(self) -> list[tuple[float, float]]:
        """(dispatch, combine) of each step since the last call."""
        return [self._steps.popleft() for _ in range(len(self._steps))]
