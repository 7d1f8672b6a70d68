"""Tensor parallel training: every matrix product of a layer is divided among the workers of the "tensor" dimension.

Attention is divided by heads and every MLP by its inner width, as in Megatron-LM (arXiv 1909.08053, section 3):

    divided by rows          q_b_proj (or q_proj), kv_b_proj, gate_proj, up_proj; embedding and head by vocabulary
    divided by columns       o_proj, down_proj
    both halves by rows      gate_up of the routed experts, [E, 2 I, H]; their down, [E, H, I], by columns
    whole on every worker    norms, low-rank a-projections, the gate, biases, eh_proj of multi-token-prediction layers

An adapter's B is divided with the rows of its matrix, its A with the columns; the other one is whole and has a part of
its gradient on each worker, which are summed once a step.

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

from deepseek_ray.config.finetune import LoraConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.models.decoder import DecoderLayer, DeepSeekForCausalLM, SharedHead
from deepseek_ray.nn.gate import GateOutput
from deepseek_ray.nn.mla import MLA
from deepseek_ray.nn.mlp import MLP
from deepseek_ray.nn.moe import MoE
from deepseek_ray.training.adapter_layers import LoraExperts, LoraLinear, with_adapter
from deepseek_ray.training.collectives import copy_to_group, gather_columns, sum_gradients, sum_over_group
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

    def _sum_gradients(self) -> None:
        if self.division.partial:
            sum_gradients(self.division.partial, self.group)
        super()._sum_gradients()


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


class ColumnDivided(nn.Module):
    """A linear layer with this rank's columns of the weight: this rank's part of the input to the whole output."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup, division: Division) -> None:
        super().__init__()
        self.group = group
        _divide_columns(linear, group, division)
        self.weight, self.bias = linear.weight, linear.bias
        self._adapter: LoraConfig | None = None
        if isinstance(linear, LoraLinear):
            self.lora_A, self.lora_B, self._adapter = linear.lora_A, linear.lora_B, linear.config

    def forward(self, x: Tensor) -> Tensor:
        part = F.linear(x, self.weight)
        if self._adapter is not None:
            part = with_adapter(part, x, (self.lora_A, self.lora_B), self._adapter, self.training)
        output = sum_over_group(part, self.group)
        return output if self.bias is None else output + self.bias


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


def _divide_rows(linear: nn.Linear, group: dist.ProcessGroup, division: Division) -> None:
    """In place; the input is whole, the output this rank's part of the whole."""
    linear.weight = division.divide(linear.weight, Shard(group, dim=0))
    if isinstance(linear, LoraLinear):
        division.share(linear.lora_A)
        linear.lora_B = division.divide(linear.lora_B, Shard(group, dim=0))


def _divide_columns(linear: nn.Linear, group: dist.ProcessGroup, division: Division) -> None:
    """In place; the input is this rank's part of the whole, the output its part of a sum that the caller makes."""
    linear.weight = division.divide(linear.weight, Shard(group, dim=1))
    if isinstance(linear, LoraLinear):
        linear.lora_A = division.divide(linear.lora_A, Shard(group, dim=1))
        division.share(linear.lora_B)


def _copy_input_to(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Whole values enter divided work in `module`."""
    module.register_forward_pre_hook(lambda module, inputs: (copy_to_group(inputs[0], group), *inputs[1:]))


def _divide_attention(attention: MLA, group: dist.ProcessGroup, division: Division) -> dict[nn.Module, nn.Module]:
    """By heads. The latents enter divided work in kv_b_proj; the rotated key, shared by all heads, beside it."""
    rank = attention.config.kv_lora_rank

    def copy_rope_key(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat((output[..., :rank], copy_to_group(output[..., rank:], group)), dim=-1)

    attention.kv_a_proj_with_mqa.register_forward_hook(copy_rope_key)
    queries = attention.q_proj if attention.config.q_lora_rank is None else attention.q_b_proj
    for linear in (queries, attention.kv_b_proj):
        _divide_rows(linear, group, division)
        _copy_input_to(linear, group)
    return {attention.o_proj: ColumnDivided(attention.o_proj, group, division)}


def _divide_mlp(mlp: MLP, group: dist.ProcessGroup, division: Division) -> None:
    """By inner width. The output is this rank's part of a sum that the caller makes."""
    for linear in (mlp.gate_proj, mlp.up_proj):
        _divide_rows(linear, group, division)
    _divide_columns(mlp.down_proj, group, division)
    _copy_input_to(mlp, group)


def _divide_moe(moe: MoE, group: dist.ProcessGroup, division: Division) -> None:
    """Each rank has a part of every expert; routed and shared experts are summed together, once per token.

    The weights of the experts enter divided work as well, while the scores go whole to the balance loss.
    """
    experts = moe.experts
    experts.gate_up = division.divide(experts.gate_up, Shard(group, dim=1, blocks=2))
    experts.down = division.divide(experts.down, Shard(group, dim=2))
    if isinstance(experts, LoraExperts):
        _divide_adapters(experts, group, division)
    _copy_input_to(experts, group)
    if moe.shared_experts is not None:
        _divide_mlp(moe.shared_experts, group, division)

    def copy_weights(module: nn.Module, inputs: Any, chosen: GateOutput) -> GateOutput:
        return chosen._replace(weights=copy_to_group(chosen.weights, group))

    def sum_experts(module: nn.Module, inputs: Any, output: tuple[Tensor, GateOutput]) -> tuple[Tensor, GateOutput]:
        return sum_over_group(output[0], group), output[1]

    moe.gate.register_forward_hook(copy_weights)
    moe.register_forward_hook(sum_experts)


def _divide_adapters(experts: LoraExperts, group: dist.ProcessGroup, division: Division) -> None:
    """A is [C, r, in], B [C, out, r]; the inner width is the output of gate and up, the input of down."""
    for name in experts.projections:
        adapters = experts.adapters(name)
        if name == "down_proj":
            adapters.lora_A = division.divide(adapters.lora_A, Shard(group, dim=2))
            division.share(adapters.lora_B)
        else:
            division.share(adapters.lora_A)
            adapters.lora_B = division.divide(adapters.lora_B, Shard(group, dim=1))


def _divide_vocabulary(
    model: DeepSeekForCausalLM, group: dist.ProcessGroup, division: Division
) -> dict[nn.Module, nn.Module]:
    """Embedding and head, tied or not, and the copies that multi-token-prediction layers may have."""
    heads = {model.lm_head, *(module.head for module in model.modules() if isinstance(module, SharedHead))}
    for head in heads:
        _divide_rows(head, group, division)
        _copy_input_to(head, group)
        head.register_forward_hook(lambda module, inputs, output: gather_columns(output, group))
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {embedding: VocabularyEmbedding(embedding, group, division) for embedding in embeddings}
