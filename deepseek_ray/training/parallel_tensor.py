"""Tensor parallel training: every matrix product of a layer is divided among the workers of the "tensor" dimension.

Attention is divided by heads and every MLP by its inner width, as in Megatron-LM (arXiv 1909.08053, section 3):

    divided by rows          q_b_proj (or q_proj), kv_b_proj, gate_proj, up_proj; embedding and head by vocabulary
    divided by columns       o_proj, down_proj
    both halves by rows      gate_up of the routed experts, [E, 2 I, H]; their down, [E, H, I], by columns
    whole on every worker    norms, low-rank a-projections, the gate, biases, eh_proj of multi-token-prediction layers

All workers of the dimension read the same tokens and hold equal hidden states between layers, so what is whole gets the
same gradient on each of them: `copy_to_group` stands wherever whole values enter divided work. A layer costs two sums
of its output in either direction; logits are gathered, so the loss sees what one process would. A vocabulary that the
workers do not divide stays whole. Numbers differ from one process's by the order of the sums within a product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.models.decoder import DecoderLayer, DeepSeekForCausalLM, SharedHead
from deepseek_ray.nn.gate import GateOutput
from deepseek_ray.nn.mla import MLA
from deepseek_ray.nn.mlp import MLP
from deepseek_ray.nn.moe import MoE
from deepseek_ray.training.collectives import copy_to_group, gather_columns, sum_over_group
from deepseek_ray.training.parallel import Forward
from deepseek_ray.training.parallel_mesh import Division, MeshParallelism, Shard, replace_modules
from deepseek_ray.training.ranks import Ranks


class TensorParallel(MeshParallelism):
    """data_parallel_size x tensor_parallel_size workers."""

    def __init__(self, config: PretrainConfig, world: Ranks) -> None:
        super().__init__(config, world, "tensor", config.distributed.tensor_parallel_size)

    def _shard(self, model: DeepSeekForCausalLM) -> Forward:
        divide_decoder(model, self.group, self.division)
        self.division.finish()
        model.to(self.world.device)
        return model


def divide_decoder(model: DeepSeekForCausalLM, group: dist.ProcessGroup, division: Division) -> None:
    """Leave this rank its slices of `model`, whose forward then computes with the other ranks of `group`."""
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            replacements |= _divide_attention(layer.self_attn, group, division)
            if isinstance(layer.mlp, MoE):
                _divide_moe(layer.mlp, group, division)
            else:
                _divide_mlp(layer.mlp, group, division)
                layer.mlp.register_forward_hook(lambda module, inputs, output: sum_over_group(output, group))
    if model.config.vocab_size % dist.get_world_size(group) == 0:
        replacements |= _divide_vocabulary(model, group, division)
    replace_modules(model, replacements)


class RowDivided(nn.Module):
    """A linear layer with this rank's rows of the weight: whole input to this rank's part of the output."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup, division: Division) -> None:
        super().__init__()
        self.group = group
        self.weight = division.divide(linear.weight, Shard(group, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to_group(x, self.group), self.weight)


class ColumnDivided(nn.Module):
    """A linear layer with this rank's columns of the weight: this rank's part of the input to the whole output."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup, division: Division) -> None:
        super().__init__()
        self.group = group
        self.weight = division.divide(linear.weight, Shard(group, dim=1))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        output = sum_over_group(F.linear(x, self.weight), self.group)
        return output if self.bias is None else output + self.bias


class VocabularyHead(RowDivided):
    """The output head with this rank's rows; gives the logits of the whole vocabulary."""

    def forward(self, x: Tensor) -> Tensor:
        return gather_columns(super().forward(x), self.group)


class VocabularyEmbedding(nn.Module):
    """The embedding with this rank's rows: a token's vector comes from the rank that has it, zeros from the others."""

    def __init__(self, embedding: nn.Embedding, group: dist.ProcessGroup, division: Division) -> None:
        super().__init__()
        self.group = group
        self.weight = division.divide(embedding.weight, Shard(group, dim=0))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        own = ids - dist.get_rank(self.group) * rows
        elsewhere = (own < 0) | (own >= rows)
        vectors = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return sum_over_group(vectors.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group)


def _divide_attention(attention: MLA, group: dist.ProcessGroup, division: Division) -> dict[nn.Module, nn.Module]:
    """By heads. The latents enter divided work in kv_b_proj; the rotated key, shared by all heads, beside it."""
    rank = attention.config.kv_lora_rank

    def copy_rope_key(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat((output[..., :rank], copy_to_group(output[..., rank:], group)), dim=-1)

    attention.kv_a_proj_with_mqa.register_forward_hook(copy_rope_key)
    queries = attention.q_proj if attention.config.q_lora_rank is None else attention.q_b_proj
    return {
        queries: RowDivided(queries, group, division),
        attention.kv_b_proj: RowDivided(attention.kv_b_proj, group, division),
        attention.o_proj: ColumnDivided(attention.o_proj, group, division),
    }


def _divide_mlp(mlp: MLP, group: dist.ProcessGroup, division: Division) -> None:
    """By inner width. The output is this rank's part of a sum that the caller makes."""
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = division.divide(linear.weight, Shard(group, dim=0))
    mlp.down_proj.weight = division.divide(mlp.down_proj.weight, Shard(group, dim=1))
    mlp.register_forward_pre_hook(lambda module, inputs: copy_to_group(inputs[0], group))


def _divide_moe(moe: MoE, group: dist.ProcessGroup, division: Division) -> None:
    """Each rank has a part of every expert; routed and shared experts are summed together, once per token.

    The weights of the experts enter divided work as well, while the scores go whole to the balance loss.
    """
    experts = moe.experts
    experts.gate_up = division.divide(experts.gate_up, Shard(group, dim=1, blocks=2))
    experts.down = division.divide(experts.down, Shard(group, dim=2))
    experts.register_forward_pre_hook(lambda module, inputs: (copy_to_group(inputs[0], group), *inputs[1:]))
    if moe.shared_experts is not None:
        _divide_mlp(moe.shared_experts, group, division)

    def copy_weights(module: nn.Module, inputs: Any, chosen: GateOutput) -> GateOutput:
        return chosen._replace(weights=copy_to_group(chosen.weights, group))

    def sum_experts(module: nn.Module, inputs: Any, output: tuple[Tensor, GateOutput]) -> tuple[Tensor, GateOutput]:
        return sum_over_group(output[0], group), output[1]

    moe.gate.register_forward_hook(copy_weights)
    moe.register_forward_hook(sum_experts)


def _divide_vocabulary(
    model: DeepSeekForCausalLM, group: dist.ProcessGroup, division: Division
) -> dict[nn.Module, nn.Module]:
    """Embedding and head, tied or not, and the copies that multi-token-prediction layers may have."""
    divided: dict[nn.Module, nn.Module] = {model.lm_head: VocabularyHead(model.lm_head, group, division)}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            divided[module] = VocabularyEmbedding(module, group, division)
        elif isinstance(module, SharedHead) and module.head is not model.lm_head:
            divided[module.head] = VocabularyHead(module.head, group, division)
    return divided
