"""What one checkpoint holds: a servable model directory, and beside it in `trainer/` what training needs to go on.

    config.json, model*.safetensors, tokenizer files     the Hugging Face layout, as serving and `transformers` read it
    trainer/optimizer.safetensors                        moments and update counts by parameter name
    trainer/rng.safetensors                              random number generators of every worker
    trainer/state.json                                   step, data cursor, last metrics, configuration
    adapter/                                             the adapters of a run that trains some, as PEFT lays them out;
                                                         they are merged into the weights above as well
    manifest.json                                        sizes and sha256 (training/checkpoint.py)

All tensors are whole, whatever strategy trained: a checkpoint resumes under any other and at any world size.
The trainer's tensors lie in a folder of their own because readers load every `*.safetensors` beside config.json.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.models.load import load_weights, to_hf_names
from deepseek_ray.models.safetensors_file import stream_float32
from deepseek_ray.models.save import save_checkpoint
from deepseek_ray.training.adapter_files import AdapterTensors, write_adapter
from deepseek_ray.training.lora import find_adapters
from deepseek_ray.training.optimizer_state import OptimizerFile, state_shapes
from deepseek_ray.training.parallel import Parallelism

_ADAPTER = "adapter"
_FOLDER, _OPTIMIZER, _RNG, _STATE = "trainer", "optimizer.safetensors", "rng.safetensors", "state.json"
_BYTES_PER_PARAMETER = 12
"""float32 weight and two moments."""


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands; plain values."""

    step: int
    """Optimiser steps done."""
    cursor: dict[str, int]
    metrics: dict[str, Any]
    """The last line of metrics.jsonl, with a validation if there was one."""
    config: dict[str, Any]


def checkpoint_bytes(trained: Mapping[str, tuple[int, ...]]) -> int:
    """About how large a checkpoint with these trained parameters is."""
    return _BYTES_PER_PARAMETER * sum(math.prod(shape) for shape in trained.values())


class Snapshot:
    """The tensors of a checkpoint, gathered on rank 0 one at a time while it writes.

    Rank 0 calls `write`, the others `drain`; both take part in the same exchanges in the same order.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self._parallelism = parallelism
        self._weights, self._moments = parallelism.weights(), parallelism.optimizer_state()

    def write(self, directory: Path, state: TrainerState, rng: dict[str, Tensor], tokenizer_dir: Path) -> None:
        """Fill `directory`, which is published by the caller (`CheckpointStore.save`)."""
        config, trained = self._parallelism.model.config, self._parallelism.trained
        adapters, tensors = self._parallelism.adapters, AdapterTensors()
        weights = self._weights if adapters is None else adapters.split(self._weights, tensors)
        save_checkpoint(directory, config, to_hf_names(config, weights))
        if adapters is not None:
            write_adapter(directory / _ADAPTER, adapters.config, tensors, state.config.get("base_model"))
        for path in tokenizer_dir.iterdir():
            shutil.copyfile(path, directory / path.name)
        folder = directory / _FOLDER
        folder.mkdir()
        stream_float32(folder / _OPTIMIZER, state_shapes(trained), self._moments)
        save_file(rng, folder / _RNG)
        (folder / _STATE).write_text(json.dumps(state.__dict__, indent=2) + "\n", encoding="utf-8")

    def drain(self) -> None:
        """Take part in what is left to gather, and drop it."""
        for _ in chain(self._weights, self._moments):
            pass


def read_state(directory: Path) -> TrainerState:
    return TrainerState(**json.loads((directory / _FOLDER / _STATE).read_text(encoding="utf-8")))


def restore_model(directory: Path, model: DeepSeekForCausalLM) -> None:
    """Copy the weights into `model`, on the CPU. CheckpointError when the run's model section was changed.

    A model with adapters gets those; its own weights, which are frozen, stay as they are.
    """
    reader = CheckpointReader(directory)
    if difference := _difference(reader.config, model.config):
        raise CheckpointError(
            f"{directory} was trained with another model: {difference}. Resume with the model section the run was "
            "started with, or start a new run under another name"
        )
    adapters = find_adapters(model)
    if (adapters is not None) != (directory / _ADAPTER).is_dir():
        raise CheckpointError(
            f"{directory} was trained {'without' if adapters else 'with'} adapters, this run has "
            f"{'some' if adapters else 'none'}; resume with the lora section the run was started with, or start a new "
            "run under another name"
        )
    if adapters is not None:
        adapters.load(model, directory / _ADAPTER)
    else:
        reader.validate()
        load_weights(model, reader)


def restore_trainer(directory: Path, parallelism: Parallelism) -> dict[str, Tensor]:
    """Put the optimiser's state back and return the random number generators' states; see `rng.py`."""
    folder = directory / _FOLDER
    parallelism.load_optimizer_state(OptimizerFile(folder / _OPTIMIZER, parallelism.trained))
    return load_file(folder / _RNG)


def _difference(saved: ModelConfig, wanted: ModelConfig) -> str | None:
    before, now = saved.model_dump(), wanted.model_dump()
    changed = [f"{name} was {before[name]!r} and is {now[name]!r}" for name in now if before[name] != now[name]]
    return ", ".join(changed) or None
