"""How much memory there is for a member."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes(device: torch.device, gpus: float) -> float:
    """Of the machine or container, which its processes share; of a GPU, the member's part when it has `gpus` < 1."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * min(1.0, gpus)
    return min([psutil.virtual_memory().total, *_container_limits()])


def _container_limits() -> list[int]:
    limits = []
    for path in _CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return limits
