"""Low-rank adapters for a model: put in place, merged into the weights, saved and loaded in PEFT's layout.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`, in which a matrix `NAME` of the
checkpoint has `base_model.model.NAME.lora_A.weight` [r, in] and `...lora_B.weight` [out, r]; every routed expert
has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from deepseek_ray.config.finetune import LoraConfig
from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.nn.experts import Experts
from deepseek_ray.training.adapter_files import AdapterTensors, read_adapter, read_adapter_config, write_adapter
from deepseek_ray.training.adapter_layers import LoraExperts, LoraLinear, merged
from deepseek_ray.training.adapter_targets import Coverage, Matrix, choose_matrices, list_matrices

Model = TypeVar("Model", bound=nn.Module)
_A, _B = ".lora_A", ".lora_B"


def get_peft_model(model: Model, config: LoraConfig) -> Model:
    """Freeze `model`, give the matrices that `config` names adapters, print what they reach, and return the model.

    The model computes what it did before until the adapters are trained; gates, norms, biases and embeddings stay
    frozen. ConfigError for a target that matches nothing, or a model that has adapters already.
    """
    print(add_adapters(model, config).describe(), flush=True)
    return model


def add_adapters(model: nn.Module, config: LoraConfig) -> Coverage:
    """What `get_peft_model` does, without printing."""
    if find_adapters(model) is not None:
        raise ConfigError("the model has adapters already; merge or save them and load the model again first")
    matrices = list_matrices(model)
    chosen = choose_matrices(matrices, config)
    total = sum(parameter.numel() for parameter in model.parameters())
    _require_untied(model, chosen)
    model.requires_grad_(False)
    for name, experts in _by_module(chosen).items():
        module = model.get_submodule(name)
        model.set_submodule(name, _with_adapters(module, experts, config).train(module.training))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Coverage.of(matrices, chosen, trainable, total)


def load_adapter(model: nn.Module, directory: str | Path) -> LoraConfig:
    """Put the adapters of a directory, ours or PEFT's, into `model` and return their configuration.

    Adds them first if the model has none. CheckpointError when the files are missing, hold something that cannot be
    honoured, or do not fit the model.
    """
    config = read_adapter_config(Path(directory))
    adapters = find_adapters(model)
    if adapters is None:
        add_adapters(model, config)
        adapters = find_adapters(model)
        assert adapters is not None
    adapters.load(model, Path(directory))
    return config


def find_adapters(model: nn.Module) -> Adapters | None:
    """The adapters of a model; None when it has none."""
    layers = {
        name: AdaptedLayer.of(module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear | LoraExperts)
    }
    return Adapters(layers) if layers else None


@torch.no_grad()
def merge_adapters(model: Model) -> Model:
    """Add the adapters to the weights, in place, and remove them: the model computes what it did with them."""
    adapters = find_adapters(model)
    if adapters is None:
        raise ConfigError("the model has no adapters to merge; give it some with get_peft_model or load_adapter")
    for name, layer in adapters.layers.items():
        module = model.get_submodule(name)
        model.set_submodule(name, _without_adapters(module, _merged_tensors(layer, module.state_dict())))
    return model


@dataclass(frozen=True)
class AdaptedLayer:
    """What of one layer has adapters, without any tensor: it stays true when a strategy divides or moves the layer."""

    config: LoraConfig
    experts: Mapping[str, tuple[int, ...]]
    """Of routed experts: by projection, the numbers of those with an adapter. Empty for a linear layer."""

    @classmethod
    def of(cls, layer: LoraLinear | LoraExperts) -> AdaptedLayer:
        if isinstance(layer, LoraLinear):
            return cls(layer.config, {})
        return cls(layer.config, {name: layer.adapters(name).experts for name in layer.projections})


class Adapters:
    """The layers with adapters of one model, by name."""

    def __init__(self, layers: Mapping[str, AdaptedLayer]) -> None:
        self.layers = layers
        self.config = next(iter(layers.values())).config

    def split(self, own: Iterable[tuple[str, Tensor]], tensors: AdapterTensors) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors, by its own names and in its own order, with adapters merged into the weights.

        The adapters' tensors themselves go into `tensors`, under PEFT's names. One layer is held at a time.
        """
        for name, group in groupby(own, key=lambda item: self._layer_of(item[0])):
            if name is None:
                yield from group
                continue
            state = {full.removeprefix(f"{name}."): tensor for full, tensor in group}
            tensors.update(_peft_tensors(name, self.layers[name], state))
            for part, tensor in _merged_tensors(self.layers[name], state).items():
                yield f"{name}.{part}", tensor

    @torch.no_grad()
    def load(self, model: nn.Module, directory: Path) -> None:
        """Copy the tensors of an adapter directory into the model, which is whole; see `load_adapter`."""
        given = read_adapter(directory)
        for name, layer in self.layers.items():
            for key, own in _peft_tensors(name, layer, model.get_submodule(name).state_dict()).items():
                tensor = given.pop(key, None)
                if tensor is None or tensor.shape != own.shape:
                    found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                    raise CheckpointError(
                        f"{directory}: the adapter's {key} {found}, the model needs {list(own.shape)}; load it into "
                        "the model it was trained on, with the same rank and target_modules"
                    )
                own.copy_(tensor)
        if given:
            raise CheckpointError(
                f"{directory}: the adapter's {min(given)} belongs to no adapted matrix of this model; load it into the "
                "model it was trained on"
            )

    def _layer_of(self, tensor_name: str) -> str | None:
        """The layer with adapters that a tensor belongs to."""
        parts = tensor_name.split(".")
        candidates = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return next((name for name in candidates if name in self.layers), None)


def save_adapter(model: nn.Module, directory: str | Path, base_model: str | None = None) -> None:
    """Write a model's adapters as PEFT does. `base_model`: the path or name of the checkpoint they belong to."""
    adapters = find_adapters(model)
    if adapters is None:
        raise ConfigError("the model has no adapters to save; give it some with get_peft_model or load_adapter")
    tensors: AdapterTensors = {}
    for _ in adapters.split(model.state_dict().items(), tensors):
        pass
    write_adapter(Path(directory), adapters.config, tensors, base_model)


def _merged_tensors(layer: AdaptedLayer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layer's own tensors without adapters, their part added. `state`: the layer's state by its own names."""
    scale = layer.config.scale
    plain = {name: tensor for name, tensor in state.items() if "lora_" not in name}
    if not layer.experts:
        return plain | {"weight": merged(plain["weight"], state["lora_A"], state["lora_B"], scale)}
    gate_up, down = plain["gate_up"].clone(), plain["down"].clone()
    width = down.shape[2]
    places = {"gate_proj": gate_up[:, :width], "up_proj": gate_up[:, width:], "down_proj": down}
    for projection, experts in layer.experts.items():
        a, b = state[projection + _A], state[projection + _B]
        places[projection][list(experts)] = merged(places[projection][list(experts)], a, b, scale)
    return {"gate_up": gate_up, "down": down}


def _peft_tensors(name: str, layer: AdaptedLayer, state: Mapping[str, Tensor]) -> AdapterTensors:
    """The adapters of one layer by PEFT's names; views of `state`."""
    if not layer.experts:
        pairs = {name: (state["lora_A"], state["lora_B"])}
    else:
        pairs = {
            f"{name}.{expert}.{projection}": (state[projection + _A][place], state[projection + _B][place])
            for projection, experts in layer.experts.items()
            for place, expert in enumerate(experts)
        }
    prefix = "base_model.model."
    return {f"{prefix}{matrix}{_A}.weight": a for matrix, (a, _) in pairs.items()} | {
        f"{prefix}{matrix}{_B}.weight": b for matrix, (_, b) in pairs.items()
    }


def _by_module(chosen: Iterable[Matrix]) -> dict[str, dict[str, list[int]]]:
    """Module name -> projection -> experts; the inner mapping is empty for a linear layer."""
    modules: dict[str, dict[str, list[int]]] = {}
    for matrix in chosen:
        projections = modules.setdefault(matrix.module, {})
        if matrix.projection:
            projections.setdefault(matrix.projection, []).append(matrix.expert)
    return modules


def _with_adapters(module: nn.Module, experts: Mapping[str, list[int]], config: LoraConfig) -> nn.Module:
    if isinstance(module, Experts):
        return LoraExperts(module, experts, config)
    assert isinstance(module, nn.Linear)
    return LoraLinear(module, config)


def _without_adapters(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layer that `layer` replaced, with other weights."""
    plain: nn.Module
    if isinstance(layer, LoraLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    else:
        plain = Experts.__new__(Experts)  # its constructor wants the whole model's configuration
        nn.Module.__init__(plain)
    for name, tensor in tensors.items():
        plain.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return plain.train(layer.training)


def _require_untied(model: nn.Module, chosen: Iterable[Matrix]) -> None:
    """ConfigError for an output head that is the embedding: an adapter would have to change both."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for matrix in chosen:
        if id(getattr(model.get_submodule(matrix.module), "weight", None)) in embeddings:
            raise ConfigError(
                f"target_modules names {matrix.name!r}, which is tied to the token embedding; leave it out"
            )
