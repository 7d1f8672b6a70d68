"""How long 128 KB take to another process on this node and back: links against bare eventfd + memcpy.

Every way joins the same two processes, and the runs are interleaved, so all see the same machine. The bare way is the
floor for two Python processes: one copy into shared memory and one wake-up each way, no header, no end of file.

    python -m benchmarks.frame_round_trip [--bytes 131072] [--round-trips 300] [--runs 15]
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

from benchmarks.results_file import write_results
from deepseek_ray.links.base import Endpoints, Link
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame, FrameKind
from deepseek_ray.links.handshake import new_secret

WARM_UP_ROUND_TRIPS = 50
WAYS = ("bare", "shared_memory", "tcp")


class Descriptor:
    """A file descriptor as an argument of a spawned process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _descriptor, (DupFd(self.number),)


def _descriptor(duplicate: Any) -> Descriptor:
    return Descriptor(duplicate.detach())


class Bare:
    """Two halves of a shared memory and an eventfd for each; `mine` says which half and eventfd this side writes."""

    def __init__(self, memory: Descriptor, events: tuple[Descriptor, Descriptor], num_bytes: int, mine: int) -> None:
        self._half = memoryview(mmap.mmap(memory.number, 2 * num_bytes))[mine * num_bytes : (mine + 1) * num_bytes]
        self._to_peer, self._from_peer = events[mine].number, events[1 - mine].number

    def send(self, payload: memoryview) -> None:
        self._half[:] = payload
        os.eventfd_write(self._to_peer, 1)

    def receive(self) -> None:
        os.eventfd_read(self._from_peer)


class Framed:
    """The same over a link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def send(self, payload: memoryview) -> None:
        self._link.send(Frame(FrameKind.EXPERT_CALL, payload, layer=1))

    def receive(self) -> None:
        frame = self._link.receive(10)
        assert frame is not None
        frame.release()


def echo(
    orders: Connection,
    endpoints: Endpoints,
    secret: bytes,
    memory: Descriptor,
    events: tuple[Descriptor, Descriptor],
    size: int,
) -> None:
    """The other process: answers as many payloads as ordered, each with as many bytes, until told to stop."""
    payload = memoryview(bytearray(size))
    ways: dict[str, Bare | Framed] = {"bare": Bare(memory, events, size, mine=1)}
    for way in WAYS[1:]:
        ways[way] = Framed(connect(endpoints, "node", "bench", secret, way))  # type: ignore[arg-type]
    while (order := orders.recv()) is not None:
        way, count = order
        for _ in range(count):
            ways[way].receive()
            ways[way].send(payload)


def measure(size: int, round_trips: int, runs: int) -> dict[str, float]:
    """Median over `runs` interleaved runs of the mean microseconds of one round trip, per way."""
    context = multiprocessing.get_context("spawn")
    secret = new_secret()
    memory = Descriptor(os.memfd_create("bare"))
    os.posix_fallocate(memory.number, 0, 2 * size)
    events = (Descriptor(os.eventfd(0)), Descriptor(os.eventfd(0)))
    orders, theirs = context.Pipe()
    with listen("node", "127.0.0.1", "bench", secret) as listener:
        child = context.Process(target=echo, args=(theirs, listener.endpoints, secret, memory, events, size))
        child.start()
        ways: dict[str, Bare | Framed] = {"bare": Bare(memory, events, size, mine=0)}
        for way in WAYS[1:]:
            link = listener.accept(30)
            assert link is not None
            ways[way] = Framed(link)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for run in range(runs + 1):
            for way in WAYS:
                count = round_trips if run else WARM_UP_ROUND_TRIPS
                orders.send((way, count))
                times[way].append(_run(ways[way], size, count))
        orders.send(None)
        child.join()
    return {way: statistics.median(values[1:]) for way, values in times.items()}


def _run(way: Bare | Framed, size: int, count: int) -> float:
    payload = memoryview(bytearray(os.urandom(size)))
    start = time.perf_counter()
    for _ in range(count):
        way.send(payload)
        way.receive()
    return (time.perf_counter() - start) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=128 * 1024, dest="size")
    parser.add_argument("--round-trips", type=int, default=300)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    micros = measure(options.size, options.round_trips, options.runs)
    result = {
        "question": "round trip of a frame between two processes on one node, microseconds (median of runs)",
        "bytes_each_way": options.size,
        "round_trips": options.round_trips,
        "runs": options.runs,
        "microseconds": {way: round(value, 1) for way, value in micros.items()},
    }
    figures = ", ".join(f"{way} {value:.0f} us" for way, value in micros.items())
    print(f"{options.size} bytes there and back: {figures}")
    write_results("frame_round_trip", result)


if __name__ == "__main__":
    main()
