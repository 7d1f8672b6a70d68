"""What `LLM` runs on: a batch of requests in, their token events out until all have ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from deepseek_ray.config.engine import DeploymentConfig
from deepseek_ray.config.model import ModelConfig
from deepseek_ray.engine.engine import Engine, plan_engine_cache
from deepseek_ray.engine.speculation import served_moe_layers
from deepseek_ray.engine.tokenizer import Tokenizer
from deepseek_ray.kernels.quantize import bytes_per_weight
from deepseek_ray.kernels.select import select_kernels, usable_device
from deepseek_ray.messages import GenerateRequest, TokenEvent
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.graphed_decoder import GraphedDecoder
from deepseek_ray.models.paged_decoder import PagedDecoder

_WORTH_FILES = 256 * 2**20
"""Bytes of experts from which on they are mapped from packed files: fewer are packed in less than a second."""


class OfflineBackend(ABC):
    """One loaded model."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int

    @abstractmethod
    def run(self, requests: Sequence[GenerateRequest]) -> Iterator[TokenEvent]:
        """Events of all requests as they come, those of one request in order and without repetition.

        Requests are valid (`engine/requests.py`). Closing the iterator early aborts what is still running.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Free everything the backend holds. Calling it again does nothing."""


class LocalBackend(OfflineBackend):
    """Attention and experts in this process."""

    def __init__(self, config: DeploymentConfig) -> None:
        """CheckpointError or ConfigError when the model cannot be served as asked, before its weights are read.

        `threads` sets torch's thread count, which the whole process shares.
        """
        reader = CheckpointReader(config.model_dir)
        reader.validate()
        dtype = getattr(torch, config.dtype)
        plan_engine_cache(config.engine, reader.config, dtype)
        self.tokenizer = tokenizer_beside(config.model_dir)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        moe_layers = served_moe_layers(config.engine, reader)
        every_expert = {layer: range(reader.config.n_routed_experts) for layer in moe_layers}
        attention_device, expert_device = usable_device(config.attention_device), usable_device(config.expert_device)
        bits = config.quantization
        store = ExpertStore(
            reader,
            every_expert,
            dtype,
            select_kernels(config.engine.deterministic, expert_device),
            shared_files=config.packed_files and _expert_bytes(config, reader.config, len(moe_layers)) >= _WORTH_FILES,
            device=expert_device,
            quantization=bits,
        )
        kernels = select_kernels(config.engine.deterministic, attention_device)
        is_graphed = config.engine.cuda_graphs and kernels.is_capturable and bits is None
        decoder = (GraphedDecoder if is_graphed and expert_device == attention_device else PagedDecoder)(
            reader,
            dtype,
            LocalExperts(store),
            kernels,
            device=attention_device,
            quantization=bits,
            with_mtp=config.engine.uses_mtp,
            micro_batches=config.engine.micro_batches,
        )
        self._engine: Engine | None = Engine(decoder, self.tokenizer, config.engine)
        self.vocab_size = self._engine.vocab_size
        self.max_model_len = self._engine.max_model_len

    def run(self, requests: Sequence[GenerateRequest]) -> Iterator[TokenEvent]:
        assert self._engine is not None, "run after shutdown"
        return run_engine(self._engine, requests)

    def shutdown(self) -> None:
        self._engine = None


def _expert_bytes(config: DeploymentConfig, model: ModelConfig, num_layers: int) -> float:
    weights = model.num_expert_parameters * model.n_routed_experts * num_layers
    return weights * bytes_per_weight(config.quantization, getattr(torch, config.dtype))


def tokenizer_beside(model_dir: str) -> Tokenizer | None:
    """The model's tokenizer; None for a model without one, which then takes token ids only."""
    return Tokenizer.from_dir(model_dir) if (Path(model_dir) / "tokenizer.json").is_file() else None


def run_engine(engine: Engine, requests: Sequence[GenerateRequest]) -> Iterator[TokenEvent]:
    """Feed an idle engine as fast as it takes requests, and step it until they have all ended."""
    pending = deque(requests)
    try:
        while pending or engine.has_work:
            while pending and engine.has_room:
                engine.add_request(pending.popleft())
            yield from engine.step()
    finally:
        for request in requests:
            engine.abort(request.request_id)
        engine.step()
