"""How the workers of a run share one model: the section `distributed:`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.errors import ConfigError

Strategy = Literal["ddp", "fsdp", "deepspeed", "tensor", "expert", "pipeline"]

_OWN_SIZE = {"tensor": "tensor_parallel_size", "expert": "expert_parallel_size", "pipeline": "pipeline_parallel_size"}
"""Of the strategies that divide the model itself: among how many workers."""


class DistributedConfig(FrozenConfig):
    """How one model is spread over workers."""

    strategy: Strategy = "ddp"
    """`ddp`: every worker holds the whole model and the gradients are averaged. `fsdp`: weights, gradients and
    optimiser state are shared out, layers gathered while they are computed. `deepspeed`: the same by ZeRO, as far as
    `zero_stage` says. `tensor`: workers share every matrix product. `expert`: workers share the routed experts.
    `pipeline`: workers have different layers."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Workers that share one model with strategy `tensor`."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Stages of one model with strategy `pipeline`."""
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of forward and backward passes in a pipeline; gpipe keeps the activations of all micro-batches."""
    data_parallel_size: int | tuple[int, int] = 1
    """Models that are trained side by side on different sequences; the run has this times the strategy's own size of
    workers. A pair [least, most] is elastic: the run takes as many workers as the cluster has, and is started again
    from its newest checkpoint when that changes."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Workers that share one set of routed experts with strategy `expert`; each reads its own sequences."""
    zero_stage: Literal[1, 2, 3] = 2
    """Strategy `deepspeed`: share out optimiser state (1), gradients too (2), weights too (3)."""
    offload: bool = False
    """Strategy `deepspeed`: keep the optimiser's state, at stage 3 the weights too, in host memory and update there."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    """Forward passes per optimiser step and worker; None derives it from the batch sizes."""
    resize_interval_s: int = Field(default=60, ge=1)
    """Elastic runs: seconds between two looks for nodes that came. More workers cost a start from the newest
    checkpoint; a node that goes is noticed at once."""
    timeout_s: int = Field(default=1800, ge=1)
    """Seconds after which a collective operation between workers counts as failed."""

    @property
    def is_elastic(self) -> bool:
        return isinstance(self.data_parallel_size, tuple)

    @property
    def data_sizes(self) -> range:
        """Every number of models that may be trained side by side."""
        size = self.data_parallel_size
        least, most = size if isinstance(size, tuple) else (size, size)
        return range(least, most + 1)

    @property
    def num_workers(self) -> int:
        """Workers of the whole run; the most of an elastic one."""
        return self.data_sizes[-1] * self.tensor_parallel_size * self.expert_parallel_size * self.pipeline_parallel_size

    @property
    def num_readers(self) -> int:
        """Workers, or groups of workers, that read different sequences; the most of an elastic run."""
        return self.data_sizes[-1] * self.expert_parallel_size

    def describe_mesh(self) -> str:
        sizes = ["data_parallel_size", *([_OWN_SIZE[self.strategy]] if self.strategy in _OWN_SIZE else [])]
        return " x ".join(f"{name} {getattr(self, name)}" for name in sizes)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_data_sizes()
        if self.offload and self.strategy != "deepspeed":
            raise ConfigError(
                f"distributed.offload is true, but strategy {self.strategy!r} keeps everything on the device; set "
                "it to false, or the strategy to 'deepspeed'"
            )
        own = _OWN_SIZE.get(self.strategy)
        for strategy, name in _OWN_SIZE.items():
            if name != own and getattr(self, name) != 1:
                raise ConfigError(
                    f"distributed.{name} is {getattr(self, name)}, but strategy {self.strategy!r} does not divide a "
                    f"model in this way; set it to 1, or the strategy to {strategy!r}"
                )
        if own is not None and getattr(self, own) == 1:
            raise ConfigError(
                f"distributed.strategy is {self.strategy!r} and {own} is 1; set it to at least 2, or the strategy to "
                "ddp"
            )
        return self

    def _check_data_sizes(self) -> None:
        size = self.data_parallel_size
        if not self.data_sizes or self.data_sizes[0] < 1:
            shown = list(size) if isinstance(size, tuple) else size
            raise ConfigError(
                f"distributed.data_parallel_size is {shown}; give a number from 1, or a pair [least, most] with 1 <= "
                "least <= most"
            )
        if self.is_elastic and self.strategy in _OWN_SIZE:
            raise ConfigError(
                f"distributed.data_parallel_size is {list(size)}, but strategy {self.strategy!r} cannot change its "  # type: ignore[arg-type]
                "number of workers; give one number, or set the strategy to ddp, fsdp or deepspeed"
            )
