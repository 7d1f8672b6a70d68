"""Between a checkpoint directory and the decoder module, in either direction.

Names differ in two places only: a layer's routed experts are stacked in the module and separate in the checkpoint, and
multi-token-prediction layer d is `mtp.{d}` in the module and `model.layers.{num_hidden_layers + d}` in the checkpoint.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder import DeepSeekForCausalLM, MTPLayer
from deepseek_ray.models.save import DEFAULT_SHARD_BYTES, save_checkpoint
from deepseek_ray.models.shapes import repeats_main_model
from deepseek_ray.nn.gate import Gate

_MTP_NAME = re.compile(r"^mtp\.(\d+)\.")
Shared = TypeVar("Shared", nn.Embedding, nn.Linear)

_GATE_UP, _DOWN = ".experts.gate_up", ".experts.down"


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32) -> DeepSeekForCausalLM:
    """The model of a checkpoint directory, on the CPU, in `dtype` (correction biases in float32).

    Raises CheckpointError or ConfigError before any weight is allocated when directory, config.json and tensors do not
    fit together. Multi-token-prediction layers that the files lack are left out of the model.
    """
    reader = CheckpointReader(directory)
    reader.validate()
    config = reader.config.model_copy(update={"quantization_config": None})
    if not reader.has_mtp:
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    with torch.device("meta"):
        model = DeepSeekForCausalLM(config).to(dtype)
    for module in model.modules():
        if isinstance(module, Gate) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    model.to_empty(device="cpu")
    model.tie_weights()
    load_weights(model, reader)
    return model


def load_weights(model: DeepSeekForCausalLM, reader: CheckpointReader) -> None:
    """Copy a checkpoint's tensors into the model's own, in place and in the model's dtypes."""
    with torch.no_grad():
        for name, own in state_to_hf(model):
            if not repeats_main_model(name):
                own.copy_(reader.tensor(name, own.dtype))
        for depth, layer in enumerate(model.mtp):
            assert isinstance(layer, MTPLayer)
            _load_copies(layer, f"model.layers.{model.config.num_hidden_layers + depth}", reader)


def save_model(
    model: DeepSeekForCausalLM,
    directory: str | Path,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as a checkpoint directory; see `save_checkpoint`. dtype: None keeps the model's."""
    save_checkpoint(directory, model.config, state_to_hf(model), max_shard_bytes, dtype)


def state_to_hf(model: DeepSeekForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model's checkpoint by its public name; views of the model's own, not copies."""
    return to_hf_names(model.config, model.state_dict().items())


def to_hf_names(config: ModelConfig, own: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Checkpoint names for tensors with the module's names, one after the other as they come."""
    width = config.moe_intermediate_size
    for own_name, tensor in own:
        if own_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = _MTP_NAME.sub(lambda match: f"model.layers.{config.num_hidden_layers + int(match[1])}.", own_name)
        if name.endswith(_GATE_UP):
            prefix = name.removesuffix(_GATE_UP)
            for expert, both in enumerate(tensor):
                yield f"{prefix}.experts.{expert}.gate_proj.weight", both[:width]
                yield f"{prefix}.experts.{expert}.up_proj.weight", both[width:]
        elif name.endswith(_DOWN):
            prefix = name.removesuffix(_DOWN)
            for expert, down in enumerate(tensor):
                yield f"{prefix}.experts.{expert}.down_proj.weight", down
        else:
            yield name, tensor


def _load_copies(layer: MTPLayer, prefix: str, reader: CheckpointReader) -> None:
    """Give the layer its own embedding or head where the checkpoint's copy differs from the main model's."""
    layer.embed_tokens = _own_or_shared(layer.embed_tokens, f"{prefix}.embed_tokens.weight", reader)
    layer.shared_head.head = _own_or_shared(layer.shared_head.head, f"{prefix}.shared_head.head.weight", reader)


def _own_or_shared(shared: Shared, name: str, reader: CheckpointReader) -> Shared:
    if name not in reader:
        return shared
    weight = reader.tensor(name, shared.weight.dtype)
    if torch.equal(weight, shared.weight):
        return shared
    own = copy.deepcopy(shared)
    own.weight.copy_(weight)
    return own
