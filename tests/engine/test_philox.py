from __future__ import annotations

import pytest

from deepseek_ray.engine.philox import philox4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123 (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert philox4x32(counter, key) == expected


def test_uniform_uses_both_words_of_seed_and_position() -> None:
    keys = [(0, 0), (1, 0), (1 << 32, 0), (0, 1), (0, 1 << 32)]
    numbers = [uniform(seed, position) for seed, position in keys]
    assert len(set(numbers)) == len(keys)
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(-1, 5) == uniform((1 << 64) - 1, 5)


def test_uniform_is_uniform() -> None:
    counts = [0] * 20
    for position in range(20000):
        counts[int(uniform(11, position) * 20)] += 1
    chi_square = sum((count - 1000) ** 2 / 1000 for count in counts)
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
