"""What ends an output: stop strings, tokens, lengths, an abort, a deadline."""

from __future__ import annotations

import math

import msgspec
import pytest
from fakes import BYTE_EOS, FakeDecoder, FakeShape, run_to_end

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.errors import ConfigError, RequestError
from deepseek_ray.messages import TokenEvent
from tests.engine.small_engine import TOKENIZER, Clock, alone, make_engine, make_request


def test_stop_strings_and_stop_ids_end_the_output() -> None:
    plain = alone(make_request("a"))
    third, fourth = plain.token_ids[2], plain.token_ids[3]
    stopped = alone(make_request("a", stop_token_ids=[fourth]))
    assert stopped.token_ids == plain.token_ids[:4]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", fourth)
    assert stopped.text == TOKENIZER.decode(plain.token_ids[:3])
    later = alone(make_request("a", stop_token_ids=[third], min_tokens=8))
    assert third not in later.token_ids[:8]
    assert len(later.token_ids) >= 8


def test_end_of_sequence_is_listened_to_unless_ignored() -> None:
    bias = {BYTE_EOS: 100.0}
    ended = alone(make_request("a", logit_bias=bias, ignore_eos=False))
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([BYTE_EOS], "", "stop", None)
    assert len(alone(make_request("a", logit_bias=bias, ignore_eos=True)).token_ids) == 20
    delayed = alone(make_request("a", logit_bias=bias, ignore_eos=False, min_tokens=5))
    assert delayed.token_ids.index(BYTE_EOS) == 5


def test_without_a_tokenizer_config_json_says_what_ends_an_output() -> None:
    decoder = FakeDecoder(FakeShape(eos_token_id=9))
    engine = Engine(decoder, None, EngineConfig())
    result = run_to_end(engine, [make_request("a", logit_bias={9: 100.0}, ignore_eos=False)])["a"]
    assert (result.token_ids, result.text, result.finish_reason) == ([9], "", "stop")
    with pytest.raises(RequestError, match="need a tokenizer"):
        engine.add_request(make_request("b", stop="x"))


def test_output_ends_at_the_context_length() -> None:
    engine = make_engine(max_model_len=12)
    result = run_to_end(engine, [make_request("a", num_prompt=5, max_tokens=None)])["a"]
    assert (len(result.token_ids), result.finish_reason) == (7, "length")
    with pytest.raises(RequestError, match="12"):
        engine.add_request(make_request("b", num_prompt=12))


def test_a_cache_smaller_than_the_models_context_limits_it() -> None:
    engine = make_engine(num_blocks=3)
    assert engine.max_model_len == 13
    result = run_to_end(engine, [make_request("a", num_prompt=5, max_tokens=None)])["a"]
    assert len(result.token_ids) == 8
    with pytest.raises(ConfigError, match="max_model_len"):
        make_engine(num_blocks=3, max_model_len=100)


def test_abort_frees_blocks_at_once() -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add_request(make_request("running"))
    engine.add_request(make_request("waiting"))
    engine.step()
    assert engine.stats().num_kv_blocks_used > 0
    assert engine.abort("running")
    assert engine.abort("waiting")
    assert not engine.abort("running")
    assert engine.stats().num_kv_blocks_used == 0
    assert engine.has_work
    ends = engine.step()
    assert [(event.request_id, event.index, event.finish_reason) for event in ends] == [
        ("running", 1, "abort"),
        ("waiting", 0, "abort"),
    ]
    assert not engine.has_work


def test_deadlines_end_requests_running_and_waiting() -> None:
    clock = Clock()
    engine = make_engine(max_num_seqs=1, clock=clock)
    slow, patient = make_request("slow"), make_request("patient")
    engine.add_request(msgspec.structs.replace(slow, deadline_seconds=2.0))
    engine.add_request(msgspec.structs.replace(make_request("waits"), deadline_seconds=2.5))
    engine.add_request(patient)
    clock.now += 1.9
    assert [event.finish_reason for event in engine.step()] == [None]
    assert engine.next_deadline == 102.0
    clock.now += 0.1
    (ended,) = engine.step()
    assert (ended.request_id, ended.finish_reason, ended.error_kind) == ("slow", "error", "DeadlineExceededError")
    assert "2 s" in (ended.error or "")
    assert engine.next_deadline == 102.5
    assert [event.request_id for event in engine.step()] == ["waits"]
    clock.now += 0.5
    rest: list[TokenEvent] = []
    while engine.has_work:
        rest += engine.step()
    assert (rest[0].request_id, rest[0].error_kind) == ("waits", "DeadlineExceededError")
    assert [t for event in rest[1:] for t in event.token_ids] == alone(patient).token_ids
    with pytest.raises(RequestError, match="deadline"):
        engine.add_request(msgspec.structs.replace(slow, deadline_seconds=math.nan))


def test_ends_do_not_wait_for_a_decoder_that_is_stuck() -> None:
    clock, decoder = Clock(), FakeDecoder()
    engine = make_engine(decoder=decoder, clock=clock)
    engine.add_request(msgspec.structs.replace(make_request("expires"), deadline_seconds=1.0))
    engine.add_request(make_request("aborted"))
    engine.add_request(make_request("goes on"))
    engine.step()
    engine.abort("aborted")
    clock.now += 1
    decoder.failures = [ConnectionError("stuck")]
    assert {event.request_id for event in engine.step()} == {"aborted", "expires"}
    assert decoder.failures, "nothing was computed"
    assert engine.next_deadline is None
