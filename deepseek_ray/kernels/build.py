"""Builds the C++ operators of `cpp/` at first use, into a cache directory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock

from deepseek_ray.errors import DeepSeekRayError

SOURCES = Path(__file__).with_name("cpp")
# No contraction: a multiply-add is fused exactly where the source says so, in every template instance and loop tail.
FLAGS = [
    *["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    *["-pthread", "-fPIC"],
]


class KernelBuildError(DeepSeekRayError):
    """There is no C++ compiler, or it refused ours. The torch operators serve instead, slower."""


def cache_directory() -> Path:
    """Where built kernels live: `$DEEPSEEK_RAY_CACHE` or `$XDG_CACHE_HOME/deepseek_ray`."""
    root = os.environ.get("DEEPSEEK_RAY_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_ray"


def library(name: str, sources: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of the sources in one directory; built once per (source, flags, compiler, CPU).

    Raises KernelBuildError.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise KernelBuildError(
            "no C++ compiler found (looked for $CXX, g++, clang++, c++); install g++ for fast kernels"
        )
    path = cache_directory() / "kernels" / f"{name}-{_build_key(compiler, sources, flags)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # of the actors that start together, one builds
            if not path.exists():
                _build(compiler, path, sources, flags)
    return ctypes.CDLL(str(path))


def _build_key(compiler: str, sources: Path, flags: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for directory in dict.fromkeys((SOURCES, sources)):  # the headers beside the operators of serving serve all
        for source in sorted(path for path in directory.iterdir() if path.is_file()):
            digest.update(source.read_bytes())
    digest.update("\n".join([*flags, version, torch.__version__, _cpu_flags()]).encode())
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    """The CPU's instruction sets: a cache directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(compiler: str, library: Path, sources: Path, flags: Sequence[str]) -> None:
    """Compile aside, the files at once, then rename: nobody sees half a file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = {source: Path(scratch, source.stem + ".o") for source in sorted(sources.glob("*.cpp"))}
        compiling = [
            subprocess.Popen(
                [compiler, *flags, "-c", str(source), "-o", str(target)], stderr=subprocess.PIPE, text=True
            )
            for source, target in objects.items()
        ]
        results = [(process.communicate()[1], process.returncode) for process in compiling]
        for said, status in results:
            _require_success(compiler, status, said)
        whole = Path(scratch, library.name)
        command = [compiler, *flags, "-shared", *map(str, objects.values()), "-o", str(whole)]
        linked = subprocess.run(command, capture_output=True, text=True, check=False)
        _require_success(compiler, linked.returncode, linked.stderr)
        os.replace(whole, library)


def _require_success(compiler: str, status: int, said: str) -> None:
    if status:
        raise KernelBuildError(f"{compiler} could not build the kernels (exit {status}): {said[-500:]}")
