"""`make bench`: every benchmark, one after the other, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = (
    *(
        "frame_round_trip",
        "generation",
        "uneven_load",
        "step_profile",
        "startup",
        "quantization",
        "speculation",
        "long_context",
        "http_load",
        "simulate",
    ),
    *("training", "strategies", "placement", "tuning", "gpu_kernels", "gpu_decode", "gpu_plots"),
)


def main() -> None:
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
