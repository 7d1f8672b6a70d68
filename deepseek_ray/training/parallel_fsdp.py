"""Weights, gradients and optimiser state are shared out; a layer is whole only while it is computed (FSDP2).

torch's `fully_shard` makes every parameter a DTensor cut along its first dimension and gathers a group of them around
the forward and backward pass of the module it was called on. Groups, inner first: the routed experts of a layer, the
rest of the layer; embedding, head, final norm and what multi-token-prediction layers compute outside their `forward`
belong to the root, because several modules use them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from deepseek_ray.models.decoder import DeepSeekForCausalLM, MTPLayer
from deepseek_ray.training.objective import MicroBatch
from deepseek_ray.training.parallel import Forward, Parallelism


class FullySharded(Parallelism):
    """FSDP2. Gradients are exchanged after every micro-batch: kept back they would be whole on every worker."""

    def _shard(self, model: DeepSeekForCausalLM) -> Forward:
        model.to(self.world.device)
        if self.world.world_size > 1:
            # It warns of in-place changes of a module's output; the decoder makes none.
            warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
            mesh = init_device_mesh(self.world.device.type, (self.world.world_size,), mesh_dim_names=("data",))
            for module, policy in self._groups(model):
                fully_shard(module, mesh=mesh, mp_policy=policy)
        return model

    def _groups(self, model: DeepSeekForCausalLM) -> Iterator[tuple[nn.Module, MixedPrecisionPolicy]]:
        """What to gather together, inner modules first, and in what precision.

        With bf16 a layer's weights are gathered rounded, half the bytes; autocast rounds them for its products anyway.
        Gates and the root stay exact.
        """
        exact = rounded = MixedPrecisionPolicy()
        if self.config.training.precision == "bf16":
            rounded = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
            yield from ((moe.gate, exact) for moe in model.moe_modules)
        yield from ((moe.experts, rounded) for moe in model.moe_modules)
        yield from ((layer, rounded) for layer in model.model.layers)
        for layer in model.mtp:
            assert isinstance(layer, MTPLayer)
            yield layer.self_attn, rounded
            yield layer.mlp, rounded
        yield model, exact

    def validation_sums(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        measured = super().validation_sums(part)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # without a backward pass the root stays gathered
        return measured
