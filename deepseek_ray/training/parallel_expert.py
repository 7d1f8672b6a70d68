"""Expert parallel training: the workers of the "expert" dimension divide the routed experts, all else is whole.

Every worker reads its own sequences. In a layer with experts, each sends the rows of its tokens to the workers that
have the chosen experts, which compute them and send them back (an all-to-all each way, and two in the backward pass;
GShard, arXiv 2006.16668). No token is dropped, whatever the load; rows come back to the slots they left, so weighing
and summing them is the single process's. A worker may send or receive nothing.

An expert's gradient comes from the tokens of all workers of its "expert" group and is summed over "data"; the gradient
of what is whole is summed over all workers. Numbers differ from one process's by the order of sums over tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.nn.experts import Experts
from deepseek_ray.training.adapter_layers import LoraExperts
from deepseek_ray.training.collectives import exchange_rows, sum_gradients
from deepseek_ray.training.parallel import Forward
from deepseek_ray.training.parallel_mesh import Division, MeshParallelism, Shard, replace_modules
from deepseek_ray.training.ranks import Ranks


class ExpertParallel(MeshParallelism):
    """data_parallel_size x expert_parallel_size workers, which all read different sequences."""

    def __init__(self, config: PretrainConfig, world: Ranks) -> None:
        super().__init__(config, world, "expert", config.distributed.expert_parallel_size)
        self.data = world

    def _shard(self, model: DeepSeekForCausalLM) -> Forward:
        layers = [module for module in model.modules() if isinstance(module, Experts)]
        replace_modules(model, {layer: divide_experts(layer, self.group, self.division) for layer in layers})
        self.division.finish()
        model.to(self.world.device)
        return model

    def _sum_gradients(self) -> None:
        trained = self._trained_parameters()
        divided = [parameter for parameter in trained if self.division.shard_of(parameter)]
        if dist.get_world_size(self.data_group) > 1:
            sum_gradients(divided, self.data_group)
        if self.world.world_size > 1:
            sum_gradients([parameter for parameter in trained if not self.division.shard_of(parameter)])


def divide_experts(experts: Experts, group: dist.ProcessGroup, division: Division) -> DividedExperts:
    """This rank's experts of a layer, with their adapters if it has any."""
    if isinstance(experts, LoraExperts):
        return DividedLoraExperts(experts, group, division)
    return DividedExperts(experts, group, division)


class DividedExperts(Experts):
    """The experts of one layer, of which this rank has the weights of E / ranks consecutive ones."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup, division: Division) -> None:
        super(Experts, self).__init__()
        self._group = group
        self.gate_up = division.divide(experts.gate_up, Shard(group))
        self.down = division.divide(experts.down, Shard(group))

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows: [N, H] of this rank's tokens in the order of all E experts; counts: [E]. Returns [N, H], as it came."""
        to_each, from_each = self._exchange_counts(counts)
        sent, received = to_each.sum(1).tolist(), from_each.sum(1).tolist()
        arrived = exchange_rows(rows, sent, received, self._group)
        order = _by_expert(from_each)
        computed = super().compute(arrived[order], from_each.sum(0))
        return exchange_rows(computed[order.argsort()], received, sent, self._group)

    def _exchange_counts(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for each rank's experts from this rank, and for this rank's experts from each rank: [ranks, own]."""
        to_each = counts.view(dist.get_world_size(self._group), -1)
        from_each = torch.empty_like(to_each)
        dist.all_to_all_single(from_each, to_each.contiguous(), group=self._group)
        return to_each, from_each


class DividedLoraExperts(DividedExperts, LoraExperts):
    """The same for experts that all have adapters in the same projections."""

    def __init__(self, experts: LoraExperts, group: dist.ProcessGroup, division: Division) -> None:
        super().__init__(experts, group, division)
        self.config, self.projections = experts.config, experts.projections
        for name in self.projections:
            adapters = experts.adapters(name)
            adapters.lora_A = division.divide(adapters.lora_A, Shard(group))
            adapters.lora_B = division.divide(adapters.lora_B, Shard(group))
            adapters.experts = tuple(range(len(adapters.lora_A)))
            self.add_module(name, adapters)


def _by_expert(counts: Tensor) -> Tensor:
    """Rows that lie by (rank, expert), in the order (expert, rank). counts: [ranks, experts]; returns [rows] int64."""
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    return experts.repeat_interleave(counts.flatten()).argsort(stable=True)
