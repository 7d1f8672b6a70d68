"""torch's operators on whole batches against torch row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.kernels.fast import FastKernels
from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.reference import ReferenceKernels
from deepseek_ray.kernels.select import default_kernels, select_kernels
from deepseek_ray.llm import LLM
from deepseek_ray.messages import SamplingParams
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore
from tests.checkpoints import tiny_config, write_random_checkpoint
from tests.kernels.cases import DTYPES, paged_case, random, tolerance

CPU = torch.device("cpu")
FAST, SLOW = FastKernels(), ReferenceKernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_products(dtype: torch.dtype, rows: int) -> None:
    x, weight = random(rows, 40, dtype=dtype), [random(17, 40, dtype=dtype, seed=1)]
    torch.testing.assert_close(FAST.linear(x, FAST.pack(weight)), SLOW.linear(x, SLOW.pack(weight)), **tolerance(dtype))
    heads = [random(6, 8, dtype=dtype, seed=seed) for seed in range(5)]
    wide = x.view(rows, 5, 8)
    torch.testing.assert_close(
        FAST.per_head_linear(wide, FAST.pack(heads)), SLOW.per_head_linear(wide, SLOW.pack(heads)), **tolerance(dtype)
    )
    integers = FAST.pack(heads, "int8")
    alone = FAST.linear(wide[:, 3], FAST.pack([heads[3]], "int8"))
    torch.testing.assert_close(FAST.per_head_linear(wide, integers)[:, 3], alone, **tolerance(dtype))


def test_the_gate_computes_in_the_weights_precision() -> None:
    x, weight = random(4, 32, dtype=torch.bfloat16), random(8, 32, seed=1)
    out = FAST.linear(x, FAST.pack([weight]), out_dtype=torch.float32)
    torch.testing.assert_close(out, x.float() @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(dtype: torch.dtype) -> None:
    weights = [random(24, 16, dtype=dtype, seed=seed) for seed in range(3)]
    x, rows = random(7, 16, dtype=dtype, seed=9), [4, 1, 2]
    fast = FAST.grouped_linear(x, [FAST.pack([weight]) for weight in weights], rows)
    slow = SLOW.grouped_linear(x, [SLOW.pack([weight]) for weight in weights], rows)
    torch.testing.assert_close(fast, slow, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(dtype: torch.dtype) -> None:
    x, norm = random(6, 70, dtype=dtype), random(70, seed=2)
    torch.testing.assert_close(FAST.rms_norm(x, norm, 1e-6), SLOW.rms_norm(x, norm, 1e-6), **tolerance(dtype))
    torch.testing.assert_close(FAST.silu_mul(x * 8), SLOW.silu_mul(x * 8), **tolerance(dtype))
    for kind in ("sigmoid", "softmax"):
        torch.testing.assert_close(FAST.scores(x.float(), kind), SLOW.scores(x.float(), kind), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_latent_attention(dtype: torch.dtype, tokens: int) -> None:
    case = paged_case(dtype, tokens)
    case["query"] = case["query"].float()  # then results are not rounded, either
    torch.testing.assert_close(FAST.latent_attention(**case), SLOW.latent_attention(**case), rtol=1e-5, atol=1e-5)


def test_deterministic_is_the_default_and_off_takes_torch() -> None:
    assert EngineConfig().deterministic
    assert select_kernels(True, CPU) is default_kernels()
    assert type(select_kernels(False, CPU)) is FastKernels


def test_a_trained_model_says_the_same_either_way(trained_model: Path) -> None:
    """Greedy: its choices are not near-ties. The log-probabilities differ in their last digits."""
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True)
    outputs = []
    for deterministic in (True, False):
        with LLM(trained_model, dtype="float32", deterministic=deterministic) as llm:
            outputs.append(llm.generate(["import os\n", "def __init__(self, "], params))
    for exact, fast in zip(*outputs, strict=True):
        assert exact.outputs[0].token_ids == fast.outputs[0].token_ids
        for token, a, b in zip(
            exact.outputs[0].token_ids, exact.outputs[0].logprobs or [], fast.outputs[0].logprobs or [], strict=True
        ):
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)


def test_neither_attention_nor_experts_take_the_row_kernels(
    trained_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: NativeKernels, *arguments: object) -> None:
        raise AssertionError("a row kernel was called")

    monkeypatch.setattr(NativeKernels, "_grouped", refuse)
    with LLM(trained_model, deterministic=False) as llm:
        llm.generate("import os", SamplingParams(max_tokens=2))
    with LLM(trained_model) as llm, pytest.raises(AssertionError, match="a row kernel was called"):
        llm.generate("import os", SamplingParams(max_tokens=2))


def test_experts_that_are_mapped_from_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_CACHE", str(tmp_path / "cache"))
    write_random_checkpoint(tmp_path / "model", tiny_config())
    reader = CheckpointReader(tmp_path / "model")
    layer, width = reader.config.moe_layers[0], reader.config.hidden_size
    hidden, rows, experts = random(3, width), torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])
    packed, mapped = (
        ExpertStore(reader, {layer: [0, 1]}, torch.float32, FAST, shared_files=True).run(layer, hidden, rows, experts)
        for _ in range(2)
    )
    assert list((tmp_path / "cache" / "packed").rglob(f"{layer}-1"))
    assert packed is not None
    assert mapped is not None
    assert torch.equal(packed, mapped)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_to_set(trained_model: Path) -> None:
    with pytest.raises(ConfigError, match=r'sees no CUDA device.*set attention_device and expert_device to "cpu"'):
        LLM(trained_model, deterministic=False, attention_device="cuda")
