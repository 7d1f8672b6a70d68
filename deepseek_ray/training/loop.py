"""The training loop of one worker: plain torch and torch.distributed, the same with and without Ray.

Everything that decides the loss curve is in the checkpoint or follows from (configuration, step), so a run that was
killed anywhere and starts again has the curve of an undisturbed one: bit for bit on CPUs at the same world size
and thread count.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek_ray.config.finetune import FinetuneConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.cursor import DataCursor
from deepseek_ray.data.encoding import DocumentEncoder
from deepseek_ray.data.loader import TrainLoader
from deepseek_ray.data.prepare import PreparedData
from deepseek_ray.errors import TrainingError
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.training.checkpoint import CheckpointStore
from deepseek_ray.training.evaluate import validate
from deepseek_ray.training.finetune import load_base_model, require_same_start, train_adapters_only
from deepseek_ray.training.metrics import MetricsWriter
from deepseek_ray.training.objective import trains_mtp
from deepseek_ray.training.parallel import Parallelism
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.result import PretrainResult
from deepseek_ray.training.rng import gather_rng_states, restore_rng_state, seed_worker
from deepseek_ray.training.state import (
    Snapshot,
    TrainerState,
    checkpoint_bytes,
    read_state,
    restore_model,
    restore_trainer,
)
from deepseek_ray.training.step import TrainStep
from deepseek_ray.training.strategies import parallelism_for

logger = logging.getLogger(__name__)

CHECKPOINTS_DIR = "checkpoints"
_REPORTED = ("step", "loss", "validation_loss", "validation_bits_per_byte", "tokens_per_second")


def train(
    config: PretrainConfig,
    run_dir: Path,
    data: PreparedData,
    ranks: Ranks,
    on_checkpoint: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> PretrainResult:
    """Train to the last step of `config`, from the newest valid checkpoint in `run_dir` or from the start.

    Every worker calls it; with more than one, a default process group exists. `on_checkpoint` is called on every worker
    after each checkpoint with the metrics of its step. `should_stop` is asked on rank 0 after each step: once it says
    yes, all workers save and leave. Raises TrainingError when the run cannot go on.
    """
    config = config.with_workers(ranks.world_size)
    run = _Run.start(config, run_dir, data, ranks)
    speeds = []
    try:
        for step in range(run.step + 1, config.total_steps + 1):
            values = run.take_step(step)
            speeds.append(values["tokens_per_second"])
            stopping = should_stop is not None and ranks.on_first(should_stop)
            if stopping or _is_due(step, config.training.checkpoint_interval, config.total_steps):
                run.save()
                if on_checkpoint is not None:
                    on_checkpoint({name: values[name] for name in _REPORTED if name in values})
            if stopping:
                break
    finally:
        run.close()
    return run.result(statistics.median(speeds) if speeds else 0.0)


@dataclass
class _Run:
    """One worker's part of a run between its start and its end."""

    config: PretrainConfig
    run_dir: Path
    data: PreparedData
    ranks: Ranks
    parallelism: Parallelism
    train_step: TrainStep
    loader: TrainLoader
    store: CheckpointStore
    metrics: MetricsWriter | None
    """Rank 0's."""
    step: int
    """Optimiser steps done."""
    values: dict[str, Any]
    """Metrics of the last step done."""

    @classmethod
    def start(cls, config: PretrainConfig, run_dir: Path, data: PreparedData, ranks: Ranks) -> _Run:
        """Build everything and go to where the newest valid checkpoint stands."""
        parallelism = parallelism_for(config, ranks)
        store = CheckpointStore(run_dir / CHECKPOINTS_DIR, config.training.keep_checkpoints)
        checkpoint = ranks.on_first(lambda: _newest(store))
        model = build_model(config, data)
        cursor = DataCursor(config.data.seed, data.train.num_samples(config.data.sequence_length))
        step, values = 0, {}
        if checkpoint is not None:
            state = read_state(checkpoint)
            require_same_start(config, state.config)
            step, values = state.step, state.metrics
            cursor = DataCursor.from_dict(state.cursor, cursor.num_samples, cursor.seed)
            restore_model(checkpoint, model)
        parallelism.prepare(model)
        seed_worker(config.training.seed, ranks.rank, step)
        if checkpoint is not None:
            rng = restore_trainer(checkpoint, parallelism)
            restore_rng_state(rng, ranks, config.training.seed, step)
            logger.info("going on after step %d of %d from %s", step, config.total_steps, checkpoint)
        return cls(
            config=config,
            run_dir=run_dir,
            data=data,
            ranks=ranks,
            parallelism=parallelism,
            train_step=TrainStep(parallelism),
            loader=_loader(config, data, cursor, parallelism.data),
            store=store,
            metrics=MetricsWriter(run_dir, step) if ranks.is_first else None,
            step=step,
            values=values,
        )

    def take_step(self, step: int) -> dict[str, Any]:
        """Train one step, validate when it is due, and record what was measured."""
        started = time.perf_counter()
        batches = [next(self.loader) for _ in range(self.config.accumulation_steps)]
        measured = self.train_step.run(step, batches)
        seconds = time.perf_counter() - started
        self.step = step
        tokens = self.config.tokens_per_step
        self.values = {"step": step, "time": time.time(), "tokens": tokens, "tokens_per_second": tokens / seconds}
        self.values |= {name: value for name, value in asdict(measured).items() if value is not None}
        if _is_due(step, self.config.training.validation_interval, self.config.total_steps):
            self.values |= self._validate(is_last=step == self.config.total_steps)
        if self.metrics is not None:
            self.metrics.write(self.values)
        return self.values

    def save(self) -> None:
        """Publish a checkpoint of this step; every worker waits for it."""
        state = TrainerState(self.step, self.loader.cursor.to_dict(), self.values, self.config.model_dump(mode="json"))
        rng = gather_rng_states(self.ranks)

        snapshot = Snapshot(self.parallelism)

        def publish() -> None:
            assert self.metrics is not None
            self.metrics.sync()
            self.store.save(
                self.step,
                lambda directory: snapshot.write(directory, state, rng, self.data.tokenizer_dir),
                checkpoint_bytes(self.parallelism.trained),
            )

        self.ranks.on_first(publish, meanwhile=snapshot.drain)

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def result(self, tokens_per_second: float) -> PretrainResult:
        return PretrainResult(
            run_dir=str(self.run_dir),
            checkpoint=str(self.store.path(self.step)),
            step=self.step,
            tokens=self.step * self.config.tokens_per_step,
            loss=self.values["loss"],
            validation_loss=self.values.get("validation_loss", float("nan")),
            validation_bits_per_byte=self.values.get("validation_bits_per_byte", float("nan")),
            tokens_per_second=tokens_per_second,
        )

    def _validate(self, is_last: bool) -> dict[str, Any]:
        training = self.config.training
        samples = training.final_validation_samples if is_last else training.validation_samples
        measured = validate(self.parallelism, self.data.validation, samples)
        return {
            "validation_loss": measured.loss,
            "validation_bits_per_byte": measured.bits_per_byte,
            "expert_counts": measured.expert_counts,
        }


def build_model(config: PretrainConfig, data: PreparedData) -> DeepSeekForCausalLM:
    """The model with its initial weights, the same on every worker; its config names the tokenizer's special ids."""
    tokenizer = DocumentEncoder.from_dir(data.tokenizer_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise TrainingError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {config.model.vocab_size}; raise it"
        )
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    absent = {name: value for name, value in special.items() if getattr(config.model, name) is None}
    torch.manual_seed(config.training.seed)
    if isinstance(config, FinetuneConfig):
        model = load_base_model(config, absent)
    else:
        model = DeepSeekForCausalLM(config.model.model_copy(update=absent))
    model.recompute_activations = config.training.recompute_activations
    if not trains_mtp(config):
        model.mtp.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(True)  # shared with the multi-token-prediction layers
        model.lm_head.requires_grad_(True)
    train_adapters_only(model, config)
    return model


def _newest(store: CheckpointStore) -> Path | None:
    store.remove_leftovers()
    newest = store.latest()
    return newest[1] if newest else None


def _loader(config: PretrainConfig, data: PreparedData, cursor: DataCursor, readers: Ranks) -> TrainLoader:
    return TrainLoader(
        data.train,
        config.data.sequence_length,
        cursor,
        rank=readers.rank,
        world_size=readers.world_size,
        per_rank_batch=config.training.micro_batch_size,
        accumulation=config.accumulation_steps,
    )


def _is_due(step: int, interval: int, last_step: int) -> bool:
    return step == last_step or (interval > 0 and step % interval == 0)
