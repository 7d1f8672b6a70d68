"""How the workers of a run share one model: the seam between the training loop and each strategy.

The loop knows one class, `Parallelism`; `training/strategies.py` picks the subclass that `distributed.strategy` names.
The decoder is written for one process and stays so: a strategy wraps, shards or cuts it from outside.

What a subclass gives, in the order the loop asks for it:

1. `__init__` forms the device mesh and sets `data`, this worker's place among those that read different sequences.
   Workers that see the same tokens (tensor and pipeline ranks) have equal places in it. Losses, token counts and expert
   loads are summed over `data`, never over `world`.
2. `_shard(model)` gets the whole model on the CPU, weights as initialised or read from a checkpoint, equal on every
   worker. It puts this worker's part on the device and returns what forward passes call. `_build_optimizer` then makes
   an optimiser over what is left.
3. `forward_backward` runs all micro-batches of a step. The loop below suits strategies in which every worker computes
   whole forward passes; they override `_exchange` or `_backward`. A pipeline overrides the method and uses the parts of
   `Objective`. The sums it returns are equal on workers with equal places in `data`.
4. `clip_gradients` and `update`. The norm is that of the whole gradient, the same number on every worker.
5. `validation_sums` is one forward pass without gradients; every worker of the run makes equally many.
6. `weights` and `optimizer_state` give whole tensors one at a time on rank 0, and `load_optimizer_state` takes them
   back, whatever strategy and world size wrote them. Base versions: plain tensors and DTensors of any placement.

A checkpoint therefore never shows how the run that wrote it was spread. Tests hold each strategy to one worker's curve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.models.decoder import DeepSeekForCausalLM, ModelOutput
from deepseek_ray.training.lora import Adapters, find_adapters
from deepseek_ray.training.loss import cross_entropy_sum
from deepseek_ray.training.objective import MicroBatch, Objective, autocast, trains_mtp
from deepseek_ray.training.optimizer import build_optimizer, set_learning_rate
from deepseek_ray.training.optimizer_state import STATE_KINDS, OptimizerFile, state_name
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.sharding import like, whole

Forward = Callable[..., ModelOutput]


class Parallelism(ABC):
    """One worker's part in sharing a model."""

    model: DeepSeekForCausalLM
    """The decoder, or what this worker has of it, after `prepare`."""
    optimizer: torch.optim.Optimizer
    trained: dict[str, tuple[int, ...]]
    """Name and whole shape of every trained parameter, in the model's order."""
    adapters: Adapters | None
    """Where the whole model has adapters; None when it has none."""

    def __init__(self, config: PretrainConfig, world: Ranks) -> None:
        self.config = config
        self.world = world
        self.data = world
        self.with_mtp = trains_mtp(config)

    def prepare(self, model: DeepSeekForCausalLM) -> None:
        """Take the whole model, equal on every worker, and keep this worker's part of it and of the optimiser."""
        self.trained = {name: tuple(own.shape) for name, own in model.named_parameters() if own.requires_grad}
        self.adapters = find_adapters(model)
        self.model = model
        self.forward = self._shard(model)
        self.optimizer = self._build_optimizer()

    @abstractmethod
    def _shard(self, model: DeepSeekForCausalLM) -> Forward:
        """Put this worker's part of `model` on its device; returns what a forward pass calls."""

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model.named_parameters(), self.config.optimizer)

    def forward_backward(self, parts: Sequence[MicroBatch], objective: Objective) -> Tensor:
        """Accumulate the gradients of a step's micro-batches; returns `Objective.losses`' sums over this worker's."""
        self.model.train()
        total = torch.zeros(len(objective.counts) + 1, dtype=torch.float64, device=self.world.device)
        for index, part in enumerate(parts):
            with self._exchange(is_last=index + 1 == len(parts)):
                with autocast(self.config, self.world.device):
                    output = self.forward(part.input_ids, part.mask_ids, with_mtp=self.with_mtp)
                loss, sums = objective.losses(output, part)
                self._backward(loss)
            total += sums
        return total

    def _exchange(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: where a strategy defers the exchange to the last one."""
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient. After the last one every gradient is the sum over all workers of `data`."""
        (loss * self.data.world_size).backward()  # torch's own exchanges take the mean

    def clip_gradients(self, max_norm: float) -> float:
        """The Euclidean norm of the whole gradient; a larger one than `max_norm` is scaled down before `update`."""
        return float(whole(nn.utils.clip_grad_norm_(self._trained_parameters(), max_norm)))

    def update(self, rate: float) -> None:
        """One optimiser step at a learning rate; the gradients are gone afterwards."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def counts_of_every_layer(self, own: Tensor) -> Tensor:
        """Expert loads [layers of the model, experts] from those of this worker's layers, summed over `data`."""
        return own

    def validation_sums(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Sum of next-token cross-entropies (scalar) and expert loads [layers, experts] of one micro-batch.

        The layers are the main model's, without those that predict further tokens.
        """
        self.model.eval()
        with torch.no_grad(), autocast(self.config, self.world.device):
            output = self.forward(part.input_ids, part.mask_ids)
        experts = self.config.model.n_routed_experts
        loads = [gate.expert_ids.flatten().bincount(minlength=experts) for gate in output.gates]
        empty = torch.zeros(0, experts, dtype=torch.int64, device=self.world.device)
        return cross_entropy_sum(output.logits, part.targets[0]), torch.stack(loads) if loads else empty

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the model's state by its own name. All workers iterate; rank 0's tensors are whole."""
        for name, tensor in self.model.state_dict().items():
            yield name, whole(tensor)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """The state of every trained parameter, as `state_shapes(trained)` lists it, in the manner of `weights`."""
        parameters = dict(self.model.named_parameters())
        for name, shape in self.trained.items():
            state: dict[str, Any] = self.optimizer.state.get(parameters[name], {})
            for kind in STATE_KINDS:
                empty = torch.zeros(() if kind == "step" else shape)
                yield state_name(kind, name), whole(state[kind]) if state else empty

    def load_optimizer_state(self, file: OptimizerFile) -> None:
        """Put back what `optimizer_state` gave to any strategy: this worker's part of each tensor."""
        for name, parameter in self.model.named_parameters():
            if state := file.state(name):
                self.optimizer.state[parameter] = {
                    kind: value.to(parameter.device) if kind == "step" else like(parameter, value)
                    for kind, value in state.items()
                }

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
