"""Keys, shared blocks and their accounting against a slow model; and engines whose outputs must not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from checkpoints import tiny_config, write_random_checkpoint
from fakes import Collected, FakeDecoder, FakeShape, byte_tokenizer, run_to_end
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.engine.block_copies import BlockCopy
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.kv_blocks import KVBlocks
from deepseek_ray.engine.offline import LocalBackend
from deepseek_ray.engine.prefix_cache import KEY_BYTES, BlockKeys, NamedBlock, block_key, root_key
from deepseek_ray.messages import GenerateRequest, SamplingParams


def test_a_key_covers_every_token_before_its_end_and_the_salt() -> None:
    keys = BlockKeys([1, 2, 3, 4, 5, 6, 7], None).first(3, block_size=2)
    assert len(set(keys)) == 3
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert BlockKeys([1, 2, 3, 4, 5, 6], None).first(3, 2) == keys
    assert BlockKeys([1, 2, 3, 4, 6, 5], None).first(3, 2)[:2] == keys[:2]
    assert not set(BlockKeys([9, 2, 3, 4, 5, 6], None).first(3, 2)) & set(keys)
    assert BlockKeys([1, 2], "").first(1, 2) != keys[:1] != BlockKeys([1, 2], "salt").first(1, 2)


def test_keys_follow_the_tokens_as_they_come() -> None:
    tokens = [1, 2, 3]
    keys = BlockKeys(tokens, None)
    (first,) = keys.first(1, 2)
    tokens.append(4)
    assert keys.name(1, 7, 2) == NamedBlock(7, key=block_key(first, [3, 4]), parent=first)
    assert keys.name(0, 3, 2).parent == root_key(None)
    with pytest.raises(AssertionError, match="block 2 of 4 tokens is not full"):
        keys.first(3, 2)


def grown(blocks: KVBlocks, num_blocks: int, found: list[int] | None = None) -> list[int]:
    table: list[int] = []
    assert blocks.try_grow(table, num_blocks * blocks.block_size, found or [])
    return table


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def named(blocks: KVBlocks, table: list[int], first: int) -> None:
    """The table's blocks hold the keys from `first` on, each after the one before."""
    for number, block in enumerate(table, start=first):
        blocks.prefixes.add(NamedBlock(block, key(number), key(number - 1)))


def test_the_end_of_a_sequence_is_given_up_before_its_beginning() -> None:
    blocks = KVBlocks(num_blocks=4, block_size=4)
    table = grown(blocks, 3)
    named(blocks, table, 1)
    blocks.release(table)
    assert blocks.num_free == 4
    assert len(blocks.prefixes.find(map(key, (1, 2, 3)))) == 3
    grown(blocks, 2)  # the empty one, and one of the three
    assert len(blocks.prefixes.find(map(key, (1, 2, 3)))) == 2


def test_what_is_found_counts_against_what_is_free() -> None:
    blocks = KVBlocks(num_blocks=4, block_size=4)
    table = grown(blocks, 2)
    named(blocks, table, 1)
    blocks.release(table)
    grown(blocks, 2)
    found = blocks.prefixes.find([key(1), key(2)])
    assert not blocks.try_grow(table, 12, found), "both free blocks are the found ones"
    assert (table, blocks.num_free) == ([], 2)
    assert blocks.try_grow(table, 8, found)
    second = grown(blocks, 2, found)
    assert (second, blocks.num_free) == (table, 0)
    with pytest.raises(AssertionError, match="is written and has 2 users"):
        blocks.check_writable(table[0])
    blocks.release(second)
    with pytest.raises(AssertionError, match="others may find it"):
        blocks.check_writable(table[0])


def test_a_copy_takes_what_was_unused_longest_and_keeps_its_own_beginning() -> None:
    blocks = KVBlocks(num_blocks=3, block_size=4)
    used = grown(blocks, 1)
    assert blocks.insert(key(1), key(0)) is not None
    assert blocks.insert(key(11), key(10)) is not None
    assert blocks.insert(key(11), key(10)) is None, "it is here"
    assert blocks.insert(key(2), key(1)) is not None, "in the place of 11, though 1 came first"
    assert len(blocks.prefixes.find([key(1), key(2)])) == 2
    assert not blocks.prefixes.find([key(11)])
    assert blocks.insert(key(3), key(2)) is None, "not in the place of what it needs"
    assert (blocks.num_used, blocks.num_free) == (1, 2)
    blocks.release(used)
    assert blocks.insert(key(3), key(2)) == 0


class SlowBlocks:
    """What KVBlocks must do, from lists that are searched."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        self.unused: list[int] = []
        """Free and with content, the one unused longest first."""

    @property
    def in_use(self) -> set[int]:
        return {block for table in self.tables for block in table}

    @property
    def free(self) -> set[int]:
        return set(range(self.num_blocks)) - self.in_use

    def find(self, keys: list[bytes]) -> list[int]:
        found = []
        for wanted in keys:
            at = [block for block, held in self.content.items() if held == wanted]
            if not at:
                break
            found += at
        return found

    def grew(self, table: list[int], added: list[int]) -> None:
        for block in added:
            self.hand_out(block)
            table.append(block)

    def hand_out(self, block: int) -> None:
        assert block in self.free
        if self.free - set(self.unused):
            assert block not in self.content, "an empty one was free"
        else:
            assert block == self.unused[0], "another one was unused longer"
        self.content.pop(block, None)
        self.unused = [other for other in self.unused if other != block]

    def share(self, found: list[int]) -> list[int]:
        self.unused = [block for block in self.unused if block not in found]
        self.tables.append(list(found))
        return self.tables[-1]

    def release(self, table: list[int]) -> None:
        self.tables = [other for other in self.tables if other is not table]
        self.unused += [block for block in reversed(table) if block not in self.in_use and block in self.content]

    def check(self, blocks: KVBlocks) -> None:
        assert (blocks.num_free, blocks.num_used) == (len(self.free), len(self.in_use))
        for block, held in self.content.items():
            assert blocks.prefixes.find([held]) == [block]
        assert {b for b in range(self.num_blocks) if blocks.prefixes.holds(b)} == set(self.content)


STEP = st.tuples(st.sampled_from(["admit", "grow", "release", "insert"]), st.integers(0, 9), st.integers(1, 5))


@settings(max_examples=300)
@given(num_blocks=st.integers(2, 7), steps=st.lists(STEP, max_size=40))
def test_blocks_do_what_lists_would_do(num_blocks: int, steps: list[tuple[str, int, int]]) -> None:
    """Sequences are chains of numbered keys: chain c holds the keys 100 c + 1, 100 c + 2, ..."""
    blocks, slow = KVBlocks(num_blocks, block_size=2), SlowBlocks(num_blocks)
    chains: list[tuple[int, list[int], list[int]]] = []  # chain, the real table, the slow one
    for action, which, size in steps:
        chain, table, slow_table = chains[which % len(chains)] if chains else (0, [], [])
        if action == "admit":
            chain, table = which % 3, []
            keys = [key(100 * chain + number) for number in range(1, size)]
            found = blocks.prefixes.find(keys)
            assert found == slow.find(keys)
            room = size - len(found) <= len(slow.free - set(found))
            assert blocks.try_grow(table, 2 * size, found) == room
            if room:
                slow_table = slow.share(found)
                assert table[: len(found)] == found
                slow.grew(slow_table, table[len(found) :])
                chains.append((chain, table, slow_table))
        elif action == "grow" and chains:
            before, room = list(table), size <= len(slow.free)
            assert blocks.try_grow(table, 2 * (len(table) + size)) == room
            assert table[: len(before)] == before
            slow.grew(slow_table, table[len(before) :])
        elif action == "release" and chains:
            for number, block in enumerate(table, start=1):  # computed to its end
                if block not in slow.content:
                    if not slow.find([key(100 * chain + number)]):
                        slow.content[block] = key(100 * chain + number)
                    blocks.prefixes.add(NamedBlock(block, key(100 * chain + number), key(100 * chain + number - 1)))
            blocks.release(table)
            slow.release(slow_table)
            chains = [entry for entry in chains if entry[2] is not slow_table]
        elif action == "insert":
            alone = key(1000 + 10 * which)  # its parent is nowhere
            known = bool(slow.find([alone]))
            block = blocks.insert(alone, key(1000 + 10 * which - 1))
            assert (block is not None) == (not known and bool(slow.free))
            if block is not None:
                slow.hand_out(block)
                slow.content[block] = alone
                slow.unused.append(block)
            elif known and (old := slow.find([alone])[0]) in slow.unused:
                slow.unused = [other for other in slow.unused if other != old] + [old]
        slow.check(blocks)


BYTES_PER_TOKEN = 2 * 6 * 4  # layers, width, float32


def make_engine(num_blocks: int = 60, decoder: FakeDecoder | None = None, **config: Any) -> Engine:
    config = {"block_size": 4, "max_num_batched_tokens": 16, **config}
    kv_cache_bytes = num_blocks * config["block_size"] * BYTES_PER_TOKEN
    return Engine(decoder or FakeDecoder(), byte_tokenizer(), EngineConfig(kv_cache_bytes=kv_cache_bytes, **config))


def request(name: str, prompt: list[int], max_tokens: int = 8, **fields: Any) -> GenerateRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, params=params, **fields)


LONG = [(7 * place * place + 3) % 256 for place in range(50)]


def plain(collected: Collected) -> tuple[list[int], list[Any]]:
    return collected.token_ids, collected.logprobs


def test_a_second_request_computes_only_what_is_new() -> None:
    decoder = FakeDecoder()
    engine = make_engine(decoder=decoder, max_num_batched_tokens=64)
    first = run_to_end(engine, [request("a", LONG)])["a"]
    before = sum(decoder.num_tokens_per_step)
    assert before == len(LONG) + 7
    again = run_to_end(engine, [request("b", LONG)])["b"]
    assert plain(again) == plain(first)
    assert sum(decoder.num_tokens_per_step) - before == len(LONG) % 4 + 7
    assert (first.events[0].num_cached_tokens, again.events[0].num_cached_tokens) == (0, 48)
    assert all(event.num_cached_tokens is None for event in again.events[1:])
    assert (engine.stats().num_prefix_cache_queries, engine.stats().num_prefix_cache_hits) == (100, 48)


def test_a_conversation_that_goes_on_finds_its_answer_too() -> None:
    engine = make_engine()
    answer = run_to_end(engine, [request("a", LONG)])["a"].token_ids
    longer = LONG + answer + [1, 2, 3]
    found = run_to_end(engine, [request("b", longer)])["b"]
    assert found.events[0].num_cached_tokens == 56, "50 of the prompt and 7 of the answer: the last was never fed back"
    assert plain(found) == plain(run_to_end(make_engine(prefix_caching=False), [request("b", longer)])["b"])


def test_a_resumed_request_finds_what_it_had() -> None:
    engine = make_engine()
    whole = run_to_end(engine, [request("a", LONG, max_tokens=20)])["a"]
    resumed = request("a", LONG, max_tokens=20, attempt=1, output_token_ids=whole.token_ids[:11])
    rest = run_to_end(engine, [resumed])["a"]
    assert rest.token_ids == whole.token_ids[11:]
    assert engine.stats().num_prefix_cache_hits == 60


def test_no_output_notices_the_cache() -> None:
    """Many requests that begin alike in every way, in a cache that holds a few: found, given up, preempted."""
    requests = [
        request(f"{number}", LONG[: 6 + 11 * (number % 5)] + [number % 3] * (number % 7), max_tokens=12)
        for number in range(40)
    ]
    expected = run_to_end(make_engine(prefix_caching=False), requests)
    engine = make_engine(num_blocks=24, max_num_seqs=6)
    found = run_to_end(engine, requests)
    assert {name: plain(one) for name, one in found.items()} == {name: plain(one) for name, one in expected.items()}
    stats = engine.stats()
    assert 0 < stats.num_prefix_cache_hits < stats.num_prefix_cache_queries
    assert stats.num_preemptions > 0


def test_what_a_request_that_failed_computed_is_not_found() -> None:
    decoder = FakeDecoder()
    engine = make_engine(decoder=decoder, max_num_batched_tokens=64)
    decoder.poisoned_tokens = {LONG[-1]}
    assert run_to_end(engine, [request("a", LONG)])["a"].error_kind == "GenerationError"
    decoder.poisoned_tokens = set()
    assert run_to_end(engine, [request("b", LONG)])["b"].events[0].num_cached_tokens == 0


def test_copies_are_found_in_another_engine() -> None:
    giver, taker = make_engine(), make_engine()
    expected = run_to_end(make_engine(prefix_caching=False), [request("a", LONG, max_tokens=30)])["a"]
    giver.add_request(request("a", LONG, max_tokens=30))
    done: list[int] = []
    while len(done) < 13:
        for event in giver.step():
            done += event.token_ids
        for name in giver.copies.new_blocks:
            copy = giver.copies.read(name)
            assert copy is not None
            assert taker.copies.insert(copy)
            assert not taker.copies.insert(copy), "it is there"
    assert len(giver.copies.running_blocks()) == 15, "50 + 12 tokens"
    assert taker.stats().num_kv_blocks_used == 0, "copies take no room from anybody"
    rest = run_to_end(taker, [request("a", LONG, max_tokens=30, attempt=1, output_token_ids=done)])["a"]
    assert done + rest.token_ids == expected.token_ids
    assert taker.stats().num_prefix_cache_hits == 60


def test_what_is_gone_is_not_read() -> None:
    engine = make_engine(num_blocks=16)
    engine.add_request(request("a", LONG))
    engine.step()
    names = engine.copies.new_blocks
    assert len(names) == 4
    while engine.has_work:
        engine.step()
    assert engine.copies.read(names[0]) is not None
    assert engine.step() == [] and engine.copies.new_blocks == []
    run_to_end(engine, [request("b", [9] * 60, max_tokens=2)])
    assert engine.copies.read(names[3]) is None


def test_a_copy_of_another_shape_is_caught() -> None:
    engine = make_engine()
    with pytest.raises(AssertionError, match="a copy of shape"):
        engine.copies.insert(BlockCopy(key(1), key(0), torch.zeros(2, 6, 4)))


def test_blocks_are_read_and_written_whole() -> None:
    engine = make_engine(decoder=FakeDecoder(FakeShape(num_hidden_layers=3)))
    shape = engine.copies.shape
    latents = torch.randn(shape.num_layers, shape.block_size, shape.width)
    assert engine.copies.insert(BlockCopy(key(1), key(0), latents))
    copy = engine.copies.read(NamedBlock(0, key(1), key(0)))
    assert copy is not None
    assert torch.equal(copy.latents, latents)
    assert copy.latents.is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_gives_the_same_bits_with_and_without(tmp_path: Path, dtype: Any) -> None:
    model = write_random_checkpoint(tmp_path / "model", tiny_config())
    common = [(31 * place * place + 7) % 96 for place in range(70)]
    asked = [
        GenerateRequest(
            request_id=f"{number}",
            prompt_token_ids=[*common[: 20 + 9 * (number % 6)], number % 2],
            params=SamplingParams(temperature=number % 2, seed=number, max_tokens=12, ignore_eos=True, logprobs=3),
        )
        for number in range(12)
    ]
    outputs = []
    for prefix_caching in (True, False):
        engine = EngineConfig(max_num_seqs=4, max_num_batched_tokens=24, block_size=8, prefix_caching=prefix_caching)
        backend = LocalBackend(DeploymentConfig(model_dir=str(model), dtype=dtype, engine=engine))
        events = list(backend.run(asked))
        outputs.append(
            sorted((e.request_id, e.index, tuple(e.token_ids), msgspec.json.encode(e.logprobs)) for e in events)
        )
        found = sum(event.num_cached_tokens or 0 for event in events)
        assert (found > 100) == prefix_caching
    assert outputs[0] == outputs[1]
