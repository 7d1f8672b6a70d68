"""The order of the samples and the place in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.data.cursor import DataCursor
from deepseek_ray.data.order import SampleOrder
from deepseek_ray.errors import DataError


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = SampleOrder(size, seed, epoch).at(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    first = SampleOrder(1000, 7, 3).at(np.arange(1000))
    assert np.array_equal(first, SampleOrder(1000, 7, 3).at(np.arange(1000)))
    assert np.array_equal(first[::-1], SampleOrder(1000, 7, 3).at(np.arange(1000)[::-1]))
    for other in (SampleOrder(1000, 8, 3), SampleOrder(1000, 7, 4), SampleOrder(1001, 7, 3)):
        assert (first == other.at(np.arange(1000))).mean() < 0.02


def test_order_is_the_same_on_every_machine() -> None:
    """Golden values: changing them breaks the resume of every run."""
    assert SampleOrder(10, 0, 0).at(np.arange(10)).tolist() == [6, 2, 3, 9, 1, 5, 8, 0, 4, 7]
    big = SampleOrder(10**12, 42, 1).at(np.array([0, 1, 10**12 - 1]))
    assert big.tolist() == [872213568015, 904357119064, 348743590776]


def test_order_looks_random() -> None:
    """Over many seeds each position takes each value equally often (chi-squared, 11 * 11 degrees of freedom)."""
    size, seeds = 12, 4000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), SampleOrder(size, seed, 0).at(np.arange(size))] += 1
    expected = seeds / size
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 6 * np.sqrt(2 * 121)
    neighbours = SampleOrder(100_000, 1, 0).at(np.arange(100_000))
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.02


shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(num_samples=st.integers(1, 40), seed=st.integers(0, 5), shapes=shapes)
def test_any_mix_of_world_sizes_takes_every_sample_in_order(
    num_samples: int, seed: int, shapes: list[tuple[int, int, int]]
) -> None:
    """Resuming after every step at another shape: nothing lost, nothing doubled, the order unchanged."""
    cursor = DataCursor(seed, num_samples)
    taken: list[int] = []
    for world_size, per_rank_batch, accumulation in shapes:
        ranks = [cursor.indices(rank, world_size, per_rank_batch, accumulation) for rank in range(world_size)]
        assert all(rows.shape == (accumulation, per_rank_batch) for rows in ranks)
        taken += [int(i) for micro in range(accumulation) for rows in ranks for i in rows[micro]]
        cursor = cursor.advance(world_size * per_rank_batch * accumulation)
        cursor = DataCursor.from_dict(cursor.to_dict(), num_samples, seed)
    assert cursor.consumed_global_samples == len(taken)
    epochs = [SampleOrder(num_samples, seed, e).at(np.arange(num_samples)) for e in range(cursor.epoch + 1)]
    assert taken == np.concatenate(epochs)[: len(taken)].tolist()


def test_cursor_by_hand() -> None:
    """2 ranks, 1 sample each, 2 micro-batches: positions 0 1 | 2 3, rank 0 takes 0 and 2."""
    cursor = DataCursor(seed=1, num_samples=100)
    order = SampleOrder(100, 1, 0).at(np.arange(8))
    assert cursor.indices(0, 2, 1, 2).tolist() == [[order[0]], [order[2]]]
    assert cursor.indices(1, 2, 1, 2).tolist() == [[order[1]], [order[3]]]
    assert cursor.advance(4).indices(1, 2, 2).tolist() == [[order[6], order[7]]]


def test_a_cursor_of_other_data_is_refused() -> None:
    saved = DataCursor(3, 100, 50).to_dict()
    with pytest.raises(DataError, match="num_samples 100, this run's has 99"):
        DataCursor.from_dict(saved, num_samples=99, seed=3)
    with pytest.raises(DataError, match="seed 3, this run's has 4"):
        DataCursor.from_dict(saved, num_samples=100, seed=4)
    with pytest.raises(DataError, match="has 0 samples"):
        DataCursor(0, 0)
