"""The learning rate of each optimiser step: linear warm-up, then a cosine down to a floor."""

from __future__ import annotations

import math


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int, floor: float) -> float:
    """Learning rate of optimiser step `step`, counted from 1 to `total_steps`.

    Step `warmup_steps` is the first at `peak`; step `total_steps` is at `peak * floor`.
    Pure arithmetic on the step number, so a resumed run sees the same values as an undisturbed one.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    start = max(warmup_steps, 1)
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
