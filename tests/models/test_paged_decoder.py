"""The inference decoder: equal to transformers, and the same bits whatever the batch and the chunks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.kernels.base import Kernels
from deepseek_ray.kernels.fast import FastKernels
from deepseek_ray.kernels.native import NativeKernels
from deepseek_ray.kernels.quantize import QUANTIZATIONS, Quantization, dequantize, quantize
from deepseek_ray.kernels.reference import ReferenceKernels
from deepseek_ray.models import paged_layer
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.models.save import save_checkpoint
from deepseek_ray.models.shapes import parameter_shapes
from deepseek_ray.nn.paged import LatentCache, PagedBatch
from tests.checkpoints import tiny_config, write_random_checkpoint

BLOCK = 4
YARN = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
    }
}
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", "model_type": "deepseek_v2", "n_group": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3 large norm eps": {"rms_norm_eps": 1e-2},
    "v3 yarn, no shared expert": {**YARN, "n_shared_experts": 0},
    "v3 biased attention, tied": {"attention_bias": True, "tie_word_embeddings": True},
    "v2-lite": {**SOFTMAX, "q_lora_rank": None},
    "v2": {**SOFTMAX, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
}


def make_decoder(
    directory: Path,
    dtype: torch.dtype,
    kernels: Kernels | None = None,
    quantization: Quantization | None = None,
    micro_batches: int = 1,
) -> PagedDecoder:
    reader = CheckpointReader(directory)
    held = {layer: range(reader.config.n_routed_experts) for layer in reader.config.moe_layers}
    store = ExpertStore(reader, held, dtype, kernels, quantization=quantization)
    return PagedDecoder(
        reader, dtype, LocalExperts(store), kernels, quantization=quantization, micro_batches=micro_batches
    )


class Runner:
    """Feeds chunks of several sequences through one paged cache whose blocks are dealt out in a scattered order."""

    def __init__(self, decoder: PagedDecoder, num_sequences: int) -> None:
        self.decoder = decoder
        blocks = 16
        self.cache: LatentCache = decoder.new_cache(num_sequences * blocks, BLOCK)
        order = torch.randperm(num_sequences * blocks, generator=torch.Generator().manual_seed(1)).int()
        self.tables = order.view(num_sequences, blocks)

    def step(self, chunks: list[tuple[int, list[int], int]]) -> list[torch.Tensor]:
        """chunks: (sequence, token ids, first position); returns logits of every token, per chunk."""
        ids, positions, slots, rows = [], [], [], []
        for row, (sequence, tokens, first) in enumerate(chunks):
            place = torch.arange(first, first + len(tokens))
            ids += tokens
            positions.append(place)
            slots.append(self.tables[sequence][place // BLOCK].long() * BLOCK + place % BLOCK)
            rows += [row] * len(tokens)
        batch = PagedBatch(
            token_ids=torch.tensor(ids),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            sequence_rows=torch.tensor(rows, dtype=torch.int32),
            block_tables=self.tables[[sequence for sequence, _, _ in chunks]].contiguous(),
            logit_rows=torch.arange(len(ids)),
        )
        logits = self.decoder.forward(batch, self.cache)
        return list(logits.split([len(tokens) for _, tokens, _ in chunks]))


def prompt(length: int, seed: int = 0, vocab: int = 96) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kernels", [NativeKernels, ReferenceKernels])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_transformers(tmp_path: Path, changes: dict[str, Any], kernels: type[Kernels]) -> None:
    directory = write_random_checkpoint(tmp_path / "model", tiny_config(**changes))
    tokens = prompt(23)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
    (ours,) = Runner(make_decoder(directory, torch.float32, kernels()), 1).step([(0, tokens, 0)])
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [CONFIGS["v3"], CONFIGS["v2-lite"]], ids=["v3", "v2-lite"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_integers_are_the_model_with_rounded_weights(
    tmp_path: Path, changes: dict[str, Any], quantization: Quantization
) -> None:
    """torch's operators leave the inputs as they are; the native ones round them as the reference does."""
    directory = write_random_checkpoint(tmp_path / "model", tiny_config(**changes))
    reader = CheckpointReader(directory)
    as_it_is = re.compile(r"embed_tokens|norm|mlp\.gate\.|bias")

    def rounded(name: str) -> torch.Tensor:
        weight = reader.tensor(name)
        if name.endswith("kv_b_proj.weight"):
            return rounded_heads(reader.config, weight)
        return weight if as_it_is.search(name) else dequantize(*quantize(weight, quantization))

    def logits(model: Path, kernels: Kernels, quantization: Quantization | None) -> torch.Tensor:
        decoder = make_decoder(model, torch.float32, kernels, quantization)
        return Runner(decoder, 1).step([(0, prompt(23), 0)])[0]

    names = parameter_shapes(reader.config)
    save_checkpoint(tmp_path / "rounded", reader.config, ((name, rounded(name)) for name in names))
    original, expected = (logits(path, NativeKernels(), None) for path in (directory, tmp_path / "rounded"))
    weights_only = logits(directory, FastKernels(), quantization)
    assert (weights_only - expected).abs().max() < 1e-4 < (original - expected).abs().max()
    native, reference = (logits(directory, own, quantization) for own in (NativeKernels(), ReferenceKernels()))
    # An input at the edge of two integers may go to either, by the last bit of what came before.
    assert (native - reference).abs().mean() < 0.05 * (native - original).abs().mean()


def rounded_heads(config: ModelConfig, kv_b: torch.Tensor) -> torch.Tensor:
    """Absorbed, keys are met from the other side: each latent is an output of W_uk. Both have 8 bits."""
    heads = kv_b.view(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    keys = torch.stack([dequantize(*quantize(head.T, "int8")).T for head in keys])
    values = torch.stack([dequantize(*quantize(head, "int8")) for head in values])
    return torch.cat([keys, values], dim=1).view_as(kv_b)


@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [CONFIGS["v3"], CONFIGS["v2"]], ids=["v3", "v2"])
def test_bits_do_not_depend_on_chunks_or_neighbours(
    tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype, quantization: Quantization | None
) -> None:
    directory = write_random_checkpoint(tmp_path / "model", tiny_config(**changes))
    decoder = make_decoder(directory, dtype, quantization=quantization)
    a, b = prompt(21, seed=1), prompt(33, seed=2)
    (alone,) = Runner(decoder, 2).step([(0, a, 0)])
    one_by_one = Runner(decoder, 2)
    decoded = torch.cat([one_by_one.step([(0, [token], place)])[0] for place, token in enumerate(a)])
    assert torch.equal(decoded, alone)
    mixed = Runner(decoder, 2)
    first = mixed.step([(1, b[:9], 0), (0, a[:13], 0)])[1]
    second = mixed.step([(0, a[13:], 13), (1, b[9:], 9)])[0]
    assert torch.equal(torch.cat([first, second]), alone)


@pytest.mark.parametrize("micro_batches", [2, 3, 8])
def test_bits_do_not_depend_on_micro_batches(tmp_path: Path, micro_batches: int) -> None:
    """Borders fall between sequences and within them; a step may have fewer tokens than there are parts."""
    directory = write_random_checkpoint(tmp_path / "model", tiny_config())
    steps = [
        [(1, prompt(9, seed=2), 0), (0, prompt(13, seed=1), 0)],
        [(0, [7], 13), (1, prompt(6, seed=3), 9)],
        [(0, [3], 14)],
    ]
    whole, parts = (
        Runner(make_decoder(directory, torch.float32, micro_batches=count), 2) for count in (1, micro_batches)
    )
    for step in steps:
        for expected, logits in zip(whole.step(step), parts.step(step), strict=True):
            assert torch.equal(logits, expected)


def dispatches_all(self: LocalExperts, layer: int, kernels: Kernels) -> None:
    """Instead of `LocalExperts.table`: no operator computes a whole layer."""


@pytest.mark.parametrize(
    ("dtype", "quantization"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")]
)
@pytest.mark.parametrize("shared", [0, 2])
def test_a_whole_layer_is_what_dispatching_its_experts_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, quantization: Any, shared: int
) -> None:
    directory = write_random_checkpoint(tmp_path / "model", tiny_config(n_shared_experts=shared))
    steps = [[(0, prompt(60, seed=1), 0), (1, prompt(9, seed=2), 0)], [(0, [7], 60), (1, [8], 9)]]
    whole, dispatched = (Runner(make_decoder(directory, dtype, quantization=quantization), 2) for _ in range(2))
    found = [whole.step(step) for step in steps]
    monkeypatch.setattr(LocalExperts, "table", dispatches_all)
    for step, logits in zip(steps, found, strict=True):
        for one, expected in zip(dispatched.step(step), logits, strict=True):
            assert torch.equal(one, expected)


def test_a_micro_batch_is_with_the_experts_while_another_one_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_random_checkpoint(tmp_path / "m", tiny_config(num_hidden_layers=3))
    decoder = make_decoder(directory, torch.float32, micro_batches=2)
    told: list[str] = []
    dispatch, combine = LocalExperts.dispatch, LocalExperts.combine

    def tell_dispatch(self: LocalExperts, layer: int, *arguments: Any) -> torch.Tensor:
        told.append(f"ask {layer} from row {arguments[2]}")
        return dispatch(self, layer, *arguments)

    def tell_combine(self: LocalExperts, ticket: torch.Tensor) -> torch.Tensor:
        told.append("take")
        return combine(self, ticket)

    monkeypatch.setattr(LocalExperts, "table", dispatches_all)
    monkeypatch.setattr(LocalExperts, "dispatch", tell_dispatch)
    monkeypatch.setattr(LocalExperts, "combine", tell_combine)
    Runner(decoder, 1).step([(0, prompt(5), 0)])
    first, second = ["ask 1 from row 0", "ask 1 from row 2"], ["ask 2 from row 0", "ask 2 from row 2"]
    assert told == [*first, "take", second[0], "take", second[1], "take", "take"]


def test_zeroing_an_expert_changes_the_logits(tmp_path: Path) -> None:
    """A control: routed experts take part in the answer."""
    directory = write_random_checkpoint(tmp_path / "model", tiny_config())
    tokens = prompt(40)
    (before,) = Runner(make_decoder(directory, torch.float32), 1).step([(0, tokens, 0)])
    tensors = {name: CheckpointReader(directory).tensor(name) for name in CheckpointReader(directory).names}
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"].zero_()
    save_checkpoint(tmp_path / "without", tiny_config(), tensors.items())
    (after,) = Runner(make_decoder(tmp_path / "without", torch.float32), 1).step([(0, tokens, 0)])
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("ours", [False, True])
def test_shared_experts_do_not_take_the_cores_from_routed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """They are computed while routed ones are away, or after those that are on the same cores; with the same bits."""
    directory = write_random_checkpoint(tmp_path / "m", tiny_config(num_hidden_layers=2))
    chunk = [(0, [5, 6, 7], 0)]
    (expected,) = Runner(make_decoder(directory, torch.float32), 1).step(chunk)
    order: list[str] = []
    combine, forward, begin_aside = LocalExperts.combine, paged_layer.Mlp.forward, paged_layer.Mlp.begin_aside

    def combine_and_tell(self: LocalExperts, ticket: torch.Tensor) -> torch.Tensor:
        order.append("combine")
        return combine(self, ticket)

    def forward_and_tell(self: paged_layer.Mlp, hidden: torch.Tensor) -> torch.Tensor:
        order.append("mlp")
        return forward(self, hidden)

    def begin_and_tell(self: paged_layer.Mlp, hidden: torch.Tensor) -> Callable[[], torch.Tensor]:
        order.append("mlp aside")
        return begin_aside(self, hidden)

    monkeypatch.setattr(paged_layer.Mlp, "begin_aside", begin_and_tell)
    monkeypatch.setattr(LocalExperts, "table", dispatches_all)
    monkeypatch.setattr(LocalExperts, "uses_our_cores", lambda self, ticket: ours)
    monkeypatch.setattr(LocalExperts, "combine", combine_and_tell)
    monkeypatch.setattr(paged_layer.Mlp, "forward", forward_and_tell)
    (logits,) = Runner(make_decoder(directory, torch.float32), 1).step(chunk)
    assert order == ["mlp", "mlp aside" if ours else "mlp", "combine"]  # the first layer is dense
    assert torch.equal(logits, expected)
