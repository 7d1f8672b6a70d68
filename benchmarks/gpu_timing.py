"""What a GPU can do, measured, and how long its work takes beside that."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

Run = Callable[[], object]


class Rates(NamedTuple):
    """Of copying a gigabyte within the GPU's memory, read and written bytes together, and of torch's best bfloat16
    matrix product."""

    bytes_per_second: float
    flop_per_second: float


def measured_rates(times: int = 20) -> Rates:
    copied, target = (torch.randn(250_000_000, device="cuda") for _ in range(2))
    factor = torch.randn(8192, 8192, device="cuda").bfloat16()
    found = seconds_in_turns({"copy": lambda: target.copy_(copied), "product": lambda: factor @ factor}, times)
    rates = Rates(2 * copied.nbytes / found["copy"], 2 * 8192**3 / found["product"])
    print(f"copies {rates.bytes_per_second / 1e9:,.0f} GB/s, multiplies {rates.flop_per_second / 1e12:,.0f} TFLOP/s")
    return rates


def seconds_in_turns(runs: dict[str, Run], times: int, warm_up: int = 3) -> dict[str, float]:
    """Median of each on the GPU's clock, in turns. What the host takes longer for than the GPU counts, too."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(times + warm_up):
        for name, run in runs.items():
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            started.record()
            run()
            ended.record()
            torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(started.elapsed_time(ended) / 1000)
    return {name: statistics.median(own) for name, own in seconds.items()}


def graphed(run: Run) -> Run:
    """The same work without the time of its launches; keeps what `run` refers to, which the graph does not."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(run: Run = run) -> None:
        graph.replay()

    return replay
