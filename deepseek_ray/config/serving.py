"""What `serve_apps/` serve: models behind one HTTP API, and encoders behind `/v1/embeddings`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig
from deepseek_ray.config.engine import DeploymentConfig, InferenceDtype


class IngressConfig(FrozenConfig):
    """The processes that answer HTTP. Their number follows the requests that are being answered or wait."""

    min_replicas: int = Field(default=1, ge=1)
    """Fewest processes."""
    max_replicas: int = Field(default=4, ge=1)
    """Most processes; as many as this run when the engines are full."""
    upscale_delay_seconds: float = Field(default=5.0, ge=0)
    """How long there must be too much work for the processes before one more starts."""
    downscale_delay_seconds: float = Field(default=300.0, ge=0)
    """How long there must be too little before one ends."""
    api_key_file: str | None = None
    """File with the keys that clients may use, one a line; None asks for none (unless the environment brings one)."""

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; raise max_replicas"
            )
        return self


class ServingConfig(FrozenConfig):
    """One application: several models behind one OpenAI API, each with a router, workers and shards of its own."""

    models: tuple[DeploymentConfig, ...] = Field(min_length=1)
    api: IngressConfig = IngressConfig()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for field, names in (
            ("name", [model.name for model in self.models]),
            ("served_model_name", [served_name(model.model_dir, model.served_model_name) for model in self.models]),
        ):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{len(self.models)} models and {twice[0]!r} twice; give each a {field} of its own")
        return self


class EmbeddingsConfig(FrozenConfig):
    """An encoder behind `/v1/embeddings`."""

    model_dir: str
    """Directory with config.json, tokenizer.json and *.safetensors, readable on every node under this path."""
    served_model_name: str | None = None
    """Name clients use; None takes the directory's name."""
    dtype: InferenceDtype = "float32"
    """Type of weights and activations."""
    threads: int | None = Field(default=None, ge=1)
    """Cores of each process; None takes all of its node."""
    min_batch: int = Field(default=1, ge=1)
    """Texts that are waited for before a batch is computed, as far as the latency threshold allows."""
    max_batch: int = Field(default=32, ge=1)
    """Most texts of one batch."""
    latency_threshold: float = Field(default=100.0, gt=0)
    """Milliseconds from a text's arrival to its vector that batching aims for; a text that is alone waits for others
    only as long as this allows."""
    max_waiting: int = Field(default=1024, ge=1)
    """Most texts that wait in one process; beyond it a request is refused with 429."""
    request_timeout_seconds: float = Field(default=60.0, gt=0)
    """Deadline of a request."""
    api: IngressConfig = IngressConfig()

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.min_batch > self.max_batch:
            raise ValueError(f"min_batch is {self.min_batch} and max_batch {self.max_batch}; lower min_batch")
        return self


def served_name(model_dir: str, given: str | None) -> str:
    """The name clients use for a model."""
    return given or Path(model_dir).absolute().name
