"""What is computed aside has the bits of what is computed at once, however far the other thread has come."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch

from deepseek_ray.kernels import aside
from deepseek_ray.kernels.base import PackedWeight
from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.quantize import Quantization
from tests.kernels.cases import DTYPES, random

WIDTH, HIDDEN = 1408, 1000


@pytest.fixture
def native() -> NativeKernels:
    return NativeKernels()


def network(
    native: NativeKernels, dtype: torch.dtype, quantization: Quantization | None = None, width: int = WIDTH
) -> tuple[PackedWeight, PackedWeight]:
    shapes = (2 * width, HIDDEN), (HIDDEN, width)
    return tuple(native.pack([random(*shape, dtype=dtype)], quantization) for shape in shapes)  # type: ignore[return-value]


def at_once(native: NativeKernels, x: torch.Tensor, gate_up: PackedWeight, down: PackedWeight) -> torch.Tensor:
    return native.linear(native.silu_mul(native.linear(x, gate_up)), down)


def wait_until_left(native: NativeKernels) -> None:
    deadline = time.monotonic() + 60
    while not all(native._aside.is_left(work) for work in aside._all):
        assert time.monotonic() < deadline, "the other thread gets no time at all"
        time.sleep(0.001)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("seconds", [0.0, 0.0005, 0.002, None], ids=["at once", "soon", "later", "when it is done"])
def test_bits(
    native: NativeKernels, dtype: torch.dtype, quantization: Quantization | None, rows: int, seconds: float | None
) -> None:
    gate_up, down = network(native, dtype, quantization)
    x = random(rows, HIDDEN + 3, dtype=dtype, seed=rows)[:, :-3]
    finish = native.mlp_aside(x, gate_up, down)
    assert finish is not None
    if seconds is None:
        wait_until_left(native)
    else:
        time.sleep(seconds)
    assert torch.equal(finish(), at_once(native, x, gate_up, down))


@pytest.mark.parametrize("width", [1, 8, 40, 64])
def test_networks_of_few_columns(native: NativeKernels, width: int) -> None:
    gate_up, down = network(native, torch.float32, width=width)
    x = random(2, HIDDEN)
    finish = native.mlp_aside(x, gate_up, down)
    assert finish is not None
    wait_until_left(native)
    assert torch.equal(finish(), at_once(native, x, gate_up, down))


def test_several_that_wait_and_one_that_nobody_wants(native: NativeKernels) -> None:
    gate_up, down = network(native, torch.bfloat16)
    inputs = [random(4, HIDDEN, dtype=torch.bfloat16, seed=seed) for seed in range(5)]
    ends = [native.mlp_aside(x, gate_up, down) for x in inputs]
    ends[2] = None
    for x, finish in zip(inputs, ends, strict=True):
        if finish is not None:
            assert torch.equal(finish(), at_once(native, x, gate_up, down))


def test_weights_stay_until_nobody_reads_them(native: NativeKernels) -> None:
    gate_up, down = network(native, torch.float32)
    finish = native.mlp_aside(random(4, HIDDEN), gate_up, down)
    assert finish is not None
    finish()
    gone = weakref.ref(gate_up)
    del gate_up, down, finish
    wait_until_left(native)
    native.mlp_aside(random(1, HIDDEN), *network(native, torch.float32, width=8))
    gc.collect()
    assert gone() is None
