"""Rotary embedding against complex multiplication, YaRN against the published numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checkpoints import tiny_config

from deepseek_ray.nn.rope import apply_rope, rope_frequencies, rope_tables

V3_YARN = {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_complex_multiplication(interleaved: bool) -> None:
    config = tiny_config(qk_rope_head_dim=6)
    positions = torch.tensor([0, 1, 7, 100])
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, *rope_tables(config, positions), interleaved)
    for row, position in enumerate(positions.tolist()):
        for pair in range(3):
            first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 3)
            angle = position * 10000 ** (-2 * pair / 6)
            expected = complex(x[row, first], x[row, second]) * complex(math.cos(angle), math.sin(angle))
            assert complex(turned[row, pair], turned[row, pair + 3]) == pytest.approx(expected, abs=1e-5)


def test_products_depend_on_the_distance_only() -> None:
    config = tiny_config()
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def product(at: int, seen: int) -> float:
        turned = [apply_rope(x, *rope_tables(config, torch.tensor(p)), True) for x, p in ((query, at), (key, seen))]
        return float(turned[0] @ turned[1])

    assert product(30, 20) == pytest.approx(product(110, 100), abs=1e-5)
    assert product(30, 20) != pytest.approx(product(30, 21), abs=1e-3)


def test_yarn_ramp_of_deepseek_v3() -> None:
    """Of 32 pairs, 0..10 keep their frequency and 23.. are divided by 40 (low = 10, high = 23)."""
    plain = rope_frequencies(tiny_config(qk_rope_head_dim=64))
    ratio = plain / rope_frequencies(tiny_config(qk_rope_head_dim=64, rope_scaling=V3_YARN))
    assert ratio[:11].tolist() == pytest.approx([1.0] * 11)
    assert ratio[23:].tolist() == pytest.approx([40.0] * 9, rel=1e-5)
    half = 1 / ((1 - 6 / 13) + (6 / 13) / 40)  # pair 16: 6/13 of the way
    assert float(ratio[16]) == pytest.approx(half, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": None, "mscale_all_dim": None}, 0.1 * math.log(40) + 1),
        ({"mscale_all_dim": 0.5}, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
        ({"attention_factor": 1.7}, 1.7),
        ({"factor": 1.0, "mscale": None}, 1.0),
    ],
)
def test_yarn_multiplies_cos_and_sin(changes: dict[str, Any], expected: float) -> None:
    cos, sin = rope_tables(tiny_config(rope_scaling={**V3_YARN, **changes}), torch.tensor([0]))
    assert cos[0].tolist() == pytest.approx([expected] * 4)
    assert sin[0].tolist() == [0.0] * 4


def test_keeps_dtype_and_computes_in_float32() -> None:
    config = tiny_config()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rope_tables(config, torch.tensor([5, 6, 7]))
    turned = apply_rope(x, cos, sin, True)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), cos, sin, True).bfloat16())


def test_degenerate_ramp_does_not_divide_by_zero() -> None:
    config = tiny_config(rope_scaling={**V3_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False})
    assert rope_frequencies(config).isfinite().all()
