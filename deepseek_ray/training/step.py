"""One optimiser step: forward and backward over the micro-batches, one exchange of gradients, clip, update, balance.

The result does not depend on how the step's sequences are spread over micro-batches and workers, up to rounding: losses
are sums divided by counts of the whole step, which are known before the first forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.loader import Batch
from deepseek_ray.errors import TrainingError
from deepseek_ray.models.decoder import DeepSeekForCausalLM, ModelOutput
from deepseek_ray.training.balance import Balancer, max_violation
from deepseek_ray.training.loss import IGNORED_TARGET, cross_entropy_sum, next_tokens, sequence_balance_loss
from deepseek_ray.training.optimizer import set_learning_rate
from deepseek_ray.training.ranks import Ranks
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
    """Holds what every step needs; `run` does one."""

    def __init__(
        self, model: DeepSeekForCausalLM, optimizer: torch.optim.Optimizer, config: PretrainConfig, ranks: Ranks
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._ranks = ranks
        self._balancer = Balancer(list(model.moe_modules), config.balance.bias_update_speed, ranks)
        self._with_mtp = trains_mtp(config)
        self._parallel = _in_parallel(model, ranks)

    def run(self, step: int, batches: Sequence[Batch]) -> StepMetrics:
        """Train on this worker's micro-batches as optimiser step `step` (counted from 1).

        Raises TrainingError, on every worker and before the weights change, when loss or gradient is not finite.
        """
        prepared = [_Prepared.of(batch, self._depths, self._ranks.device) for batch in batches]
        counts = self._ranks.sum(torch.stack([part.counts for part in prepared]).sum(0)).clamp(min=1)
        self._model.train()
        sums = torch.zeros(len(counts) + 1, dtype=torch.float64, device=self._ranks.device)
        for index, part in enumerate(prepared):
            with self._gradients_stay_here(index + 1 < len(prepared)):
                loss, values = self._losses(part, counts)
                (loss * self._ranks.world_size).backward()  # the exchange takes the mean over workers
            sums += values
        return self._update(step, self._ranks.sum(sums), counts)

    @property
    def _depths(self) -> int:
        """Tokens that each place predicts: the next one, and one more per multi-token-prediction layer."""
        return 1 + (len(self._model.mtp) if self._with_mtp else 0)

    def _losses(self, part: _Prepared, counts: Tensor) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss, and its detached sums: one per depth, then the balance loss."""
        with autocast(self._config, self._ranks.device):
            output: ModelOutput = self._parallel(part.input_ids, part.mask_ids, with_mtp=self._with_mtp)
        outputs = (output, *output.mtp)
        sums = [cross_entropy_sum(out.logits, targets) for out, targets in zip(outputs, part.targets, strict=True)]
        loss = sums[0] / counts[0]
        for depth_sum, count in zip(sums[1:], counts[1:], strict=True):
            loss = loss + self._config.training.mtp_loss_weight / (len(sums) - 1) * depth_sum / count
        gates = [gate for out in outputs for gate in out.gates]
        balance = torch.zeros((), device=self._ranks.device)
        if gates:
            share = part.input_ids.shape[0] / self._config.training.global_batch_size
            per_layer = torch.stack([sequence_balance_loss(gate.scores, gate.expert_ids) for gate in gates])
            loss = loss + self._config.balance.sequence_loss_alpha * share * per_layer.sum()
            balance = share * per_layer.mean()
        return loss, torch.stack([*sums, balance]).detach().double()

    def _update(self, step: int, sums: Tensor, counts: Tensor) -> StepMetrics:
        rate = learning_rate(
            step,
            self._config.total_steps,
            self._config.optimizer.lr,
            self._config.schedule.warmup_steps,
            self._config.schedule.floor,
        )
        means = (sums[:-1] / counts).tolist()
        norm = nn.utils.clip_grad_norm_(self._trained_parameters(), self._config.training.clip_grad_norm).item()
        if not (math.isfinite(sum(means)) and math.isfinite(norm)):
            raise _not_finite(step, means[0], norm, rate)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        load = self._balancer.step()
        used = load[load.sum(dim=-1) > 0]
        return StepMetrics(
            loss=means[0],
            mtp_loss=sum(means[1:]) / len(means[1:]) if len(means) > 1 else None,
            balance_loss=sums[-1].item(),
            gradient_norm=norm,
            learning_rate=rate,
            max_violation=max_violation(used).mean().item() if len(used) else 0.0,
        )

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _gradients_stay_here(self, stay: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients once per step, in the backward pass of the last micro-batch."""
        if stay and isinstance(self._parallel, DistributedDataParallel):
            return self._parallel.no_sync()
        return nullcontext()


def trains_mtp(config: PretrainConfig) -> bool:
    return config.model.num_nextn_predict_layers > 0 and config.training.mtp_loss_weight > 0


def autocast(config: PretrainConfig, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.training.precision == "bf16")


def documents_to_mask(document_ids: Tensor) -> Tensor | None:
    """The ids, or None when no sample holds two documents: plain causal attention is then the same, and faster."""
    return None if bool((document_ids[:, 0] == document_ids[:, -1]).all()) else document_ids


@dataclass(frozen=True)
class _Prepared:
    """One micro-batch on the worker's device."""

    input_ids: Tensor
    """[B, S]."""
    mask_ids: Tensor | None
    """[B, S] document of each input token, or None; see `documents_to_mask`."""
    targets: tuple[Tensor, ...]
    """One per depth; depth d has [B, S - d], as the model's output."""
    counts: Tensor
    """[depths] int64: predicted tokens."""

    @classmethod
    def of(cls, batch: Batch, depths: int, device: torch.device) -> _Prepared:
        tokens, documents = batch["tokens"], batch["document_ids"]
        length = tokens.shape[1] - 1
        targets = [next_tokens(tokens, documents, 1 + depth)[:, : length - depth] for depth in range(depths)]
        mask_ids = documents_to_mask(documents[:, :-1])
        return cls(
            input_ids=tokens[:, :-1].to(device),
            mask_ids=None if mask_ids is None else mask_ids.to(device),
            targets=tuple(target.to(device) for target in targets),
            counts=torch.stack([(target != IGNORED_TARGET).sum() for target in targets]),
        )


def _in_parallel(model: DeepSeekForCausalLM, ranks: Ranks) -> nn.Module:
    """Buffers are not broadcast: every worker moves the correction biases by the same counts."""
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def _not_finite(step: int, loss: float, norm: float, rate: float) -> TrainingError:
    what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
    return TrainingError(
        f"step {step}: {what} at learning rate {rate:.3g}; the weights were left as they were, saved checkpoints are "
        "intact. Start the run again with a lower optimizer.lr, more schedule.warmup_steps or a lower "
        "training.clip_grad_norm (and precision fp32 if it is bf16): it resumes from the newest checkpoint"
    )
