"""How long this process takes for one expert: what shards of unlike machines are compared by."""

from __future__ import annotations

import time

import torch

from deepseek_ray.models.expert_store import ExpertStore

_ROWS = 8
"""Of each expert: about what a decode step brings, so that reading the weights counts as it does there."""
_MOST_EXPERTS = 16
_RUNS = 5


def seconds_per_expert(store: ExpertStore, hidden_size: int, dtype: torch.dtype) -> float:
    """The best of several runs over some of the experts that are held, in seconds an expert; 0 without any.

    The best one: others may compute on this machine at the same time, and no run is faster than the machine.
    """
    layer, experts = max(store.held.items(), key=lambda item: len(item[1]), default=(0, []))
    chosen = torch.tensor(experts[:_MOST_EXPERTS]).repeat_interleave(_ROWS)
    if not len(chosen):
        return 0.0
    hidden = torch.ones(_ROWS, hidden_size, dtype=dtype)
    rows = torch.arange(_ROWS).repeat(len(chosen) // _ROWS)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(_RUNS):
            started = time.perf_counter()
            out = store.run(layer, hidden, rows, chosen)
            if out is None:
                return 0.0  # they are being moved away
            out.cpu()  # a GPU is done only then
            best = min(best, time.perf_counter() - started)
    return best / (len(chosen) // _ROWS)
