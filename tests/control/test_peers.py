from __future__ import annotations

import pytest

from deepseek_ray.control.peers import next_in_ring


@pytest.mark.parametrize(
    ("worker", "others", "following"),
    [(0, [1, 2], 1), (1, [2, 0], 2), (2, [0, 1], 0), (5, [7, 3], 7), (8, [7, 3], 3), (1, [1], None), (0, [], None)],
)
def test_the_ring(worker: int, others: list[int], following: int | None) -> None:
    assert next_in_ring(worker, others) == following


def test_in_a_ring_everybody_keeps_for_one() -> None:
    ids = [0, 3, 4, 9]
    assert sorted(next_in_ring(id, ids) or 0 for id in ids) == ids
