"""What happens where the C++ operators cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_ray.kernels.build import KernelBuildError
from deepseek_ray.kernels.native import load_library
from deepseek_ray.kernels.reference import ReferenceKernels
from deepseek_ray.kernels.select import default_kernels


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_a_compiler_that_refuses_is_named_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "refuses"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(KernelBuildError, match=r"refuses could not build the kernels \(exit 3\): no such instruction"):
        load_library.__wrapped__()
    assert {path.suffix for path in cache.iterdir()} <= {".lock"}


def test_of_processes_that_start_together_one_builds(cache: Path, tmp_path: Path) -> None:
    compiler, calls = tmp_path / "counts", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    program = "from deepseek_ray.kernels.native import load_library; load_library()"
    environment = {**os.environ, "CXX": str(compiler)}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    links = [line for line in calls.read_text().splitlines() if "-shared" in line]
    assert len(links) == 1


def test_without_a_compiler_torch_computes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    load_library.cache_clear()
    try:
        assert isinstance(default_kernels.__wrapped__(), ReferenceKernels)
    finally:
        load_library.cache_clear()
