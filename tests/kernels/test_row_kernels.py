"""The C++ operators against torch row by row, and their row invariance."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from deepseek_ray.kernels import build
from deepseek_ray.kernels.base import Kernels, PackedWeight, Place
from deepseek_ray.kernels.native import NativeKernels, load_library
from deepseek_ray.kernels.quantize import QUANTIZATIONS, Quantization, dequantize, quantize, round_inputs
from deepseek_ray.kernels.reference import ReferenceKernels
from tests.kernels.cases import DTYPES, WIDTHS, Widths, paged_case, random, tolerance

SHAPES = [(0, 16, 8), (1, 1, 1), (3, 17, 40), (9, 64, 97), (70, 200, 48), (150, 70, 1300)]
"""(rows, outputs, inputs): the last has several panels of rows and several runs of inputs."""


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    return NativeKernels()


@pytest.fixture(params=["native", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return NativeKernels() if request.param == "native" else ReferenceKernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_out", "num_in"), SHAPES)
def test_linear_equals_torch(native: NativeKernels, rows: int, num_out: int, num_in: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, num_in, dtype=dtype), random(num_out, num_in, dtype=dtype, seed=1)
    expected = (x.double() @ weight.double().T).to(dtype)
    near = tolerance(dtype)
    near["atol"] *= max(1, num_in / 100)  # sums of that many
    torch.testing.assert_close(native.linear(x, native.pack([weight])), expected, **near)


def test_weights_are_packed_as_the_layout_says(native: NativeKernels) -> None:
    """float32: [blocks][inputs][16]; bfloat16: [blocks][pairs of inputs][16][2]; zero padded."""
    weight = random(35, 7)
    padded = torch.nn.functional.pad(weight, (0, 1, 0, 13))
    assert torch.equal(native.pack([weight]).data[0], padded[:, :7].view(3, 16, 7).transpose(1, 2).flatten())
    pairs = padded.bfloat16().view(3, 16, 4, 2).transpose(1, 2).flatten()
    assert torch.equal(native.pack([weight.bfloat16()]).data[0], pairs)
    part = torch.cat([weight, weight], dim=1)[:, :7]  # rows that are not beside each other
    assert torch.equal(native.pack([part]).data, native.pack([weight]).data)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "num_out", "num_in"), SHAPES)
def test_integers_are_those_of_the_reference(
    native: NativeKernels, rows: int, num_out: int, num_in: int, dtype: torch.dtype, kind: Quantization
) -> None:
    x, weight = random(rows, num_in, dtype=dtype), random(num_out, num_in, dtype=dtype, seed=1)
    weight[0] = 0
    integers, scales = quantize(weight, kind)
    packed = native.pack([weight], kind)
    assert torch.equal(_unpacked(packed, kind), integers)
    expected = (round_inputs(x).double() @ dequantize(integers, scales).double().T).to(dtype)
    near = tolerance(dtype)
    near["atol"] *= max(1, num_in / 100)
    torch.testing.assert_close(native.linear(x, packed), expected, **near)
    assert torch.equal(native.grouped_linear(x, [packed], [rows]), native.linear(x, packed))


def _unpacked(packed: PackedWeight, kind: Quantization) -> torch.Tensor:
    """[N, K] from the layout of `cpp/linear.cpp`."""
    groups = -(-packed.num_in // 32)
    if kind == "int8":
        bytes_from_zero = packed.data.view(torch.uint8).to(torch.int16)
        rows = (bytes_from_zero - 128).view(-1, groups * 8, 16, 4).transpose(1, 2)
    else:
        units = packed.data.view(-1, groups * 4, 16, 1)
        halves = (units >> torch.tensor([0, 8, 16, 24, 4, 12, 20, 28])) & 15
        rows = (halves - 8).transpose(1, 2)
    return rows.reshape(-(-packed.num_out // 16) * 16, -1)[: packed.num_out, : packed.num_in].to(torch.int8)


def test_integers_are_as_near_as_their_steps() -> None:
    weight = random(20, 300)
    integers, scales = quantize(weight, "int8")
    assert (dequantize(integers, scales) - weight).abs().max() <= scales.max() / 2 * 1.0001
    assert integers.abs().amax(dim=1).eq(127).all()
    integers, scales = quantize(weight, "int4")
    steps = scales.abs().repeat_interleave(32, dim=1)[:, :300]
    error = (dequantize(integers, scales) - weight).abs() / steps
    assert error[integers < 7].max() <= 0.5 + 8 / 256  # the scale is rounded to bfloat16
    assert error.max() <= 1 + 8 / 256  # the positive end is one step short


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_what_is_not_finite_does_not_come_out_as_a_number(kernels: Kernels, kind: Quantization) -> None:
    packed = kernels.pack([random(20, 70)], kind)
    for value in (float("nan"), float("inf")):
        x = random(3, 70, seed=1)
        x[1, 40] = value
        out = kernels.linear(x, packed)
        assert out.isfinite().all(dim=1).tolist() == [True, False, True]


def test_linear_can_widen_its_output(native: NativeKernels) -> None:
    x, weight = random(4, 32, dtype=torch.bfloat16), random(20, 32, dtype=torch.bfloat16, seed=1)
    out = native.linear(x, native.pack([weight]), out_dtype=torch.float32)
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-5, atol=1e-5)


def test_grouped_linear_meets_each_row_with_its_group(kernels: Kernels) -> None:
    weights = [random(24, 16, seed=seed) for seed in range(4)]
    x = random(7, 16, seed=9)
    packed = [kernels.pack([weight]) for weight in weights]
    out = kernels.grouped_linear(x, [packed[2], packed[0], packed[3]], rows=[4, 1, 2])
    owner = [2, 2, 2, 2, 0, 3, 3]
    expected = torch.stack([weights[group] @ row for group, row in zip(owner, x, strict=True)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_per_head_linear_reads_strided_heads(kernels: Kernels) -> None:
    weights = [random(24, 16, seed=seed) for seed in range(3)]
    wide = random(5, 3, 20, seed=9)
    out = kernels.per_head_linear(wide[..., :16], kernels.pack(weights))
    expected = torch.einsum("thk,hnk->thn", wide[..., :16], torch.stack(weights))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_per_head_linear_meets_each_head_with_its_integers(kernels: Kernels, kind: Quantization) -> None:
    weights = [random(24, 40, seed=seed) for seed in range(3)]
    wide = random(5, 3, 48, seed=9)
    out = kernels.per_head_linear(wide[..., :40], kernels.pack(weights, kind))
    for head, weight in enumerate(weights):
        alone = kernels.linear(wide[:, head, :40].contiguous(), kernels.pack([weight], kind))
        assert torch.equal(out[:, head], alone), head


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_activation_equal_the_reference(native: NativeKernels, dtype: torch.dtype) -> None:
    reference = ReferenceKernels()
    x, weight = random(6, 70, dtype=dtype), random(70, seed=2)
    torch.testing.assert_close(
        native.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), **tolerance(dtype)
    )
    torch.testing.assert_close(native.silu_mul(x * 8), reference.silu_mul(x * 8), **tolerance(dtype))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_scores_equal_torch_also_at_the_extremes(native: NativeKernels, kind: str) -> None:
    logits = torch.cat([random(5, 37) * 10, torch.tensor([[200.0, -200.0] + [0.0] * 35])])
    expected = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(native.scores(logits, kind), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention_equals_the_reference(native: NativeKernels, dtype: torch.dtype, widths: Widths) -> None:
    assert_attention_equals_the_reference(native, paged_case(dtype, 9, longest=300, widths=widths))


def assert_attention_equals_the_reference(native: NativeKernels, case: dict[str, Any]) -> None:
    """In bfloat16, up to what rounding each weight of a position and the result changes at most."""
    found, query, cache = native.latent_attention(**case), case["query"].float(), case["cache"].float()
    assert found.dtype == case["query"].dtype
    slow = ReferenceKernels().latent_attention
    expected = slow(**{**case, "query": query, "cache": cache})
    room = 1e-5 + 1e-5 * expected.abs()
    if found.dtype == torch.bfloat16:  # the same weights of positions, over the sizes of values
        sizes = {"query": torch.cat([torch.zeros_like(query), query], -1), "cache": torch.cat([cache.abs(), cache], -1)}
        room += 2**-9 * (slow(**{**case, **sizes}) + 2 * expected.abs())
    off = (found.float() - expected).abs() - room
    assert off.max() <= 0, (off.max(), off.argmax())


@pytest.mark.parametrize("widths", WIDTHS)
def test_attention_rounds_as_written(native: NativeKernels, widths: Widths) -> None:
    """Parts of 256 positions, blocks of 128 with a running maximum; weights are rounded before they are summed."""
    case = paged_case(torch.bfloat16, 9, longest=300, widths=widths)
    found, expected = native.latent_attention(**case), torch.empty(9, widths.heads, widths.value)
    for token in range(9):
        context = torch.arange(int(case["positions"][token]) + 1)
        blocks = case["block_tables"][case["sequence_rows"][token]][context // 4].long()
        latents, query = case["cache"][blocks * 4 + context % 4].float(), case["query"][token].float()
        parts = [_part_of_attention(query, part, widths.value, case["scale"]) for part in latents.split(256)]
        highest = torch.stack([top for top, _, _ in parts]).max(0).values
        shares = [(top - highest).exp() for top, _, _ in parts]
        total = sum(share * own for share, (_, own, _) in zip(shares, parts, strict=True))
        expected[token] = sum(share * own for share, (_, _, own) in zip(shares, parts, strict=True)) / total
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=1e-5)  # a last bit of bfloat16
    assert (found == expected.bfloat16()).float().mean() > 0.97


def _part_of_attention(
    query: torch.Tensor, latents: torch.Tensor, value_width: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest score and sum of weights [H, 1], sums of values [H, V] of query [H, width] and latents [n, width]."""
    heads = len(query)
    top, total, sums = torch.full((heads, 1), -torch.inf), torch.zeros(heads, 1), torch.zeros(heads, value_width)
    for block in latents.split(128):
        scores = query @ block.T * scale
        before, top = top, torch.maximum(top, scores.max(-1, keepdim=True).values)
        weights = (scores - top).exp().bfloat16().float()
        keep = (before - top).exp()
        total, sums = total * keep + weights.sum(-1, keepdim=True), sums * keep + weights @ block[:, :value_width]
    return top, total, sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kernels: Kernels, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, inputs = 37, 1100
        x = random(rows, 48, dtype=dtype)
        wide = random(rows, inputs, dtype=dtype)
        norm = random(48, seed=2)
        operators = {
            "rms_norm": lambda part: kernels.rms_norm(part, norm, 1e-6),
            "silu_mul": kernels.silu_mul,
            "sigmoid": lambda part: kernels.scores(part.float(), "sigmoid"),
            "softmax": lambda part: kernels.scores(part.float(), "softmax"),
        }
        for name, operator in operators.items():
            together = operator(x)
            for start, stop in [(0, 1), (3, 5), (5, 18), (36, 37)]:
                assert torch.equal(operator(x[start:stop].contiguous()), together[start:stop]), (name, start, stop)
        for kind in (None, *QUANTIZATIONS):
            own = kernels.pack([random(90, inputs, dtype=dtype, seed=1)], kind)
            together = kernels.linear(wide, own)
            for height in range(1, rows + 1):
                assert torch.equal(kernels.linear(wide[-height:], own), together[-height:]), height
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    """Built for a CPU without vector instructions beyond SSE2."""
    if platform.machine() != "x86_64":
        pytest.skip("-march=x86-64 needs one")
    kernels = NativeKernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", [*build.FLAGS, "-march=x86-64", "-O1"])
        patch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path_factory.mktemp("plain")))
        kernels._library = load_library.__wrapped__()
    return kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_cpu_gives_the_same_bits(native: NativeKernels, plain: NativeKernels, dtype: torch.dtype) -> None:
    """A request may go on there."""
    x, weight, norm = random(14, 130, dtype=dtype), random(37, 130, dtype=dtype, seed=1), random(130, seed=2)
    for operator in (
        lambda kernels: kernels.linear(x, kernels.pack([weight])),
        lambda kernels: kernels.linear(x, kernels.pack([weight], "int8")),
        lambda kernels: kernels.linear(x, kernels.pack([weight], "int4")),
        lambda kernels: kernels.rms_norm(x, norm, 1e-6),
        lambda kernels: kernels.silu_mul(x * 8),
        lambda kernels: kernels.scores(x.float() * 8, "sigmoid"),
        lambda kernels: kernels.scores(x.float() * 8, "softmax"),
        *(
            lambda kernels, case=paged_case(dtype, 11, 300, widths=widths): kernels.latent_attention(**case)
            for widths in WIDTHS
        ),
    ):
        assert torch.equal(operator(plain), operator(native))
    logits, places = random(1, 5003, seed=3).numpy() * 4, [Place(0.7, 4, position) for position in range(200)]
    assert plain.draw(logits, [0] * 200, places) == native.draw(logits, [0] * 200, places)


def test_threads_that_compute_at_once_do_not_mix(native: NativeKernels) -> None:
    """One thread has the pool, the others do their own work; a helper that comes late joins no finished job."""
    weights = [native.pack([random(400, 96, seed=seed)]) for seed in range(4)]
    x = [random(9, 96, seed=10 + seed) for seed in range(4)]
    expected = [native.linear(rows, weight) for rows, weight in zip(x, weights, strict=True)]

    def compute(own: int) -> bool:
        torch.set_num_threads(3 if own % 2 else 2)
        return all(torch.equal(native.linear(x[own], weights[own]), expected[own]) for _ in range(300))

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(compute, range(4)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_token_does_not_depend_on_the_batch(
    kernels: Kernels, dtype: torch.dtype, widths: Widths
) -> None:
    case = paged_case(dtype, 20, longest=300, widths=widths)
    together = kernels.latent_attention(**case)
    for token in range(20):
        alone = {**case, **{key: case[key][token : token + 1] for key in ("query", "sequence_rows", "positions")}}
        assert torch.equal(kernels.latent_attention(**alone)[0], together[token]), token


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_has_the_same_bits_when_threads_divide_a_context(native: NativeKernels, dtype: torch.dtype) -> None:
    """Six parts of 384 positions at most, each a task of its own or all of them one after the other."""
    case = paged_case(dtype, 5, longest=2200, widths=WIDTHS[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = native.latent_attention(**case)
        torch.set_num_threads(3)
        assert torch.equal(native.latent_attention(**case), whole)
    finally:
        torch.set_num_threads(before)
    assert_attention_equals_the_reference(native, case)


def test_values_that_are_alike_come_out_unchanged(native: NativeKernels) -> None:
    """Whatever the weights of positions are, rounded or not, they add up to what the values are divided by."""
    case = paged_case(torch.bfloat16, 5, longest=300)
    case["cache"][:, :32] = case["cache"][0, :32]
    assert torch.equal(native.latent_attention(**case), case["cache"][0, :32].expand(5, 6, 32))


def test_the_invariance_test_can_fail() -> None:
    """A control: summing over the batch in one of the rows' places breaks the property the tests above check."""
    x = random(8, 48)
    leaky = x + x.mean(dim=0)
    assert not torch.equal(leaky[:1], x[:1] + x[:1].mean(dim=0))
