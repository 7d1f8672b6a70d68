"""What a batch inference job is: prompts in files, a model, outputs in files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepseek_ray.config.base import FrozenConfig


class BatchConfig(FrozenConfig):
    """Sampling names and meanings are those of `SamplingParams`."""

    model_dir: str
    """Checkpoint in the Hugging Face layout, readable on every node."""
    input: tuple[str, ...] = Field(min_length=1)
    """JSONL, Parquet or text files (one prompt a line), or folders of them, readable on every node."""
    output: str
    """Folder for the outputs, writable on every node. Files that are there already are not generated again."""
    prompt_column: str = "prompt"
    """Field of a JSON line, or column of a Parquet file: a text, or with `chat` a text or a list of messages."""
    chat: bool = False
    """Put prompts through the model's chat template; a text is what the user says."""
    format: Literal["jsonl", "parquet"] = "jsonl"
    """Of the outputs."""
    rows_per_file: int = Field(default=256, ge=1)
    """Input rows whose outputs share a file; also what is lost when a worker dies."""
    workers: int = Field(default=1, ge=1)
    """Copies of the model that generate side by side."""
    threads: int | None = Field(default=None, ge=1)
    """CPU cores of each worker; None divides those of the cluster."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and cache."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and output together; None takes the model's own limit."""
    max_tokens: int = Field(default=128, ge=1)
    """Most tokens that are generated for a row."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the likeliest token; above, every row has its own seed."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample among that many likeliest tokens; 0 takes all."""
    stop: tuple[str, ...] = ()
    """Texts that end an output; they are left out of it."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Row n samples with seed + n, so that outputs do not depend on workers or resumes."""

    @property
    def identity(self) -> dict[str, object]:
        """What decides the outputs and which file holds which of them."""
        return self.model_dump(mode="json", exclude={"workers", "threads", "output"})
