"""What strategies that divide one model among workers have in common: the mesh, shards, gradients and their norm.

The mesh has two dimensions: "data", then the strategy's own, so that the workers of one model are neighbours in rank
and, as a rule, on one node. (Its groups are formed here and not by torch's `init_device_mesh`, which gives them no
timeout.) Parameters stay plain tensors: a worker's slice is a parameter of its own to the optimiser,
and `Shard` says what it is a slice of. torch's DTensor would say the same, but knows no slice of two stacked matrices
(an expert's gate above its up projection) and does not mix with the plain tensors of the rest in one operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.training.collectives import sum_gradients
from deepseek_ray.training.objective import MicroBatch, Objective
from deepseek_ray.training.optimizer_state import STATE_KINDS, OptimizerFile, state_name
from deepseek_ray.training.parallel import Parallelism
from deepseek_ray.training.ranks import Ranks


@dataclass(frozen=True)
class Shard:
    """Equal slices of one dimension over the ranks of a group, in rank order."""

    group: dist.ProcessGroup
    dim: int = 0
    blocks: int = 1
    """Matrices that are stacked in this dimension and sliced one by one."""

    def cut(self, full: Tensor) -> Tensor:
        """This rank's slice, a tensor of its own."""
        slices = self._blockwise(full).chunk(dist.get_world_size(self.group), dim=self.dim + 1)
        return slices[dist.get_rank(self.group)].flatten(self.dim, self.dim + 1).clone()

    def gather(self, own: Tensor) -> Tensor:
        """The full tensor, on every rank; all ranks of the group call it."""
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat([self._blockwise(part) for part in parts], dim=self.dim + 1).flatten(self.dim, self.dim + 1)

    def _blockwise(self, x: Tensor) -> Tensor:
        """`dim` as two dimensions: blocks, and places in a block."""
        return x.unflatten(self.dim, (self.blocks, -1))


class Division:
    """The slices a worker keeps of a model's parameters, while it is being divided and afterwards."""

    def __init__(self) -> None:
        self._shards: dict[Tensor, Shard] = {}
        self._parts: dict[Tensor, nn.Parameter] = {}
        self.partial: list[nn.Parameter] = []
        """Whole parameters of which every worker has a part of the gradient; see `share`."""

    def divide(self, parameter: Tensor, shard: Shard) -> nn.Parameter:
        """The slice of `parameter`; one that is shared by several modules is sliced once."""
        if parameter not in self._parts:
            part = nn.Parameter(shard.cut(parameter.detach()), requires_grad=parameter.requires_grad)
            self._parts[parameter] = part
            self._shards[part] = shard
        return self._parts[parameter]

    def share(self, parameter: nn.Parameter) -> None:
        """Keep `parameter` whole, though each worker computes with it on its own slice of something else."""
        self.partial.append(parameter)

    def finish(self) -> None:
        """Let go of the whole parameters; `divide` is called no more."""
        self._parts.clear()

    def shard_of(self, parameter: Tensor) -> Shard | None:
        """None: the worker has the whole parameter."""
        return self._shards.get(parameter)


class MeshParallelism(Parallelism):
    """A model divided over the second dimension of a mesh of data x `size` workers."""

    def __init__(self, config: PretrainConfig, world: Ranks, dimension: str, size: int) -> None:
        super().__init__(config, world)
        mesh = torch.arange(world.world_size).view(-1, size)
        self.group = self._form_groups(mesh, dimension)
        self.data_group = self._form_groups(mesh.T, "data")
        self.data = Ranks.within(self.data_group, world.device)
        self.division = Division()

    def _form_groups(self, ranks: Tensor, name: str) -> dist.ProcessGroup:
        """One group of each row of `ranks`, with the run's timeout; returns this worker's. All workers call it."""
        timeout = timedelta(seconds=self.config.distributed.timeout_s)
        group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout, group_desc=name)
        return group

    def forward_backward(self, parts: Sequence[MicroBatch], objective: Objective) -> Tensor:
        sums = super().forward_backward(parts, objective)
        self._sum_gradients()
        return sums

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _sum_gradients(self) -> None:
        """Once per step: the gradients of workers that hold the same parameters and saw different tokens."""
        if self.data.world_size > 1:
            sum_gradients(self._trained_parameters(), self.data_group)

    def clip_gradients(self, max_norm: float) -> float:
        """Each parameter counts once, however many workers of the model have it."""
        parameters = [parameter for parameter in self._trained_parameters() if parameter.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for parameter in parameters:
            square = torch.linalg.vector_norm(parameter.grad).double().square()
            squares += square / self._num_holders(parameter)
        norm = Ranks.within(self.group, self.world.device).sum(squares).sqrt().float()
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm.item()

    def _num_holders(self, parameter: nn.Parameter) -> int:
        """Workers of the model that have this very parameter."""
        return 1 if self.division.shard_of(parameter) else dist.get_world_size(self.group)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in self.model.state_dict().items():
            yield name, self._whole(parameters.get(name, tensor), tensor)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.model.named_parameters())
        for name, shape in self.trained.items():
            state = self.optimizer.state.get(parameters[name], {})
            for kind in STATE_KINDS:
                if kind == "step":
                    yield state_name(kind, name), state.get(kind, torch.zeros(()))
                else:
                    empty = torch.zeros(shape)
                    yield state_name(kind, name), self._whole(parameters[name], state[kind]) if state else empty

    def load_optimizer_state(self, file: OptimizerFile) -> None:
        for name, parameter in self.model.named_parameters():
            if state := file.state(name):
                shard = self.division.shard_of(parameter)
                self.optimizer.state[parameter] = {
                    kind: (shard.cut(value) if shard and kind != "step" else value.clone()).to(parameter.device)
                    for kind, value in state.items()
                }

    def _whole(self, parameter: Tensor, own: Tensor) -> Tensor:
        """`own`, a value of the parameter's shape, whole: the parameter itself or a moment of it."""
        shard = self.division.shard_of(parameter)
        return shard.gather(own.detach()) if shard else own.detach()


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put another module in the place of each key, in every place that has it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in replacements:
                setattr(parent, name, replacements[child])
