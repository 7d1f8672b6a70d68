"""How long until a system has its first token, and what it then keeps in memory, on bench-mini.

    python -m benchmarks.startup [--rounds 3] [--systems local vllm ...]

From the start of the process to its first token of a prompt of eight, with the checkpoint in the page cache and the
kernels built: "local" packs the experts, "local, packed" and "actors, packed" find them in files. Memory is the
proportional share (PSS) of all its processes, mapped files included. Systems take turns.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bench_model import bench_mini_dir
from benchmarks.generation import Driver, read_options
from benchmarks.results_file import write_results
from deepseek_ray.kernels.build import cache_directory

FIRST_TOKEN = {"sequences": 1, "prompt": 8, "tokens": 1, "seed": 0}
SYSTEMS = ("transformers", "llama.cpp", "vllm", "local", "local, packed", "actors, packed")


def main() -> None:
    options = read_options(__doc__, SYSTEMS)
    with _packed() as packed:
        _start("local", packed, options.threads)  # writes the files, and reads the checkpoint into the page cache
        samples: dict[str, list[dict[str, float]]] = {system: [] for system in options.systems}
        for number in range(options.rounds):
            for system in options.systems:
                samples[system].append(_measure(system, packed, options.threads))
                print(f"round {number + 1}: {system}: {samples[system][-1]}", flush=True)
    rows = [
        {"system": system, **{key: statistics.median(one[key] for one in own) for key in own[0]}}
        for system, own in samples.items()
    ]
    write_results("startup", {"threads": options.threads, "rounds": options.rounds, "rows": rows})


def _measure(system: str, packed: Path, threads: int) -> dict[str, float]:
    name, _, how = system.partition(", ")
    if how or name != "local":
        return _start(name, packed, threads)
    with _packed() as nothing:
        return _start(name, nothing, threads)


def _start(system: str, cache: Path, threads: int) -> dict[str, float]:
    started = time.perf_counter()
    driver = Driver(system, bench_mini_dir(), threads, DEEPSEEK_RAY_CACHE=str(cache))
    driver.measure(**FIRST_TOKEN)
    seconds = time.perf_counter() - started
    processes = [driver.process, *driver.process.children(recursive=True)]
    memory = sum(process.memory_full_info().pss for process in processes)
    driver.close()
    return {"ready_seconds": driver.start_seconds, "first_token_seconds": seconds, "memory_bytes": float(memory)}


@contextmanager
def _packed() -> Iterator[Path]:
    """A cache directory of its own: the built kernels, and no packed experts yet."""
    default_cache = cache_directory()
    with tempfile.TemporaryDirectory(dir=default_cache) as directory:
        shutil.copytree(default_cache / "kernels", Path(directory, "kernels"))
        yield Path(directory)


if __name__ == "__main__":
    main()
