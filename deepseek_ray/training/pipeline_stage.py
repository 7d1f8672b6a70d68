"""One stage of a pipeline: consecutive layers of the decoder, and what goes with the first and the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.nn.moe import MoE
from deepseek_ray.training.objective import MicroBatch, Objective, autocast, trains_mtp


def split_layers(sizes: Sequence[int], first: int, last: int, num_stages: int) -> list[range]:
    """Consecutive layers of each stage, at least one, so that the largest stage has the fewest parameters.

    sizes: parameters of each layer; `first` and `last`: those that the first and the last stage have beside them.
    """
    num_layers = len(sizes)
    extra = [0] * num_stages
    extra[0] += first
    extra[-1] += last
    # best[n]: (size of the largest stage, ends of the stages) for the first n layers on the stages so far
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(num_stages):
        following = num_stages - stage - 1
        reachable: dict[int, tuple[int, tuple[int, ...]]] = {}
        for end in range(stage + 1, num_layers - following + 1):
            reachable[end] = min(
                (max(largest, sum(sizes[start:end]) + extra[stage]), (*ends, end))
                for start, (largest, ends) in best.items()
                if start < end
            )
        best = reachable
    ends = (0, *best[num_layers][1])
    return [range(start, end) for start, end in pairwise(ends)]


def stage_layers(model: DeepSeekForCausalLM, num_stages: int) -> list[range]:
    """The layers of each stage of `model`; see `split_layers`."""
    embedding = model.model.embed_tokens.weight.numel()
    layers = [_size(layer) for layer in model.model.layers]
    ends = _size(model) - sum(layers) - embedding
    last = ends + (embedding if last_stage_embeds(model) else 0)
    return split_layers(layers, embedding, last, num_stages)


def last_stage_embeds(model: DeepSeekForCausalLM) -> bool:
    """Whether the last stage needs the embedding: as head, or below multi-token-prediction layers."""
    return model.config.tie_word_embeddings or len(model.mtp) > 0


def keep_stage(model: DeepSeekForCausalLM, layers: range) -> None:
    """Take away from `model` what another stage has; the names of the rest stay."""
    num_layers = len(model.model.layers)
    is_last = layers.stop == num_layers
    for index in set(range(num_layers)) - set(layers):
        model.model.layers[index] = nn.Identity()
    if layers.start > 0 and not (is_last and last_stage_embeds(model)):
        model.model.embed_tokens = nn.Identity()  # type: ignore[assignment]
    if not is_last:
        model.model.norm = nn.Identity()  # type: ignore[assignment]
        model.lm_head = nn.Identity()  # type: ignore[assignment]
        model.mtp = nn.ModuleList()


class Stage(nn.Module):
    """What a pipeline schedule calls, once per micro-batch: hidden states in, hidden states or the loss out.

    The schedule moves hidden states only. Ids, documents and targets lie with every stage, in `parts`; the schedule's
    own chunks are the numbers of the micro-batches.
    """

    parts: Sequence[MicroBatch]
    objective: Objective

    def __init__(self, model: DeepSeekForCausalLM, layers: range, config: PretrainConfig, num_gates: int) -> None:
        """num_gates: layers with experts of the whole model, those that predict further tokens among them."""
        super().__init__()
        self.model = model
        self._layers = layers
        self._config = config
        self._num_gates = num_gates
        self.is_first = layers.start == 0
        self.is_last = layers.stop == len(model.model.layers)

    def begin(self, parts: Sequence[MicroBatch], objective: Objective) -> None:
        """Before the forward passes of a step."""
        self.parts, self.objective = parts, objective
        self.sums = torch.zeros(len(objective.counts) + 1, dtype=torch.float64, device=objective.counts.device)
        """This stage's share of `Objective.losses`' sums, complete after the step."""

    def forward(self, hidden: Tensor, number: Tensor) -> Tensor:
        """hidden: [B, S, H] (anything on the first stage); number: [1] int64, on the CPU.

        Returns [B, S, H], or on the last stage the micro-batch's share of the loss. The balance loss of this stage's
        layers is part of its output's gradient.
        """
        part = self.parts[int(number)]
        with autocast(self._config, part.input_ids.device):
            hidden, gates = self.run_layers(hidden, part)
            if self.is_last:
                output = self.model.predict(hidden, part.input_ids, part.mask_ids, with_mtp=trains_mtp(self._config))
                gates = (*gates, *(gate for depth in output.mtp for gate in depth.gates))
                logits = [depth.logits for depth in (output, *output.mtp)]
        balance = self.objective.balance_losses(gates, part.input_ids.shape[0]).sum()
        if gates:
            self.sums[-1] += balance.detach() / self._num_gates
        balance = self._config.balance.sequence_loss_alpha * balance
        if not self.is_last:
            return _AddLoss.apply(hidden, balance)
        loss, sums = self.objective.prediction_loss(logits, part)
        self.sums[:-1] += torch.stack(sums)
        return loss + balance

    def run_layers(self, hidden: Tensor, part: MicroBatch) -> tuple[Tensor, tuple]:
        """hidden: [B, S, H], looked up here on the first stage -> the same shape, and what the gates decided."""
        if self.is_first:
            hidden = self.model.model.embed_tokens(part.input_ids)
        layers = [self.model.model.layers[index] for index in self._layers]
        return self.model.decode(hidden, layers, part.mask_ids)


def num_gates(model: DeepSeekForCausalLM, with_mtp: bool) -> int:
    """Layers with experts of the whole model, those that predict further tokens only `with_mtp`."""
    layers = [*model.model.layers, *(model.mtp if with_mtp else ())]
    return sum(isinstance(layer.mlp, MoE) for layer in layers)


class _AddLoss(torch.autograd.Function):
    """Passes x on; in the backward pass, `loss` gets the gradient that a term of the whole loss has: 1."""

    @staticmethod
    def forward(ctx: object, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=torch.float32, device=grad.device)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
