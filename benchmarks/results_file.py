"""Results as files: `results/<what>_<hardware>_<yyyymm>.json`, with what they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "ray", "deepseek-ray")


def machine() -> dict[str, Any]:
    """Hardware and versions, for every results file."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def measured_on(result: dict[str, Any]) -> str:
    """Hardware and day of a results file, in words."""
    machine = result["machine"]
    return f"{machine['cores']} cores of {machine['cpu']}, {machine['date']}"


def results_path(what: str) -> Path:
    return RESULTS / f"{what}_{os.cpu_count()}cores_{datetime.date.today():%Y%m}.json"


def write_results(what: str, result: dict[str, Any]) -> Path:
    """Write and name the file."""
    path = results_path(what)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    return path


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    sets = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(sets)})"
