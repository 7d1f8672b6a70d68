"""Two processes over gloo: rows find their experts and come back, and what is whole on every worker stays equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_WORKER = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from training_runs import small_config
from deepseek_ray.models.decoder import DeepSeekForCausalLM
from deepseek_ray.nn.experts import Experts
from deepseek_ray.training.objective import MicroBatch, Objective
from deepseek_ray.training.parallel_expert import DividedExperts
from deepseek_ray.training.parallel_mesh import Division, Shard
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.strategies import parallelism_for

store, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
world = dist.group.WORLD


def experts_of(seed):
    torch.manual_seed(seed)
    experts = Experts(small_config().model)
    nn.init.normal_(experts.gate_up)
    nn.init.normal_(experts.down)
    return experts


def tokens_of(case, of_rank):
    '''[T, 32] and [T, 2]: two experts of four for each token.'''
    torch.manual_seed(100 + of_rank)
    num = {"even": 12, "crowded": 5 + 7 * of_rank, "one sender": 9 * of_rank}[case]
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(num)]) if num else torch.empty(0, 2, dtype=torch.int64)
    if case == "crowded":
        ids = ids % 2 + 2 if num % 2 else ids // 2 + 2  # rank 0's experts, 0 and 1, get nothing
    return torch.randn(num, 32).requires_grad_(), ids


def compute(experts, hidden, ids):
    weights = torch.linspace(0.5, 1.5, ids.numel()).view(ids.shape)
    output = experts(hidden, ids, weights, ids.flatten().bincount(minlength=4))
    output.square().sum().backward()
    return output


def check(case):
    whole, divided = experts_of(7), DividedExperts(experts_of(7), world, Division())
    hidden, ids = tokens_of(case, rank)
    rows = compute(divided, hidden, ids)
    for of_rank in (0, 1):  # both workers' tokens through one process's experts
        same, same_ids = tokens_of(case, of_rank)
        expected = compute(whole, same, same_ids)
        if of_rank == rank:
            torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(hidden.grad, same.grad, rtol=1e-4, atol=1e-3)
    for name, parameter in whole.named_parameters():
        grad = getattr(divided, name).grad
        assert grad is not None, name
        torch.testing.assert_close(grad, Shard(world).cut(parameter.grad), rtol=1e-4, atol=1e-2, msg=name)
    idle = case == "crowded" and rank == 0
    assert (divided.down.grad.count_nonzero() == 0) == idle, "the case is not what it says"


def check_replicas(strategy):
    config = small_config(
        distributed={"strategy": strategy, f"{strategy}_parallel_size": 2}, model={"vocab_size": 512},
        training={"micro_batch_size": 2},
    )
    torch.manual_seed(0)
    parallelism = parallelism_for(config, Ranks(rank, 2))
    parallelism.prepare(DeepSeekForCausalLM(config.model))
    torch.manual_seed(parallelism.data.rank)
    batches = [{"tokens": torch.randint(512, (2, 25)), "document_ids": torch.zeros(2, 25)} for _ in range(2)]
    parts = [MicroBatch.of(batch, 2, parallelism.world.device) for batch in batches]
    for _ in range(2):
        parallelism.forward_backward(parts, Objective(config, torch.tensor([96, 94])))
        norm = parallelism.clip_gradients(1.0)
        parallelism.update(1e-2)
    norms = [None, None]
    dist.all_gather_object(norms, norm)
    assert norms[0] == norms[1]
    compared = 0
    for name, parameter in parallelism.model.named_parameters():
        if parallelism.division.shard_of(parameter) is None:
            parts = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(parts, parameter.detach())
            assert torch.equal(*parts), name
            compared += 1
    assert compared > 10


for case in ("even", "crowded", "one sender"):
    check(case)
    print(case)
for strategy in ("tensor", "expert"):
    check_replicas(strategy)
    print(strategy)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What both processes printed: the checks they passed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    store = tmp_path_factory.mktemp("ranks") / "store"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(store), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("case", ["even", "crowded", "one sender"])
def test_rows_meet_their_experts_and_return_to_their_slots(said: list[str], case: str) -> None:
    """crowded: one worker's experts get no row, all go to the other's; one sender: a worker has no token."""
    assert all(case in output.splitlines() for output in said), said


@pytest.mark.parametrize("strategy", ["tensor", "expert"])
def test_what_is_whole_stays_equal_to_the_last_bit(said: list[str], strategy: str) -> None:
    assert all(strategy in output.splitlines() for output in said), said
