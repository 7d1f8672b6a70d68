"""One optimiser step: forward and backward over the micro-batches, one exchange of gradients, clip, update, balance.

The result does not depend on how the step's sequences are spread over micro-batches and workers, up to rounding: losses
are sums divided by counts of the whole step, which are known before the first forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_ray.data.loader import Batch
from deepseek_ray.errors import TrainingError
from deepseek_ray.training.balance import Balancer, max_violation
from deepseek_ray.training.memory import keep_freed_memory
from deepseek_ray.training.objective import MicroBatch, Objective, num_depths
from deepseek_ray.training.parallel import Parallelism
from deepseek_ray.training.schedule import learning_rate


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured; equal on every worker."""

    loss: float
    """Cross-entropy per predicted token, nats."""
    mtp_loss: float | None
    """The same for the multi-token-prediction layers, their mean; None for a model without."""
    balance_loss: float
    """Sequence-wise balance loss before its factor alpha, mean over layers; 1 is even."""
    gradient_norm: float
    """Euclidean norm before clipping."""
    learning_rate: float
    max_violation: float
    """(max load - mean load) / mean load of the step, mean over layers."""


class TrainStep:
    """Holds what every step needs; `run` does one. Made after `Parallelism.prepare`."""

    def __init__(self, parallelism: Parallelism) -> None:
        self._parallelism = parallelism
        self._config = parallelism.config
        self._device = parallelism.world.device
        if self._device.type == "cpu":
            keep_freed_memory()
        self._balancer = Balancer(
            parallelism.model.moe_modules, self._config.balance.bias_update_speed, parallelism.data
        )

    def run(self, step: int, batches: Sequence[Batch]) -> StepMetrics:
        """Train on this worker's micro-batches as optimiser step `step` (counted from 1).

        Raises TrainingError, on every worker and before the weights change, when loss or gradient is not finite.
        """
        data = self._parallelism.data
        parts = [MicroBatch.of(batch, num_depths(self._config), self._device) for batch in batches]
        counts = data.sum(torch.stack([part.counts for part in parts]).sum(0)).clamp(min=1)
        sums = self._parallelism.forward_backward(parts, Objective(self._config, counts))
        return self._update(step, data.sum(sums), counts)

    def _update(self, step: int, sums: Tensor, counts: Tensor) -> StepMetrics:
        rate = learning_rate(
            step,
            self._config.total_steps,
            self._config.optimizer.lr,
            self._config.schedule.warmup_steps,
            self._config.schedule.floor,
        )
        means = (sums[:-1] / counts).tolist()
        norm = self._parallelism.clip_gradients(self._config.training.clip_grad_norm)
        if not (math.isfinite(sum(means)) and math.isfinite(norm)):
            raise _not_finite(step, means[0], norm, rate)
        self._parallelism.update(rate)
        load = self._parallelism.counts_of_every_layer(self._balancer.step())
        used = load[load.sum(dim=-1) > 0]
        return StepMetrics(
            loss=means[0],
            mtp_loss=sum(means[1:]) / len(means[1:]) if len(means) > 1 else None,
            balance_loss=sums[-1].item(),
            gradient_norm=norm,
            learning_rate=rate,
            max_violation=max_violation(used).mean().item() if len(used) else 0.0,
        )


def _not_finite(step: int, loss: float, norm: float, rate: float) -> TrainingError:
    what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    return TrainingError(
        f"step {step}: {what} at learning rate {rate:.3g}; the weights were left as they were, saved checkpoints are "
        "intact. Start the run again with a lower optimizer.lr, more schedule.warmup_steps or a lower "
        "training.clip_grad_norm (and precision fp32 if it is bf16): it resumes from the newest checkpoint"
    )
