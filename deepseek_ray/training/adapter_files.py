"""Adapter directories in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_ray.config.finetune import LoraConfig
from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.models.safetensors_file import open_safetensors, require_finite
from deepseek_ray.training.adapter_targets import peft_targets

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AdapterTensors = dict[str, Tensor]
"""Tensors by PEFT's names."""

_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "layers_to_transform": None,
    "exclude_modules": None,
    "target_parameters": None,
    "use_qalora": False,
    "trainable_token_indices": None,
}
"""PEFT's options that change what an adapter computes or reaches, with the one value that we honour."""


def write_adapter(directory: Path, config: LoraConfig, tensors: AdapterTensors, base_model: str | None) -> None:
    """Fill `directory`; the configuration is written last."""
    directory.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": peft_targets(config),
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    (directory / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(directory: Path) -> LoraConfig:
    """CheckpointError when the file is missing, broken, or asks for something that is not supported."""
    path = directory / ADAPTER_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: no {ADAPTER_CONFIG}; give the directory of a saved adapter") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not an adapter's configuration ({error!r}); save the adapter again") from None
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {kind!r}; only LORA adapters are supported")
    for name, honoured in _UNSUPPORTED.items():
        if values.get(name) not in (honoured, None) and values[name]:
            raise CheckpointError(f"{path}: {name} is {values[name]!r}, which is not supported; only {honoured!r} is")
    known = {name: values[name] for name in LoraConfig.model_fields if values.get(name) is not None}
    try:
        return LoraConfig.parse(known, str(path))
    except ConfigError as error:
        raise CheckpointError(error.message) from None


def read_adapter(directory: Path) -> AdapterTensors:
    """Every tensor of an adapter. CheckpointError when the file is missing, damaged or holds NaN or infinity."""
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {ADAPTER_WEIGHTS}; give the directory of a saved adapter")
    open_safetensors(path)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        require_finite(name, tensor, directory)
    return tensors
