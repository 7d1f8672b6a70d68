"""Where the time of one training step goes, by what it computes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_KINDS: dict[str, tuple[str, ...]] = {
    "experts": ("_RunExperts", "_grouped_mm"),
    "attention": ("_CausalAttention", "scaled_dot_product", "aten::bmm", "softmax_backward_data", "aten::_softmax"),
    "loss": ("_CrossEntropySum", "log_softmax", "LogSoftmax", "nll_loss", "NllLoss"),
    "optimizer": ("_fused_adamw_", "Optimizer.", "linalg_vector_norm"),
    "other products": ("aten::mm", "aten::addmm"),
}
"""Parts of operators' names; the first kind that an operator, or what called it, matches is its own."""
OTHER = "between them"
KINDS = (*_KINDS, OTHER)


def time_by_kind(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each of KINDS in one call, which the profiler slows a little."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    found: dict[str, float] = defaultdict(float)
    for event in profiled.events():
        found[_kind_of(event)] += event.self_cpu_time_total / 1000
    return {kind: found[kind] for kind in KINDS}


def product_rate(size: int = 1536, rounds: int = 9) -> float:
    """FLOP/s of torch's best product of two float32 matrices."""
    a, b, out = (torch.ones(size, size) for _ in range(3))
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _kind_of(event: Any) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for kind, parts in _KINDS.items():
        if any(part in name for part in parts for name in names):
            return kind
    return OTHER
