"""Where a run stands in its data: a count of samples, so that it resumes exactly, also at another world size.

The samples of a run form one endless sequence: position p is in epoch p // num_samples, and each epoch has its own
order. A step takes the next `accumulation * world_size * per_rank_batch` positions, whatever the shape of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from deepseek_ray.data.order import SampleOrder
from deepseek_ray.errors import DataError


@dataclass(frozen=True)
class DataCursor:
    """A position in the sequence of samples; plain numbers, kept in checkpoints."""

    seed: int
    num_samples: int
    """Samples in one epoch."""
    consumed_global_samples: int = 0
    """Samples all ranks together have trained on since the start of the run."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"the training set has {self.num_samples} samples, it needs 1; use more text or a shorter "
                "sequence_length"
            )

    @property
    def epoch(self) -> int:
        return self.consumed_global_samples // self.num_samples

    def indices(self, rank: int, world_size: int, per_rank_batch: int, accumulation: int = 1) -> np.ndarray:
        """Samples of one rank in the next step: [accumulation, per_rank_batch] int64.

        Micro-batch after micro-batch, rank after rank: all ranks' samples of a step are its positions, in order.
        """
        step = np.arange(accumulation * world_size * per_rank_batch, dtype=np.int64)
        mine = step.reshape(accumulation, world_size, per_rank_batch)[:, rank]
        return self.samples_at(self.consumed_global_samples + mine)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample indices at `positions` ([...] int64) of the run's endless sequence; int64, the same shape."""
        epochs = positions // self.num_samples
        result = np.empty(positions.shape, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            order = SampleOrder(self.num_samples, self.seed, int(epoch))
            result[chosen] = order.at(positions[chosen] % self.num_samples)
        return result

    def advance(self, num_global_samples: int) -> DataCursor:
        """The cursor after a step of `accumulation * world_size * per_rank_batch` samples."""
        return replace(self, consumed_global_samples=self.consumed_global_samples + num_global_samples)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], num_samples: int, seed: int) -> DataCursor:
        """Back from a checkpoint. DataError when the run's data or seed changed: the position would mean nothing."""
        cursor = cls(**values)
        for name, now in (("num_samples", num_samples), ("seed", seed)):
            if (then := getattr(cursor, name)) != now:
                raise DataError(
                    f"the checkpoint stands in a training set with {name} {then}, this run's has {now}; "
                    "resume with the same data section, or start a new run under another name"
                )
        return cursor
