"""How long this process takes for one expert: what shards of unlike machines are compared by."""

from __future__ import annotations

import time

import torch

from deepseek_ray.models.expert_store import ExpertStore

_ROWS = 8
"""Of each expert: about what a decode step brings, so that reading the weights counts as it does there."""
_MOST_EXPERTS = 16
_PAUSE_SECONDS = 0.02
"""Between two experts: whoever is asked for tokens meanwhile is not to notice."""


def seconds_per_expert(store: ExpertStore, hidden_size: int, dtype: torch.dtype) -> float:
    """The best time over some of the experts that are held, one after the other; 0 without any.

    The best one: others may compute on this machine at the same time, and no run is faster than the machine.
    """
    layer, experts = max(store.held.items(), key=lambda item: len(item[1]), default=(0, []))
    hidden, rows = torch.ones(_ROWS, hidden_size, dtype=dtype), torch.arange(_ROWS)
    seconds = []
    with torch.inference_mode():
        for expert in experts[:_MOST_EXPERTS] * 2:  # the second time their pages are there
            started = time.perf_counter()
            out = store.run(layer, hidden, rows, torch.full((_ROWS,), expert))
            if out is None:
                return 0.0  # it is being moved away
            out.cpu()  # a GPU is done only then
            seconds.append(time.perf_counter() - started)
            time.sleep(_PAUSE_SECONDS)
    return min(seconds, default=0.0)
