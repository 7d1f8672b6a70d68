from __future__ import annotations

import pytest

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.kv_blocks import CachePlan, KVBlocks, plan_cache
from deepseek_ray.errors import ConfigError


def test_a_table_grows_block_by_block() -> None:
    blocks = KVBlocks(num_blocks=3, block_size=4)
    table: list[int] = []
    assert blocks.try_grow(table, 4)
    assert len(table) == 1
    assert blocks.try_grow(table, 5)
    assert len(set(table)) == 2
    assert blocks.try_grow(table, 3), "a table that is large enough stays as it is"
    assert len(table) == 2
    assert (blocks.num_used, blocks.num_free) == (2, 1)


def test_too_few_blocks_change_nothing() -> None:
    blocks = KVBlocks(num_blocks=3, block_size=4)
    table: list[int] = []
    assert blocks.try_grow(table, 8)
    before = list(table)
    assert not blocks.try_grow(table, 17)
    assert (table, blocks.num_free) == (before, 1)


def test_release_gives_everything_back() -> None:
    blocks = KVBlocks(num_blocks=2, block_size=1)
    table: list[int] = []
    blocks.try_grow(table, 2)
    blocks.release(table)
    assert (table, blocks.num_free) == ([], 2)


def test_freeing_twice_is_caught() -> None:
    blocks = KVBlocks(num_blocks=2, block_size=1)
    table: list[int] = []
    blocks.try_grow(table, 1)
    copy = list(table)
    blocks.release(table)
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.release(copy)


def test_default_cache_holds_every_sequence() -> None:
    # 64 sequences of 100 tokens, of which 99 are stored: 7 blocks of 16 each
    config = EngineConfig(max_model_len=100)
    assert plan_cache(config, 4096, bytes_per_block=1000) == CachePlan(64 * 7, 100)


def test_default_cache_is_at_most_one_gibibyte() -> None:
    plan = plan_cache(EngineConfig(), model_max_len=163840, bytes_per_block=1 << 20)
    assert plan == CachePlan(1024, 1024 * 16 + 1), "the model's own length is cut to what the cache holds"


def test_given_bytes_are_never_exceeded() -> None:
    assert plan_cache(EngineConfig(kv_cache_bytes=2999), 4096, bytes_per_block=1000).num_blocks == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig(max_model_len=5000), ("5000", "4096", "max_model_len")),
        (EngineConfig(kv_cache_bytes=999), ("999", "1000", "raise kv_cache_bytes")),
        (EngineConfig(max_model_len=100, kv_cache_bytes=6999), ("6999", "7000", "100 tokens", "lower max_model_len")),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: EngineConfig, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_cache(config, 4096, bytes_per_block=1000)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_longest_sequence_fits_exactly() -> None:
    assert plan_cache(EngineConfig(max_model_len=97, kv_cache_bytes=6000), 4096, 1000) == CachePlan(6, 97)
