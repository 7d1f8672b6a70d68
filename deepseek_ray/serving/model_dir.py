"""Can this directory be served? Asked before anything is started. Reads no weights and imports no torch."""

from __future__ import annotations

from pathlib import Path

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.errors import CheckpointError


def check_model_dir(model_dir: Path) -> None:
    """CheckpointError or ConfigError naming what a served model's directory lacks."""
    if not model_dir.is_dir():
        raise CheckpointError(
            f"{model_dir} is not a directory; give the path of a checkpoint in the Hugging Face layout (config.json, "
            "tokenizer.json and *.safetensors)"
        )
    ModelConfig.from_dir(model_dir)
    if not any(model_dir.glob("*.safetensors")):
        raise CheckpointError(f"{model_dir} holds no *.safetensors; put the weights there (no other format is read)")
    Tokenizer.from_dir(model_dir)
