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
    return RESULTS / f"{what}_{_hardware()}_{datetime.date.today():%Y%m}.json"


def newest_by_hardware(what: str) -> dict[str, dict[str, Any]]:
    """Hardware as the files' names have it -> what was measured there last, and the name of its `file`."""
    found = {}
    for path in sorted(RESULTS.glob(f"{what}_*.json")):  # of one hardware the months follow one another
        hardware = path.stem.removeprefix(f"{what}_").rsplit("_", 1)[0]
        found[hardware] = {**json.loads(path.read_text()), "file": path.name}
    return found


def newest(what: str) -> dict[str, Any]:
    """What was measured last on a machine like this one, or else on any."""
    found = newest_by_hardware(what)
    return found.get(_hardware()) or max(found.values(), key=lambda result: result["machine"]["date"])


def write_results(what: str, result: dict[str, Any]) -> Path:
    """Write and name the file."""
    path = results_path(what)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    return path


def _hardware() -> str:
    """Machines of one name are compared with each other; half of what is measured depends on AVX-512."""
    return f"{os.cpu_count()}cores{'_avx512' if 'avx512f' in _cpu_model() else ''}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    sets = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(sets)})"
