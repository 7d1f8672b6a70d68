"""A group of a run's workers as one of them sees it: its rank, its device, and sums over the group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_ray.errors import DeepSeekRayError, TrainingError

T = TypeVar("T")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This worker's place. With a world size above 1 a default process group exists (gloo or NCCL)."""

    rank: int = 0
    """Within the group, from 0."""
    world_size: int = 1
    """Workers of the group."""
    device: torch.device = _CPU
    group: dist.ProcessGroup | None = None
    """None: all workers of the run."""

    @classmethod
    def within(cls, group: dist.ProcessGroup, device: torch.device) -> Ranks:
        """This worker's place in a smaller group, for instance one dimension of a device mesh."""
        return cls(dist.get_rank(group), dist.get_world_size(group), device, group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over the group; the argument is left alone."""
        values = values.to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Every worker's tensor (equal shapes), stacked: [world_size, ...] on the CPU."""
        if self.world_size == 1:
            return values.cpu().unsqueeze(0)
        parts = [torch.empty_like(values, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, values.to(self.device), group=self.group)
        return torch.stack(parts).cpu()

    def on_first(self, action: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T:
        """Run `action` on rank 0 of all workers and give its result to all; when it raises, every worker raises.

        The others wait, so nobody runs ahead of a checkpoint that is being written. They first run `meanwhile`: their
        part of the exchanges that `action` makes. Rank 0 runs it after `action`, for what a failed action left out.
        """
        assert self.group is None, "only the group of all workers has one first worker"
        outcome: list[object] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except Exception as error:
                if self.world_size == 1:
                    raise
                outcome[1] = error
        if self.world_size > 1:
            meanwhile()
        if self.world_size > 1:
            sent = [outcome[0], str(outcome[1]) if outcome[1] else None]
            dist.broadcast_object_list(sent, src=0, device=self.device)
            if not self.is_first and sent[1] is not None:
                raise TrainingError(f"rank 0 stopped the run: {sent[1]}")
            if isinstance(outcome[1], Exception):
                raise outcome[1]
            outcome[0] = sent[0]
        return outcome[0]  # type: ignore[return-value]


def is_users_error(error: BaseException) -> bool:
    """Whether starting the workers again cannot help: the error says what a person has to change."""
    return isinstance(error, DeepSeekRayError)
