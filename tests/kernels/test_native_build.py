"""What happens where the C++ operators cannot be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.kernels.native import KernelBuildError, load_library
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
    assert not list(cache.iterdir())


def test_without_a_compiler_torch_computes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    load_library.cache_clear()
    try:
        assert isinstance(default_kernels.__wrapped__(), ReferenceKernels)
    finally:
        load_library.cache_clear()
