"""How a finished model is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepseek_ray.config.base import FrozenConfig

BUILT_IN = "stdlib"
"""Names the built-in corpus where paths of files are given."""


class EvaluationConfig(FrozenConfig):
    """What is measured, and how."""

    data: tuple[str, ...] = (BUILT_IN,)
    """`stdlib`, for the validation split of the built-in corpus, or text, JSONL or Parquet files of one kind."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    chat: bool = False
    """The files are conversations: only the assistant's tokens are measured."""
    messages_field: str = "messages"
    """Field with a conversation's messages."""
    prompt_field: str = "prompt"
    """Field of a pair with the prompt."""
    completion_field: str = "completion"
    """Field of a pair with the answer."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens that are seen together, as far as the model allows."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per forward pass."""
    max_samples: int | None = Field(default=None, ge=1)
    """Measure the first samples only; None measures all."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the forward pass."""
    threads: int | None = Field(default=None, ge=1)
    """CPU cores to use; None takes all."""
