"""How well a finished model predicts texts or answers: loss, bits per byte, and the load of its experts."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from deepseek_ray.config.data import DataConfig
from deepseek_ray.config.evaluation import BUILT_IN, EvaluationConfig
from deepseek_ray.config.finetune import ConversationsConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.blocks import TokenBlocks
from deepseek_ray.data.held_out import source_of, write_held_out
from deepseek_ray.data.prepare_conversations import pack_held_out
from deepseek_ray.errors import CheckpointError, ConfigError
from deepseek_ray.models.load import load_model
from deepseek_ray.training.balance import max_violation
from deepseek_ray.training.evaluate import validate
from deepseek_ray.training.objective import MicroBatch
from deepseek_ray.training.parallel_ddp import DataParallel
from deepseek_ray.training.ranks import Ranks


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Predicted tokens of the data."""
    bytes: int
    """UTF-8 bytes that they stand for."""
    expert_load: list[dict[str, Any]]
    """Per layer with experts: `layer`, `counts` of each expert, `max_violation` (max - mean) / mean, 0 is even."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        lines = [
            f"{self.nats_per_token:.4f} nats per token, perplexity {self.perplexity:.2f}, {self.bits_per_byte:.4f} "
            f"bits per byte ({self.tokens:,} tokens, {self.bytes:,} bytes)"
        ]
        lines += [
            f"layer {load['layer']}: MaxVio {load['max_violation']:.3f}, tokens per expert "
            f"{' '.join(map(str, load['counts']))}"
            for load in self.expert_load
        ]
        return "\n".join(lines)


def evaluate_model(model_dir: str | Path, config: EvaluationConfig, show_progress: bool | None = None) -> Evaluation:
    """Measure the checkpoint in `model_dir`. CheckpointError, DataError or ConfigError for what a person has to change.

    `show_progress` None shows bars when standard error is a terminal.
    """
    if not Path(model_dir).is_dir():
        raise CheckpointError(f"{model_dir} is no directory; give the path of a checkpoint in the Hugging Face layout")
    if config.chat and config.data == (BUILT_IN,):
        raise ConfigError("chat is set, but the data is the built-in corpus, which holds no conversations; give files")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    show = sys.stderr.isatty() if show_progress is None else show_progress
    model = load_model(model_dir)
    length = min(config.sequence_length, model.config.max_position_embeddings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="deepseek-ray-evaluate-") as work:
        blocks = _blocks(config, Path(model_dir), Path(work), length, show)
        num_samples = min(config.max_samples or math.inf, blocks.num_samples(length))
        with _progress(math.ceil(num_samples / config.batch_size), show) as advance:
            watched = _Watched(_run_config(config, model.config.model_dump(), length), Ranks(device=device), advance)
            watched.prepare(model)
            measured = validate(watched, blocks, config.max_samples)
    layers = zip(model.config.moe_layers, measured.expert_counts, strict=True)
    return Evaluation(
        nats_per_token=measured.loss,
        perplexity=math.exp(min(measured.loss, 700.0)),
        bits_per_byte=measured.bits_per_byte,
        tokens=watched.measured_tokens,
        bytes=round(watched.measured_tokens * blocks.bytes_per_token),
        expert_load=[
            {"layer": layer, "counts": counts, "max_violation": max_violation(torch.tensor(counts)).item()}
            for layer, counts in layers
        ],
    )


class _Watched(DataParallel):
    """One process that says how far it is."""

    def __init__(self, config: PretrainConfig, world: Ranks, advance: Callable[[], None]) -> None:
        super().__init__(config, world)
        self._advance = advance
        self.measured_tokens = 0

    def validation_sums(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        sums = super().validation_sums(part)
        self.measured_tokens += int(part.counts[0])
        self._advance()
        return sums


def _blocks(config: EvaluationConfig, model_dir: Path, work: Path, length: int, show: bool) -> TokenBlocks:
    if config.chat:
        fields = config.model_dump(include={"messages_field", "prompt_field", "completion_field"})
        chats = ConversationsConfig.parse({"paths": config.data, "sequence_length": length, **fields})
        return pack_held_out(chats, model_dir, work, show)[0]
    kinds = {source_of(path) for path in config.data}
    if len(kinds) > 1:
        raise ConfigError(f"data is {', '.join(config.data)}, of the kinds {', '.join(sorted(kinds))}; give one kind")
    source = kinds.pop()
    paths = () if source == "stdlib" else config.data
    values = {"source": source, "paths": paths, "text_field": config.text_field, "sequence_length": length}
    return write_held_out(DataConfig.parse(values), model_dir, work / "blocks", show)


def _run_config(config: EvaluationConfig, model: dict[str, Any], length: int) -> PretrainConfig:
    """The part of a run's configuration that a forward pass reads."""
    size = config.batch_size
    training = {"steps": 1, "global_batch_size": size, "micro_batch_size": size, "precision": config.precision}
    values = {
        "name": "evaluation",
        "model": model,
        "data": {"tokenizer": "the model's", "sequence_length": length},
        "schedule": {"warmup_steps": 0},
        "training": training,
    }
    return PretrainConfig.parse(values)


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
