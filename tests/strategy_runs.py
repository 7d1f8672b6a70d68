"""Many training runs in one start of several gloo processes, each run with a strategy of its own.

python strategy_runs.py <directory> <rank> <world size> <runs.json>
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from training_runs import small_config, small_data

from deepseek_ray.config.finetune import FinetuneConfig
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.training.metrics import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Run:
    """One call of `train` on every worker."""

    directory: str
    """Of the run, under the common one; a second run with the same resumes the first."""
    config: dict[str, Any]
    stop_after: int | None = None
    """Optimiser step after whose checkpoint the run ends, as if everything had been killed then."""
    start: tuple[str, int] | None = None
    """Directory and step of another run: this one goes on from that checkpoint and those metrics as from its own."""


def launch(directory: Path, world_size: int, runs: Sequence[Run], timeout: float = 240) -> list[list[dict[str, Any]]]:
    """Train all runs, one after the other, with `world_size` processes; what each rank said of each run.

    An answer has `error` (a DeepSeekRayError's class and text, or None) and `biases` (correction biases after the last
    step, one list per layer).
    """
    (directory / "store").unlink(missing_ok=True)
    (directory / "runs.json").write_text(json.dumps([asdict(run) for run in runs]))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(directory)]
    processes = [
        subprocess.Popen([*command, str(rank), str(world_size)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    try:
        output = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, output
    return [json.loads((directory / f"answers{rank}.json").read_text()) for rank in range(world_size)]


def strategy_config(strategy: str, workers: int, **sections: Any) -> dict[str, Any]:
    """20 steps of 8 sequences, 2 per forward pass, with `strategy` over `workers` that read different sequences."""
    training = {"steps": 20, "micro_batch_size": 2, "validation_interval": 10, "checkpoint_interval": 10}
    changes = {name: value for name, value in sections.items() if name not in ("training", "distributed")}
    return small_config(
        training=training | sections.get("training", {}),
        distributed={"strategy": strategy, "data_parallel_size": workers} | sections.get("distributed", {}),
        **changes,
    ).model_dump(mode="json", exclude_unset=True)


def assert_near_in_bf16(directory: Path, run: str, reference: str, exact: str) -> None:
    """Losses of a bf16 run to 1e-3 of the `reference`'s, falling, and not those of the float32 run `exact`."""
    lines, expected, float32 = (read_metrics(directory / name) for name in (run, reference, exact))
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert abs(line["loss"] / other["loss"] - 1) < 1e-3, (line["step"], line["loss"], other["loss"])
    assert lines[-1]["loss"] < 0.85 * lines[0]["loss"]
    assert abs(lines[0]["gradient_norm"] / float32[0]["gradient_norm"] - 1) > 5e-6  # the first step's weights are equal


def lora_config(config: dict[str, Any], base_model: Path) -> dict[str, Any]:
    """A run that trains adapters of every matrix of `base_model` instead: a `FinetuneConfig`."""
    kept = {name: value for name, value in config.items() if name not in ("model", "balance")}
    data = {"sequence_length": config["data"]["sequence_length"], "paths": ["given.jsonl"]}
    return {**kept, "data": data, "base_model": str(base_model), "lora": {"r": 4, "lora_alpha": 8}}


def _main(directory: Path, rank: int, world_size: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    data = small_data(directory / f"corpus{os.getpid()}")
    runs = [Run(**values) for values in json.loads((directory / "runs.json").read_text())]
    answers = [_train(directory, run, data, rank, world_size) for run in runs]
    (directory / f"answers{rank}.json").write_text(json.dumps(answers))
    if world_size > 1:
        dist.destroy_process_group()


def _train(directory: Path, run: Run, data: Any, rank: int, world_size: int) -> dict[str, Any]:
    from deepseek_ray.errors import DeepSeekRayError
    from deepseek_ray.training import loop
    from deepseek_ray.training.ranks import Ranks

    class Stopped(Exception):
        pass

    if run.start is not None:
        Ranks(rank, world_size).on_first(lambda: _copy_start(directory, run))
    started: list[loop._Run] = []

    class Watched(loop._Run):
        @classmethod
        def start(cls, *arguments: Any) -> Any:
            started.append(super().start(*arguments))
            return started[0]

        def save(self) -> None:
            super().save()
            if self.step == run.stop_after:
                raise Stopped

    error, original = None, loop._Run
    loop._Run = Watched  # type: ignore[misc]
    try:
        config_class = FinetuneConfig if "base_model" in run.config else PretrainConfig
        loop.train(config_class.parse(run.config), directory / run.directory, data, Ranks(rank, world_size))
    except Stopped:
        pass
    except DeepSeekRayError as failure:
        error = f"{type(failure).__name__}: {failure}"
    finally:
        loop._Run = original  # type: ignore[misc]
    biases = []
    if started:
        biases = [moe.correction_bias.tolist() for moe in started[0].parallelism.model.moe_modules]
    return {"error": error, "biases": biases}


def _copy_start(directory: Path, run: Run) -> None:
    assert run.start is not None
    source, step = run.start
    target = directory / run.directory
    shutil.copytree(
        directory / source / "checkpoints" / f"step-{step:08d}", target / "checkpoints" / f"step-{step:08d}"
    )
    shutil.copyfile(directory / source / METRICS_FILE, target / METRICS_FILE)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
