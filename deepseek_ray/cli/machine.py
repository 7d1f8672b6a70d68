"""What can be found out about this machine and this environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

_GIB = 2**30
_PACKAGES = ("torch", "ray", "transformers", "tokenizers", "safetensors", "pydantic", "msgspec", "numpy", "pyarrow")
_VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")
_MIN_OPEN_FILES = 4096
_MIN_FREE_DISK_BYTES = 5 * _GIB


@dataclass(frozen=True)
class Finding:
    name: str
    value: str
    status: Literal["ok", "note", "missing"] = "ok"
    """note: works, but slower or less; missing: something cannot work."""
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding; a probe that fails is a finding too."""
    probes: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("system", _system),
        ("cores", _cores),
        ("memory", _memory),
        ("packages", _packages),
        ("GPUs", _gpus),
        ("native kernels", _kernels),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
        ("disk", _disk),
    )
    findings: list[Finding] = []
    for name, probe in probes:
        try:
            findings += probe()
        except Exception as error:  # one odd corner of a machine must not hide the rest
            findings.append(Finding(name, f"cannot be examined: {error}", "note"))
    return findings


def _system() -> list[Finding]:
    return [
        Finding("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        Finding("system", platform.platform()),
    ]


def _cores() -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = os.cpu_count() or usable
    flags = set(_cpu_flags())
    known = [flag for flag in _VECTOR_FLAGS if flag in flags]
    return [
        Finding("cores", f"{usable} usable of {total}"),
        Finding("cpu", _cpu_name()),
        Finding(
            "instruction sets",
            " ".join(known) or "none of those that the kernels use",
            "ok" if {"avx512f", "avx2", "asimd"} & flags else "note",
            "" if known else "generation works and is slow on this processor",
        ),
    ]


def _cpu_flags() -> list[str]:
    return _cpuinfo("flags", "Features").split()


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


def _memory() -> list[Finding]:
    memory = psutil.virtual_memory()
    return [Finding("memory", f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f} GiB")]


def _packages() -> list[Finding]:
    findings = []
    for name in _PACKAGES:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", "missing", f"pip install -c constraints.txt {name}"))
    return findings


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("GPUs", "none that torch can use; everything runs on the processor")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Finding(f"GPU {index}", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB"))
    return found


def _kernels() -> list[Finding]:
    from deepseek_ray.kernels.build import KernelBuildError
    from deepseek_ray.kernels.native import load_library

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    try:
        load_library()
    except KernelBuildError as error:
        remedy = "install a C++ compiler with OpenMP (Debian, Ubuntu: apt install g++)"
        return [
            Finding("native kernels", f"do not build: {error}", "note", f"{remedy}; without them text comes slowly")
        ]
    return [Finding("compiler", compiler or "not needed: the kernels are built"), Finding("native kernels", "built")]


def _shared_memory() -> list[Finding]:
    """Ray's object store lies in /dev/shm; the links between actors need nothing there."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return [Finding("/dev/shm", "absent", "note", "Ray puts its object store on disk, which is slower")]
    if usage.total < _GIB:
        return [
            Finding(
                "/dev/shm",
                f"{usage.total / 2**20:.0f} MiB",
                "note",
                "small for Ray's object store when data is prepared; in a container give --shm-size=2g",
            )
        ]
    return [Finding("/dev/shm", f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} GiB")]


def _open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_OPEN_FILES:
        return [
            Finding("open files", f"limit {soft}", "note", f"raise it for many clients: ulimit -n {_MIN_OPEN_FILES}")
        ]
    return [Finding("open files", f"limit {soft} (hard {hard})")]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    status: Literal["ok", "note"] = "ok" if free >= _MIN_FREE_DISK_BYTES else "note"
    remedy = "" if status == "ok" else "checkpoints and Ray's session files need room; free some"
    return [Finding("disk", f"{free / _GIB:.1f} GiB free here", status, remedy)]
