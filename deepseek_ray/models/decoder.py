"""The DeepSeek decoder as one torch module: what training updates, and what serving is compared with.

Module names are those of the public checkpoints, but for the routed experts of a layer, which are stacked
(`nn/experts.py`), and the multi-token-prediction layers, which are `mtp.{depth}` here (`models/load.py` maps both).
Letters: B sequences, S tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.nn.experts import Experts
from deepseek_ray.nn.gate import Gate, GateOutput
from deepseek_ray.nn.mla import MLA, Rotation
from deepseek_ray.nn.mlp import MLP
from deepseek_ray.nn.moe import MoE
from deepseek_ray.nn.norm import RMSNorm
from deepseek_ray.nn.recompute import checkpointed
from deepseek_ray.nn.rope import rope_tables


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass computed."""

    logits: Tensor
    """[B, S, V]."""
    hidden: Tensor
    """[B, S, H], after the final norm: the head's input and the next prediction depth's."""
    gates: tuple[GateOutput, ...]
    """One per layer with experts, in order; tensors are [B, S, ...]."""
    mtp: tuple[ModelOutput, ...] = ()
    """One per multi-token-prediction layer when asked for: entry d has S - 1 - d places, see `mtp_forward`."""


class DecoderLayer(nn.Module):
    """Attention and feed-forward network (dense or mixture of experts), each after a norm and around a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        moe = config.is_moe_layer(layer)
        self.mlp = MoE(config) if moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, rotation: Rotation, documents: Tensor | None) -> tuple[Tensor, GateOutput | None]:
        """hidden: [B, S, H] -> the same shape, and what the gate decided (None in a dense layer)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, documents)
        normed = self.post_attention_layernorm(hidden)
        if isinstance(self.mlp, MoE):
            output, gate = self.mlp(normed)
            return hidden + output, gate
        return hidden + self.mlp(normed), None


class SharedHead(nn.Module):
    """Final norm of a multi-token-prediction layer and the output head it shares with the main model."""

    def __init__(self, config: ModelConfig, head: nn.Linear) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = head


class MTPLayer(DecoderLayer):
    """One more decoder layer, over the next token's embedding beside the hidden state (arXiv 2412.19437, section 2.2).

    Embedding and head are the main model's; a checkpoint whose copies differ gets its own (`models/load.py`).
    """

    def __init__(self, config: ModelConfig, layer: int, embed_tokens: nn.Embedding, head: nn.Linear) -> None:
        super().__init__(config, layer)
        self.embed_tokens = embed_tokens
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config, head)

    def combine(self, next_ids: Tensor, hidden: Tensor) -> Tensor:
        """next_ids: [B, S], hidden: [B, S, H] -> the layer's input [B, S, H]. The embedding comes first."""
        embedded = self.enorm(self.embed_tokens(next_ids))
        return self.eh_proj(torch.cat((embedded, self.hnorm(hidden)), dim=-1))


class DeepSeekModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepSeekForCausalLM(nn.Module):
    """A DeepSeek V2 or V3 language model with random weights; `models/load.py` fills it from a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        """Keep only each layer's input for the backward pass and compute the layer again there."""
        self.model = DeepSeekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(MTPLayer(config, layer, self.model.embed_tokens, self.lm_head) for layer in layers)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Make what is shared one parameter again, after `to_empty` made it several."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, initializer_range) for every matrix, 1 for norms, 0 for biases."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Gate):
                module.weight.normal_(0.0, std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            if isinstance(module, Experts):
                module.gate_up.normal_(0.0, std, generator=generator)
                module.down.normal_(0.0, std, generator=generator)

    @property
    def moe_modules(self) -> list[MoE]:
        """The mixture-of-experts layers in order, those of multi-token-prediction layers last."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        with_mtp: bool = False,
    ) -> ModelOutput:
        """Logits of every position.

        input_ids: [B, S] int64. document_ids: [B, S]; a token sees earlier tokens of its own document only, all of the
        earlier ones when None. positions: [B or 1, S] int64, 0 to S - 1 when None. with_mtp: also run the
        multi-token-prediction layers.
        """
        hidden, gates = self.decode(self.model.embed_tokens(input_ids), self.model.layers, document_ids, positions)
        output = self.predict(hidden, input_ids, document_ids, positions, with_mtp)
        return replace(output, gates=gates)

    def decode(
        self,
        hidden: Tensor,
        layers: Iterable[nn.Module],
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, tuple[GateOutput, ...]]:
        """Run decoder layers, all or consecutive ones, on [B, S, H]: the same shape, and what their gates decided."""
        rotation = self._rotation(hidden, positions)
        gates = []
        for layer in layers:
            hidden, gate = self._run(layer, hidden, rotation, document_ids)
            gates += [gate] if gate is not None else []
        return hidden, tuple(gates)

    def predict(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        with_mtp: bool = False,
    ) -> ModelOutput:
        """What follows the last decoder layer, whose output is `hidden` [B, S, H]; `gates` of the result is empty."""
        hidden = self.model.norm(hidden)
        mtp = self._mtp_chain(hidden, input_ids, document_ids, positions) if with_mtp else ()
        return ModelOutput(self.lm_head(hidden), hidden, (), mtp)

    def mtp_logits(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """Logits [B, S - 1, V] of the first multi-token-prediction layer: place i predicts token i + 2."""
        return self.mtp_forward(hidden, input_ids).logits

    def mtp_forward(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        depth: int = 0,
    ) -> ModelOutput:
        """One multi-token-prediction layer over the hidden states of the depth before it.

        hidden: [B, S, H], `ModelOutput.hidden` of the main model (depth 0) or of depth - 1; input_ids: [B, S], where
        input_ids[:, i] is the last token that hidden[:, i] has seen; positions are input_ids' own. Place i of the
        result, which has S - 1 places, joins hidden[:, i] with the embedding of input_ids[:, i + 1] and predicts the
        token after that. document_ids: [B, S], of hidden: the places that join two documents then stay with the first,
        at its end, where no other place sees them.
        """
        layer = self.mtp[depth]
        assert isinstance(layer, MTPLayer)
        next_ids = input_ids[:, 1:]
        rotation = self._rotation(next_ids, None if positions is None else positions[:, 1:])
        documents = None if document_ids is None else document_ids[:, :-1]
        hidden, gate = self._run(layer, layer.combine(next_ids, hidden[:, :-1]), rotation, documents)
        hidden = layer.shared_head.norm(hidden)
        return ModelOutput(layer.shared_head.head(hidden), hidden, () if gate is None else (gate,))

    def _mtp_chain(
        self, hidden: Tensor, input_ids: Tensor, document_ids: Tensor | None, positions: Tensor | None
    ) -> tuple[ModelOutput, ...]:
        outputs: list[ModelOutput] = []
        for depth in range(len(self.mtp)):
            documents = None if document_ids is None else document_ids[:, : document_ids.shape[1] - depth]
            places = None if positions is None else positions[:, depth:]
            outputs.append(self.mtp_forward(hidden, input_ids[:, depth:], documents, places, depth))
            hidden = outputs[-1].hidden
        return tuple(outputs)

    def _rotation(self, tokens: Tensor, positions: Tensor | None) -> Rotation:
        """tokens: [B, S, ...], ids or hidden states."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        return rope_tables(self.config, positions)

    def _run(
        self, layer: nn.Module, hidden: Tensor, rotation: Rotation, documents: Tensor | None
    ) -> tuple[Tensor, GateOutput | None]:
        if self.recompute_activations and torch.is_grad_enabled():
            return checkpointed(layer, hidden, rotation, documents)
        return layer(hidden, rotation, documents)
