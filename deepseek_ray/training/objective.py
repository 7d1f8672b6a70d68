"""What a step minimises: the losses of one micro-batch as its share of the whole optimiser step.

Sums are divided by counts of the whole step, which are known before the first forward pass, so the gradient does not
depend on how the sequences are spread over micro-batches and workers. Letters: B sequences, S input tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.loader import Batch
from deepseek_ray.models.decoder import ModelOutput
from deepseek_ray.nn.gate import GateOutput
from deepseek_ray.training.loss import IGNORED_TARGET, cross_entropy_sum, next_tokens, sequence_balance_loss


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass, on the worker's device."""

    input_ids: Tensor
    """[B, S]."""
    mask_ids: Tensor | None
    """[B, S] document of each input token, or None; see `documents_to_mask`."""
    targets: tuple[Tensor, ...]
    """One per depth; depth d has [B, S - d], as the model's output."""
    counts: Tensor
    """[depths] int64: predicted tokens."""

    @classmethod
    def of(cls, batch: Batch, depths: int, device: torch.device) -> MicroBatch:
        tokens, documents = batch["tokens"], batch["document_ids"]
        length = tokens.shape[1] - 1
        wanted = batch.get("loss_mask")
        targets = [next_tokens(tokens, documents, 1 + depth, wanted)[:, : length - depth] for depth in range(depths)]
        mask_ids = documents_to_mask(documents[:, :-1])
        return cls(
            input_ids=tokens[:, :-1].to(device),
            mask_ids=None if mask_ids is None else mask_ids.to(device),
            targets=tuple(target.to(device) for target in targets),
            counts=torch.stack([(target != IGNORED_TARGET).sum() for target in targets]),
        )


@dataclass(frozen=True)
class Objective:
    """The loss of one optimiser step. Every part of it is additive over micro-batches, workers and layers."""

    config: PretrainConfig
    counts: Tensor
    """[depths] predicted tokens of the whole step, over all workers; at least 1 each."""

    def losses(self, output: ModelOutput, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss, and its detached float64 sums [depths + 1].

        The sums are the cross-entropies of each depth, then the share of the balance loss.
        """
        outputs = (output, *output.mtp)
        loss, sums = self.prediction_loss([out.logits for out in outputs], part)
        gates = [gate for out in outputs for gate in out.gates]
        balance = self.balance_losses(gates, part.input_ids.shape[0])
        loss = loss + self.config.balance.sequence_loss_alpha * balance.sum()
        measured = balance.detach().mean() if gates else torch.zeros_like(loss)
        return loss, torch.stack([*sums, measured.detach()]).double()

    def prediction_loss(self, logits: Sequence[Tensor], part: MicroBatch) -> tuple[Tensor, list[Tensor]]:
        """Cross-entropy share of one micro-batch from each depth's logits, and the detached sum of each depth."""
        sums = [cross_entropy_sum(own, targets) for own, targets in zip(logits, part.targets, strict=True)]
        loss = sums[0] / self.counts[0]
        for depth_sum, count in zip(sums[1:], self.counts[1:], strict=True):
            loss = loss + self.config.training.mtp_loss_weight / (len(sums) - 1) * depth_sum / count
        return loss, [depth_sum.detach() for depth_sum in sums]

    def balance_losses(self, gates: Sequence[GateOutput], num_sequences: int) -> Tensor:
        """[layers] share of the sequence-wise balance loss of each layer with experts, before the factor alpha."""
        if not gates:
            return torch.zeros(1, device=self.counts.device)
        share = num_sequences / self.config.training.global_batch_size
        return share * torch.stack([sequence_balance_loss(gate.scores, gate.expert_ids) for gate in gates])


def trains_mtp(config: PretrainConfig) -> bool:
    return config.model.num_nextn_predict_layers > 0 and config.training.mtp_loss_weight > 0


def num_depths(config: PretrainConfig) -> int:
    """Tokens that each place predicts: the next one, and one more per trained multi-token-prediction layer."""
    return 1 + (config.model.num_nextn_predict_layers if trains_mtp(config) else 0)


def autocast(config: PretrainConfig, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.training.precision == "bf16")


def documents_to_mask(document_ids: Tensor) -> Tensor | None:
    """The ids, or None when no sample holds two documents: plain causal attention is then the same, and faster."""
    return None if bool((document_ids[:, 0] == document_ids[:, -1]).all()) else document_ids
