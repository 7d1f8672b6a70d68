"""The Triton operators against torch row by row: on a CUDA device, else interpreted on the CPU where Triton is there.

Triton comes with torch for CUDA; `pip install --no-deps triton` brings it beside torch for CPUs (700 MB).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from deepseek_ray.kernels.fast import FastKernels
from deepseek_ray.kernels.reference import ReferenceKernels
from tests.kernels.cases import DTYPES, paged_case, random, tolerance

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
gpu = pytest.importorskip("deepseek_ray.kernels.gpu", reason="no Triton", exc_type=ImportError)

pytestmark = [pytest.mark.gpu] if ON_GPU else []
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
GPU, SLOW = gpu.GpuKernels(), ReferenceKernels()


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers of 16 bits, and multiplies these."""
    if not ON_GPU:
        from triton.runtime import interpreter

        multiply = interpreter.InterpreterBuilder.create_dot

        def multiply_numbers(self: object, a: object, b: object, *others: object) -> object:
            return multiply(self, _as_float32(a), _as_float32(b), *others)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiply_numbers)


def _as_float32(handle):  # type: ignore[no-untyped-def]
    from triton import language as tl
    from triton.runtime import interpreter

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def assert_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.cpu(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[1], [4, 1, 2], [20, 0, 3], [1, 1, 130], [70, 70, 70]])
def test_groups(dtype: torch.dtype, rows: list[int]) -> None:
    weights = [random(80, 72, dtype=dtype, seed=seed) for seed in range(len(rows))]
    x = random(sum(rows), 72, dtype=dtype, seed=9)
    packed = [GPU.pack([weight]).to(DEVICE) for weight in weights]
    expected = SLOW.grouped_linear(x, [SLOW.pack([weight]) for weight in weights], rows)
    assert_near(GPU.grouped_linear(x.to(DEVICE), packed, rows), expected, dtype)


def test_integers_take_torchs_way() -> None:
    x, weights = random(3, 64), [random(32, 64, seed=seed) for seed in range(2)]
    packed = [GPU.pack([weight], "int8").to(DEVICE) for weight in weights]
    expected = FastKernels().grouped_linear(x.to(DEVICE), packed, [1, 2])
    assert torch.equal(GPU.grouped_linear(x.to(DEVICE), packed, [1, 2]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "longest"), [(1, 1), (1, 16), (9, 16), (2, gpu._SPLIT), (2, gpu._SPLIT + 1), (3, 2 * gpu._SPLIT + 70)]
)
def test_attention_over_paged_latents(dtype: torch.dtype, tokens: int, longest: int) -> None:
    case = paged_case(dtype, tokens, longest)
    expected = SLOW.latent_attention(**case)
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    assert_near(GPU.latent_attention(**there), expected, dtype)


def test_prefill_takes_torchs_way() -> None:
    case = paged_case(torch.float32, 40)
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    assert torch.equal(GPU.latent_attention(**there), FastKernels().latent_attention(**there))
