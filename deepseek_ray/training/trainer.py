"""Runs the training loop on Ray Train: the only file of this folder that imports ray.

Ray Train starts the workers, connects them (gloo or NCCL) and starts them again when one dies; where to resume is the
loop's own business (`training/loop.py`), so a restarted worker group and a restarted driver take the same road.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from deepseek_ray.config.finetune import FinetuneConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.ingest import connected
from deepseek_ray.data.prepare import PreparedData, prepare_data
from deepseek_ray.errors import ConfigError, TrainingError
from deepseek_ray.training.finetune import (
    describe_start,
    prepare_finetune_data,
    require_adapters_fit,
    with_base_model,
)
from deepseek_ray.training.loop import train
from deepseek_ray.training.memory import ONE_ARENA
from deepseek_ray.training.progress import LOG_FILE, ProgressLine, RunFollower
from deepseek_ray.training.ranks import Ranks, is_users_error
from deepseek_ray.training.resources import NodeResources, WorkerResources, plan_workers
from deepseek_ray.training.result import PretrainResult
from deepseek_ray.training.strategies import require_backend

LOCK_FILE = ".lock"


def pretrain(config: PretrainConfig, stream: TextIO = sys.stdout, stop_file: Path | None = None) -> PretrainResult:
    """Train `config` to its last step, or resume it there, and return what came out.

    Uses the Ray this process is connected to, else the cluster of RAY_ADDRESS, else a local one for the while. Prints a
    status line to `stream`; Ray's own log lines stay in its files. Once `stop_file` exists, the run saves a checkpoint
    and ends after the step it is at. Raises TrainingError, DataError or ConfigError for what a person has to change.
    """
    run_dir = absolute_run_dir(config)
    require_backend(config)
    tuned = config if isinstance(config, FinetuneConfig) else None
    if tuned:
        require_adapters_fit(tuned)
    with _lock(run_dir), connected():
        workers = plan_workers(config, _nodes())
        data = prepare_finetune_data(tuned) if tuned else prepare_data(config.data)
        progress = ProgressLine(stream, config.total_steps)
        progress.note(_headline(config, workers, data))
        if tuned:
            progress.note(describe_start(tuned, data))
        follower = RunFollower(run_dir, progress.show, progress.note)
        try:
            outcome = _fit(config, run_dir, workers, data, stop_file)
        finally:
            follower.close()
            progress.close()
        if "error" in outcome:
            raise outcome["error"]
        result = PretrainResult.from_dict(outcome["result"])
        result.write()
        return result


def finetune(config: FinetuneConfig, stream: TextIO = sys.stdout) -> PretrainResult:
    """Train a checkpoint on conversations, all of it or adapters, exactly as `pretrain` trains a new model."""
    return pretrain(with_base_model(config), stream)


def absolute_run_dir(config: PretrainConfig) -> Path:
    """Where the run is kept, the same directory for driver and workers. Refuses what a Ray job would throw away."""
    path = config.run_dir
    if not path.is_absolute():
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            raise ConfigError(
                f"storage_path is {config.storage_path!r}, relative to the working directory of a Ray job, which is "
                "deleted with the job; give an absolute path that every node can write"
            )
        path = Path.cwd() / path
    return path


# Ray's type hints describe Train v1 to a checker; v2, which runs, has more arguments and Result.return_value.
def _fit(
    config: PretrainConfig, run_dir: Path, workers: WorkerResources, data: PreparedData, stop_file: Path | None
) -> dict[str, Any]:
    trainer = TorchTrainer(
        _run_worker,  # type: ignore[arg-type]
        train_loop_config={
            "config_class": type(config),
            "config": config.model_dump(mode="json"),
            "run_dir": str(run_dir),
            "data": data,
            "threads": workers.threads,
            "stop_file": stop_file,
        },
        torch_config=TorchConfig(timeout_s=config.distributed.timeout_s),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=_ray_workers(config),
            elastic_resize_monitor_interval_s=config.distributed.resize_interval_s,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.threads, **({"GPU": 1} if workers.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=ray.train.FailureConfig(max_failures=config.training.max_failures),
            # Ray would give every worker one OpenMP thread. A worker owns its cores, so its threads may spin while they
            # wait: asleep between the many small operations of a step they lose a third of the speed.
            worker_runtime_env={
                "env_vars": {"OMP_NUM_THREADS": str(workers.threads), **({} if workers.use_gpu else ONE_ARENA)}
            },
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    with _restored_interrupt_handler():
        try:
            return trainer.fit().return_value  # type: ignore[attr-defined]
        except ray.train.TrainingFailedError as error:
            raise TrainingError(
                f"the workers of run {config.name!r} failed more than training.max_failures = "
                f"{config.training.max_failures} times; the last failure: {_last_line(error)}. Checkpoints are in "
                f"{run_dir}; starting the same name again resumes from the newest one"
            ) from error


def _run_worker(values: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker. A person's error is an answer, not a crash: starting the worker again would not help."""
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), get_device())
    torch.set_num_threads(values["threads"])
    config, run_dir = values["config_class"].parse(values["config"]), Path(values["run_dir"])
    try:
        with _logging_to(run_dir / LOG_FILE if ranks.is_first else None):
            result = train(
                config,
                run_dir,
                values["data"],
                ranks,
                on_checkpoint=ray.train.report,
                should_stop=None if values["stop_file"] is None else values["stop_file"].exists,
            )
    except Exception as error:
        if not is_users_error(error):
            raise
        return {"error": error}
    return {"result": asdict(result)}


def _ray_workers(config: PretrainConfig) -> Any:
    """Ray Train's own form: a number, or (least, most) for an elastic run."""
    sizes = config.distributed.data_sizes
    return (sizes[0], sizes[-1]) if config.distributed.is_elastic else config.num_workers


def _headline(config: PretrainConfig, workers: WorkerResources, data: PreparedData) -> str:
    model = config.model
    return (
        f"run {config.name}: {model.num_parameters / 1e6:,.1f} M parameters "
        f"({model.num_active_parameters / 1e6:,.1f} M active), {data.train.num_tokens / 1e6:,.2f} M training tokens, "
        f"{config.total_steps} steps of {config.tokens_per_step:,} tokens on "
        f"{'up to ' if config.distributed.is_elastic else ''}{config.num_workers} x {workers.describe()}"
    )


def _nodes() -> list[NodeResources]:
    return [
        NodeResources(cpus=int(node["Resources"].get("CPU", 0)), gpus=int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _logging_to(path: Path | None) -> Iterator[None]:
    """This project's log messages, from "info" on, into the run's log file; the driver shows them."""
    if path is None:
        yield
        return
    logger, handler = logging.getLogger("deepseek_ray"), logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    """One driver per run: a second one would write the same files. The system frees the lock when a driver dies."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise TrainingError(
            f"the run's directory {run_dir} cannot be written ({error}); set storage_path to one that can"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"run {run_dir.name!r} in {run_dir.parent} is being trained by another process; wait for it, or give "
                "this run another name"
            ) from None
        yield


@contextmanager
def _restored_interrupt_handler() -> Iterator[None]:
    """Ray Train installs a SIGINT handler of its own and leaves it behind."""
    try:
        before = signal.getsignal(signal.SIGINT)
        yield
    finally:
        with suppress(ValueError):  # not the main thread: Ray installed none
            signal.signal(signal.SIGINT, before)
