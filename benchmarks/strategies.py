"""What each training strategy costs on two workers: loss against one worker, bytes held per worker, speed against ddp.

Every strategy trains the same 20 steps in the same two processes over gloo on CPUs, one after the other.

    python -m benchmarks.strategies [--steps 20] [--note TEXT]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from deepseek_ray.config.run import PretrainConfig

WORKERS = 2
ONE_WORKER = "one worker"
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp", "data_parallel_size": 2},
    "fsdp": {"strategy": "fsdp", "data_parallel_size": 2},
    "deepspeed-1": {"strategy": "deepspeed", "zero_stage": 1, "data_parallel_size": 2},
    "deepspeed-2": {"strategy": "deepspeed", "zero_stage": 2, "data_parallel_size": 2},
    "deepspeed-3": {"strategy": "deepspeed", "zero_stage": 3, "data_parallel_size": 2},
    "tensor": {"strategy": "tensor", "tensor_parallel_size": 2},
    "expert": {"strategy": "expert", "expert_parallel_size": 2},
    "pipeline": {"strategy": "pipeline", "pipeline_parallel_size": 2},
}
MODEL = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "n_shared_experts": 1, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip


def config_of(distributed: dict[str, Any], steps: int) -> PretrainConfig:
    return PretrainConfig.parse(
        {
            "name": "strategies",
            "model": MODEL,
            "data": {"sequence_length": 64, "vocab_size": 2048},
            "schedule": {"warmup_steps": 5},
            "training": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 4},
            "distributed": distributed,
        }
    )


def train_one(config: PretrainConfig, rank: int, world_size: int) -> dict[str, Any]:
    """Losses of every step, bytes held when the last gradients are complete, median seconds of a step."""
    import time

    import torch

    from deepseek_ray.models.decoder import DeepSeekForCausalLM
    from deepseek_ray.training.ranks import Ranks
    from deepseek_ray.training.step import TrainStep
    from deepseek_ray.training.strategies import parallelism_for

    gc.collect()
    before = _storages()
    torch.manual_seed(0)
    parallelism = parallelism_for(config, Ranks(rank, world_size))
    parallelism.prepare(DeepSeekForCausalLM(config.model))
    held: list[int] = []
    clip = parallelism.clip_gradients

    def clip_and_weigh(max_norm: float) -> float:
        gc.collect()
        now = _storages()
        held.append(sum(size for key, size in now.items() if key not in before))
        return clip(max_norm)

    step, losses, seconds = TrainStep(parallelism), [], []
    readers, micro = parallelism.data, config.training.micro_batch_size
    for number in range(1, config.total_steps + 1):
        tokens = _tokens(config, number)
        own = tokens[readers.rank :: readers.world_size].split(micro)
        is_last = number == config.total_steps
        if is_last:
            parallelism.clip_gradients = clip_and_weigh  # type: ignore[method-assign]
        started = time.perf_counter()
        batches = [{"tokens": part, "document_ids": torch.zeros_like(part)} for part in own]
        losses.append(step.run(number, batches).loss)  # type: ignore[arg-type]
        if not is_last:
            seconds.append(time.perf_counter() - started)
    return {"losses": losses, "bytes": held[-1], "seconds": statistics.median(seconds[len(seconds) // 4 :])}


def _tokens(config: PretrainConfig, step: int) -> Any:
    """[batch, sequence_length + 1] token ids with something to learn: multiples of a random stride."""
    import torch

    generator = torch.Generator().manual_seed(step)
    size = (config.training.global_batch_size, 1)
    start, stride = (torch.randint(1, 40, size, generator=generator) for _ in range(2))
    return (start + stride * torch.arange(config.data.sequence_length + 1)) % config.model.vocab_size


def _storages() -> dict[int, int]:
    """Address -> bytes of every tensor memory of this process."""
    import torch

    found: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            local = item.to_local() if hasattr(item, "to_local") else item
            try:
                storage = local.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (NotImplementedError, RuntimeError):  # a tensor without memory
                continue
    return found


def worker(directory: Path, rank: int, world_size: int, steps: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    cases = {ONE_WORKER: {"strategy": "ddp"}} if world_size == 1 else STRATEGIES
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=300),
        )
    results = {name: train_one(config_of(case, steps), rank, world_size) for name, case in cases.items()}
    (directory / f"{world_size}-{rank}.json").write_text(json.dumps(results))
    if world_size > 1:
        dist.destroy_process_group()


def measure(directory: Path, world_size: int, steps: int) -> list[dict[str, dict[str, Any]]]:
    """What each rank measured of each strategy."""
    command = [sys.executable, "-m", "benchmarks.strategies", "--steps", str(steps), "--worker", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, str(rank), str(world_size)], env=environment) for rank in range(world_size)]
    try:
        codes = [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        raise SystemExit(f"a worker failed: exit codes {codes}")
    return [json.loads((directory / f"{world_size}-{rank}.json").read_text()) for rank in range(world_size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--note", default="", help="what else ran on the machine, for the results file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        directory, rank, world_size = options.worker
        worker(Path(directory), int(rank), int(world_size), options.steps)
        return
    with tempfile.TemporaryDirectory() as directory:
        alone = measure(Path(directory), 1, options.steps)[0][ONE_WORKER]
        together = measure(Path(directory), WORKERS, options.steps)
    rows = {}
    for name in STRATEGIES:
        ranks = [measured[name] for measured in together]
        differences = [abs(a - b) for a, b in zip(ranks[0]["losses"], alone["losses"], strict=True)]
        rows[name] = {
            "max_loss_difference": max(differences),
            "bytes_per_rank": max(rank["bytes"] for rank in ranks),
            "tokens_per_second_to_ddp": round(together[0]["ddp"]["seconds"] / ranks[0]["seconds"], 3),
        }
        print(f"{name:12} {rows[name]}")
    question = "loss against one worker (nats), bytes of weights, gradients and optimiser state, and speed against ddp"
    result = {
        "question": f"{question}, on {WORKERS} gloo workers of one thread",
        "note": options.note,
        "model": MODEL,
        "parameters": config_of(STRATEGIES["ddp"], options.steps).model.num_parameters,
        "steps": options.steps,
        "bytes_of_one_worker": alone["bytes"],
        "strategies": rows,
    }
    write_results("strategies", result)


if __name__ == "__main__":
    main()
