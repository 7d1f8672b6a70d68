"""What a rank reads: the cursor's samples, as torch tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_ray.data.blocks import TokenBlocks
from deepseek_ray.data.cursor import DataCursor
from deepseek_ray.data.loader import TrainLoader, validation_batches
from deepseek_ray.data.packing import BlockWriter, PackedDocuments

LENGTH = 4


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    with BlockWriter(tmp_path / "b", 1000) as writer:
        writer.append(PackedDocuments(np.arange(101), np.array([30, 1, 70]), 300))
        writer.finish()
    return TokenBlocks.open(tmp_path / "b")


def taken(batch: dict[str, torch.Tensor]) -> list[int]:
    """Sample numbers of a batch: token ids are positions, so a window starts at LENGTH times its number."""
    return (batch["tokens"][:, 0] // LENGTH).tolist()


def test_batches_are_the_cursors_samples(blocks: TokenBlocks) -> None:
    cursor = DataCursor(5, blocks.num_samples(LENGTH))
    loader = TrainLoader(blocks, LENGTH, cursor, rank=1, world_size=2, per_rank_batch=3, accumulation=2)
    expected = cursor.indices(1, 2, 3, 2)
    first = next(loader)
    assert (first["tokens"].dtype, first["document_ids"].dtype) == (torch.int64, torch.int32)
    assert first["tokens"].shape == first["document_ids"].shape == (3, LENGTH + 1)
    assert taken(first) == expected[0].tolist()
    assert loader.cursor == cursor  # half a step is no place to resume from
    assert taken(next(loader)) == expected[1].tolist()
    assert loader.cursor == cursor.advance(12)


def test_resume_at_another_world_size_goes_on_in_order(blocks: TokenBlocks) -> None:
    cursor = DataCursor(5, blocks.num_samples(LENGTH))
    one = TrainLoader(blocks, LENGTH, cursor, per_rank_batch=6)
    undisturbed = [index for _ in range(8) for index in taken(next(one))]
    start = TrainLoader(blocks, LENGTH, cursor, per_rank_batch=6)
    resumed = [index for _ in range(3) for index in taken(next(start))]
    ranks = [TrainLoader(blocks, LENGTH, start.cursor, rank, 2, per_rank_batch=3) for rank in range(2)]
    resumed += [index for _ in range(5) for rank in ranks for index in taken(next(rank))]
    assert resumed == undisturbed
    assert sorted(undisturbed[:25]) == list(range(25))  # 25 samples an epoch, each once


def test_validation_ranks_share_no_sample(blocks: TokenBlocks) -> None:
    seen = [i for rank in range(3) for batch in validation_batches(blocks, LENGTH, 4, rank, 3) for i in taken(batch)]
    assert sorted(seen) == list(range(25))
    assert [taken(batch) for batch in validation_batches(blocks, LENGTH, 2, max_samples=3)] == [[0, 1], [2]]
