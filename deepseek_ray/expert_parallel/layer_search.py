"""Balances one layer step by step, from where its replicas are.

Each step takes work off the busiest shard and is allowed if every shard it touches ends below that shard's time before.
So the sorted times of the shards fall in lexicographic order, no state comes twice, and the search ends.
"""

from __future__ import annotations

import numpy as np

from deepseek_ray.expert_parallel.layer_steps import Bools, Floats, Ints, LayerLimits, kinds_of_steps
from deepseek_ray.expert_parallel.replicas import shard_times

MAX_STEPS = 1000
"""Far above what is needed (tens): a bound for the time of a decision."""
_LEAST_GAIN = 1e-3
"""A step that lowers the busiest shard by less than this part of its time is not worth an add."""


def balance_layer(
    held: Bools, loads: Floats, free: Ints, limits: LayerLimits, threshold: float, tolerance: float
) -> Bools:
    """New holders [E, S] of one layer. loads: [E]; free: [S] slots that no layer uses.

    Nothing changes if the busiest shard takes at most (1 + threshold) * best now. Otherwise, of the states on the
    search's way that take at most (1 + tolerance) * best, the one with the fewest adds is taken. `best` is the time
    all shards would take if they were even, or, if the search does not come that near to it, the lowest time of the
    busiest shard that it found.
    """
    now = shard_times(held, loads, limits.speeds).max()
    even = loads.sum() / limits.speeds.sum()
    if now <= (1 + threshold) * even:
        return held
    states = [held, *search(held, loads, free, limits, tolerance)]
    if shard_times(states[-1], loads, limits.speeds).max() > (1 + tolerance) * even:
        start = _recounted(held, loads, free, limits)
        states += [start, *search(start, loads, _free_after(free, held, start), limits, tolerance)]
    peaks = np.array([shard_times(state, loads, limits.speeds).max() for state in states])
    best = even if peaks.min() <= (1 + tolerance) * even else peaks.min()
    if now <= (1 + threshold) * best:
        return held
    enough = (1 + tolerance) * best
    good = [state for state, peak in zip(states, peaks, strict=True) if peak <= enough]
    return min(good, key=lambda state: int((state & ~held).sum()))


def search(
    held: Bools, loads: Floats, free: Ints, limits: LayerLimits, tolerance: float, every_shard: bool = False
) -> list[Bools]:
    """The states [E, S] after each step, until the busiest shard is within `tolerance` of the mean or nothing helps it.

    every_shard: go on with the others then, as if there were only those.
    """
    states: list[Bools] = []
    helpless = np.zeros(len(limits.speeds), dtype=np.bool_)
    state = held
    while len(states) < MAX_STEPS and not helpless.all():
        times = shard_times(state, loads, limits.speeds)
        busiest = int(np.where(helpless, -1.0, times).argmax())
        rest = ~helpless
        even = times[rest] @ limits.speeds[rest] / limits.speeds[rest].sum()
        if times[busiest] <= (1 + tolerance) * even:
            break
        better = _best_step(state, loads, _free_after(free, held, state), limits, times, busiest)
        if better is not None:
            state = better
            states.append(state)
        elif every_shard:
            helpless[busiest] = True
        else:
            break
    return states


def _best_step(
    held: Bools, loads: Floats, free: Ints, limits: LayerLimits, times: Floats, busiest: int
) -> Bools | None:
    """The state after the step with the largest gain, the first of equals; two adds only where one gains nothing."""
    best, best_gain = None, _LEAST_GAIN * times[busiest]
    for steps in kinds_of_steps(held, loads, free, limits, times, busiest):
        if best is not None and steps.num_adds > 1:
            break
        if not len(steps.expert):
            continue
        gains = times[busiest] - steps.peaks(held, loads, limits.speeds, times, busiest)
        index = int(gains.argmax())
        if gains[index] > best_gain:
            best, best_gain = steps.apply(held, index), gains[index]
    return best


def _recounted(held: Bools, loads: Floats, free: Ints, limits: LayerLimits) -> Bools:
    """Another place to search from: each replica more goes to the largest load per replica, as in EPLB."""
    counts = np.full(len(loads), limits.min_replicas)
    for _ in range(min(limits.max_replicas, held.size) - counts.sum()):
        counts[np.where(counts < held.shape[1], loads / counts, -1.0).argmax()] += 1
    state = held.copy()
    order = np.argsort(-loads / counts, kind="stable")
    for expert in order:
        while state[expert].sum() > counts[expert]:
            times = shard_times(state, loads, limits.speeds)
            state[expert, np.where(state[expert], times, -1.0).argmax()] = False
    for expert in order:
        while state[expert].sum() < counts[expert]:
            possible = ~state[expert] & limits.destinations & (_free_after(free, held, state) > 0)
            if not possible.any():
                break
            times = shard_times(state, loads, limits.speeds)
            state[expert, np.where(possible, times, np.inf).argmin()] = True
    return state


def _free_after(free: Ints, before: Bools, after: Bools) -> Ints:
    """[S]: free slots once the layer has changed."""
    return free + before.sum(axis=0) - after.sum(axis=0)
