"""Steps rounded up to a size; on a CUDA device, graphs of them against the same operators one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.graphed_decoder import GraphedDecoder, StepInputs, StepSize, step_size
from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.nn.paged import LatentCache, PagedBatch
from tests.checkpoints import tiny_config, write_random_checkpoint

BLOCK, BLOCKS = 4, 5


def batch_of(lengths: list[int], first: int = 9) -> PagedBatch:
    """Some tokens of each sequence from position `first` on; its blocks are scattered over the cache."""
    tables = torch.randperm(len(lengths) * BLOCKS, generator=torch.Generator().manual_seed(1)).int()
    tables = tables.view(len(lengths), BLOCKS)
    rows = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    places = torch.cat([torch.arange(first, first + length) for length in lengths])
    return PagedBatch(
        token_ids=torch.randint(96, (len(rows),), generator=torch.Generator().manual_seed(len(rows))),
        positions=places,
        slots=tables[rows.long(), places // BLOCK].long() * BLOCK + places % BLOCK,
        sequence_rows=rows,
        block_tables=tables,
        logit_rows=torch.arange(len(rows))[-len(lengths) :],
    )


def filled(cache: LatentCache) -> LatentCache:
    cache.data.copy_(torch.randn(cache.data.shape, generator=torch.Generator().manual_seed(2)))
    return cache


def parts(tmp_path: Path) -> tuple[CheckpointReader, dict[int, range]]:
    reader = CheckpointReader(write_random_checkpoint(tmp_path / "model", tiny_config()))
    return reader, {layer: range(reader.config.n_routed_experts) for layer in reader.config.moe_layers}


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([1], StepSize(1, 64)),
        ([1] * 3, StepSize(4, 64)),
        ([1] * 9, StepSize(16, 64)),
        ([1] * 33, StepSize(40, 64)),
        ([3, 1, 4], StepSize(8, 64)),
        ([1] * 65, None),
        ([9], StepSize(16, 64)),
    ],
)
def test_sizes(lengths: list[int], size: StepSize | None) -> None:
    assert step_size(batch_of(lengths)) == size


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [2, 1, 4]])
def test_a_step_that_was_filled_up_computes_the_same(tmp_path: Path, lengths: list[int]) -> None:
    reader, held = parts(tmp_path)
    decoder = PagedDecoder(reader, torch.float32, LocalExperts(ExpertStore(reader, held, torch.float32)))
    batch = batch_of(lengths)
    size = step_size(batch)
    assert size is not None
    plain, other = (filled(decoder.new_cache(len(lengths) * BLOCKS, BLOCK)) for _ in range(2))
    logits = decoder.forward(batch, plain)
    inputs = StepInputs(size, torch.device("cpu"))
    inputs.fill(batch_of([1] * size.tokens))  # what it was used for before
    inputs.fill(batch)
    assert torch.equal(decoder.forward(inputs.batch, other)[batch.logit_rows], logits)
    assert torch.equal(plain.data, other.data), "nobody else's latents were touched"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_replay_what_was_captured_for_other_steps(tmp_path: Path, dtype: torch.dtype) -> None:
    from deepseek_ray.kernels.gpu.operators import GpuKernels

    reader, held = parts(tmp_path)
    experts = LocalExperts(ExpertStore(reader, held, dtype, GpuKernels(), device="cuda"))
    graphed, plain = (
        kind(reader, dtype, experts, GpuKernels(), device="cuda") for kind in (GraphedDecoder, PagedDecoder)
    )
    own, other = (filled(decoder.new_cache(9 * BLOCKS, BLOCK)) for decoder in (graphed, plain))
    with torch.inference_mode():
        for step in range(8):
            for lengths in ([1], [1] * 8, [1] * 7, [2, 1, 3], [12], [1] * 9):
                batch = batch_of(lengths, first=step)
                logits, hidden = graphed.forward_with_hidden(batch, own)
                expected_logits, expected_hidden = plain.forward_with_hidden(batch, other)
                torch.testing.assert_close(
                    logits, expected_logits, rtol=1e-4, atol=1e-1 if dtype == torch.bfloat16 else 1e-4
                )
                assert hidden.shape == expected_hidden.shape and logits.shape == expected_logits.shape
                torch.testing.assert_close(own.data, other.data, rtol=1e-2, atol=2e-2)
                own.data.copy_(other.data)
    assert len(graphed._graphs) == 3
