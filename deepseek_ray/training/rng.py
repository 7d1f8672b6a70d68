"""Random number generators of all workers: seeded at the start, kept in checkpoints, set again on resume."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_ray.training.ranks import Ranks


def seed_worker(seed: int, rank: int, step: int) -> None:
    """Seed this worker's generators for what follows `step`; every (seed, rank, step) has its own stream.

    The multipliers keep the three apart without overflowing the 63 bits a torch seed may have.
    """
    torch.manual_seed((seed + 1_000_003 * rank + 7_919 * step) % 2**63)


def gather_rng_states(ranks: Ranks) -> dict[str, Tensor]:
    """The generator states of all workers: `cpu` and, on GPUs, `cuda`, each [world_size, bytes] uint8."""
    states = {"cpu": ranks.gather(torch.get_rng_state())}
    if ranks.device.type == "cuda":
        states["cuda"] = ranks.gather(torch.cuda.get_rng_state(ranks.device))
    return states


def restore_rng_state(states: dict[str, Tensor], ranks: Ranks, seed: int, step: int) -> None:
    """Put this worker's generators where they were; a worker unknown to the checkpoint starts a stream of its own."""
    if ranks.rank >= len(states["cpu"]):
        seed_worker(seed, ranks.rank, step)
        return
    torch.set_rng_state(states["cpu"][ranks.rank].clone())  # torch reads a row of a larger tensor from a wrong place
    if ranks.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][ranks.rank].clone(), ranks.device)
