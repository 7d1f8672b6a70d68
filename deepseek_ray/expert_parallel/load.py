"""How many tokens each expert served lately: what rebalancing decides on.

Attention workers count tokens per (layer, expert) from their start and report the totals. This merges the reports of
all workers into one moving window. Time is whatever the caller counts in: seconds, steps or reports.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepseek_ray.errors import DeploymentError

NUM_BUCKETS = 30
"""Parts of the window that are forgotten at once: memory does not grow with the number of reports."""


@dataclass
class _Counter:
    """The newest totals of one reporter."""

    incarnation: int
    totals: NDArray[np.int64]  # [layers, experts]


class ExpertLoad:
    """Tokens per (layer, expert) in the last `window` of time, all reporters together.

    `layers` are the MoE layers of the model; `window` is in the unit of the times given to `add`, `observe`, `loads`.
    Times never go back; an earlier one counts as the latest seen.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, window: float) -> None:
        if not window > 0:
            raise DeploymentError(f"a load window of {window}; use a positive length")
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._bucket_length = window / NUM_BUCKETS
        self._buckets: deque[tuple[int, NDArray[np.int64]]] = deque()
        self._sum = self._zeros()
        self._counters: dict[int, _Counter] = {}

    def add(self, counts: Mapping[int, ArrayLike], now: float) -> None:
        """Count tokens served since the last call. counts: layer -> int [experts]; layers may be missing."""
        self._add(self._matrix(counts), now)

    def observe(self, reporter: int, incarnation: int, totals: Mapping[int, ArrayLike], now: float) -> None:
        """Take in the totals of a reporter since its process started. totals: layer -> int [experts].

        The first report of an unknown reporter is only where counting starts: how much of it is recent is not known.
        A larger incarnation is a new process whose totals started from zero. A report of an older incarnation, or one
        with smaller totals than the last, was overtaken on its way and says nothing new.
        """
        matrix = self._matrix(totals)
        before = self._counters.get(reporter)
        if before is None:
            served = self._zeros()
        elif incarnation > before.incarnation:
            served = matrix
        elif incarnation == before.incarnation and (matrix >= before.totals).all():
            served = matrix - before.totals
        else:
            return
        self._counters[reporter] = _Counter(incarnation, matrix)
        self._add(served, now)

    def loads(self, now: float) -> dict[int, NDArray[np.float64]]:
        """layer -> tokens of each expert in the window that ends now, float64 [experts]; zeros where none were."""
        self._forget(now)
        return {layer: self._sum[row].astype(np.float64) for layer, row in self._row.items()}

    def _add(self, served: NDArray[np.int64], now: float) -> None:
        self._forget(now)
        bucket = int(now // self._bucket_length)
        if self._buckets and self._buckets[-1][0] >= bucket:
            self._buckets[-1][1][:] += served
        else:
            self._buckets.append((bucket, served.copy()))
        self._sum += served

    def _forget(self, now: float) -> None:
        """Buckets that ended a window ago; integers, so that what is left of the sum is exact."""
        oldest = int(now // self._bucket_length) - NUM_BUCKETS
        while self._buckets and self._buckets[0][0] <= oldest:
            self._sum -= self._buckets.popleft()[1]

    def _zeros(self) -> NDArray[np.int64]:
        return np.zeros((len(self._row), self._num_experts), dtype=np.int64)

    def _matrix(self, counts: Mapping[int, ArrayLike]) -> NDArray[np.int64]:
        matrix = self._zeros()
        for layer, row in counts.items():
            if layer not in self._row:
                raise DeploymentError(f"token counts of layer {layer}; the MoE layers are {sorted(self._row)}")
            values = np.asarray(row, dtype=np.int64)
            if values.shape != (self._num_experts,):
                raise DeploymentError(
                    f"token counts of shape {values.shape} for layer {layer}; send one for each of "
                    f"{self._num_experts} experts"
                )
            if (values < 0).any():
                expert = int(values.argmin())
                raise DeploymentError(f"{values[expert]} tokens for expert {expert} of layer {layer}; send at least 0")
            matrix[self._row[layer]] = values
        return matrix
