"""The engine over a fake decoder whose logits depend on every token, position and block it should read."""

from __future__ import annotations

import msgspec
import pytest
import torch
from fakes import FakeDecoder, run_to_end

from deepseek_ray.engine.requests import expand_request
from deepseek_ray.engine.stop import StopStrings
from deepseek_ray.errors import ExpertsCrashedError, OverloadedError, RequestError
from deepseek_ray.messages import GenerateRequest, TokenEvent
from tests.engine.small_engine import TOKENIZER, alone, make_engine, make_request


def mixed_requests() -> list[GenerateRequest]:
    greedy = [make_request(f"greedy {n}", num_prompt=3 + 5 * n) for n in range(4)]
    seeded = [make_request(f"seeded {n}", num_prompt=2 + 7 * n, temperature=1.0, seed=n) for n in range(3)]
    unseeded = [make_request(f"unseeded {n}", num_prompt=9, temperature=0.7, top_p=0.9) for n in range(2)]
    return greedy + seeded + unseeded


def reference_greedy(prompt: list[int], num_tokens: int) -> list[int]:
    """Without engine, blocks or chunks: the whole sequence computed anew for every token, in a contiguous cache."""
    from deepseek_ray.nn.paged import PagedBatch

    tokens = list(prompt)
    for _ in range(num_tokens):
        decoder, length = FakeDecoder(), len(tokens)
        places = torch.arange(length)
        batch = PagedBatch(
            token_ids=torch.tensor(tokens),
            positions=places,
            slots=places,
            sequence_rows=torch.zeros(length, dtype=torch.int32),
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
            logit_rows=torch.tensor([length - 1]),
        )
        tokens.append(int(decoder.forward(batch, decoder.new_cache(1, 256))[0].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_computing_everything_anew() -> None:
    request = make_request("a", num_prompt=7)
    assert alone(request).token_ids == reference_greedy(request.prompt_token_ids, 20)


def test_outputs_differ_and_do_not_settle() -> None:
    """Otherwise the equalities below would show nothing."""
    outputs = [tuple(alone(request).token_ids) for request in mixed_requests()]
    assert len(set(outputs)) == len(outputs)
    assert all(len(set(output)) > 8 for output in outputs)


@pytest.mark.parametrize(("max_num_seqs", "budget"), [(9, 64), (3, 64), (9, 5), (1, 16)])
def test_together_equals_alone(max_num_seqs: int, budget: int) -> None:
    together = run_to_end(make_engine(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget), mixed_requests())
    for request in mixed_requests():
        expected, got = alone(request), together[request.request_id]
        assert (got.token_ids, got.text, got.finish_reason) == (expected.token_ids, expected.text, "length")


@pytest.mark.parametrize("budget", range(1, 24))
def test_every_chunk_size_equals_whole_prefill(budget: int) -> None:
    request = make_request("long", num_prompt=23, max_tokens=6)
    engine = make_engine(max_num_batched_tokens=budget)
    assert run_to_end(engine, [request])["long"].token_ids == alone(request).token_ids


def test_a_step_computes_no_more_than_its_budget() -> None:
    decoder = FakeDecoder()
    run_to_end(make_engine(decoder=decoder, max_num_batched_tokens=7), mixed_requests())
    assert max(decoder.num_tokens_per_step) == 7


def test_preemption_changes_nothing() -> None:
    engine = make_engine(num_blocks=14, max_num_batched_tokens=32)  # 57 tokens; nine sequences want up to 43 each
    together = run_to_end(engine, mixed_requests())
    assert engine.stats().num_preemptions >= 5
    for request in mixed_requests():
        expected, got = alone(request), together[request.request_id]
        assert (got.token_ids, got.text) == (expected.token_ids, expected.text)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "presence_penalty": 2.0}])
def test_resuming_anywhere_equals_not_stopping(params: dict[str, float]) -> None:
    request = make_request("r", stop="\x00never", min_tokens=4, **params)
    whole = alone(request)
    assert len(whole.token_ids) == 20
    for cut in range(1, 20):
        resumed = msgspec.structs.replace(request, attempt=1, output_token_ids=whole.token_ids[:cut])
        rest = run_to_end(make_engine(), [resumed])["r"]
        assert rest.events[0].index == cut
        assert rest.events[0].attempt == 1
        assert rest.token_ids == whole.token_ids[cut:]
        shown_before = "".join(event.text for event in whole.events[:cut])
        assert shown_before + rest.text == whole.text


def test_resuming_within_a_stop_string_and_a_character() -> None:
    """The text "é" + "stop" is forced byte by byte; wherever it is cut, the continuation is the same."""
    text = "aé€ sto stop".encode()
    chosen = dict(enumerate(text))
    request = make_request("r", stop="stop", max_tokens=30)

    class Dictating(FakeDecoder):
        def forward(self, batch, cache):  # type: ignore[no-untyped-def]
            logits = super().forward(batch, cache)
            for row, t in enumerate(batch.logit_rows.tolist()):
                logits[row, chosen[int(batch.positions[t]) - 4]] = 100.0
            return logits

    whole = run_to_end(make_engine(decoder=Dictating()), [request])["r"]
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("aé€ sto ", "stop", "stop")
    for cut in range(1, len(text)):
        resumed = msgspec.structs.replace(request, output_token_ids=list(text[:cut]))
        rest = run_to_end(make_engine(decoder=Dictating()), [resumed])["r"]
        assert "".join(event.text for event in whole.events[:cut]) + rest.text == whole.text
        assert (rest.finish_reason, rest.stop_reason) == ("stop", "stop")


def test_resuming_what_had_ended_ends_at_once() -> None:
    request = make_request("r", output=[65, 66], max_tokens=2)
    events = run_to_end(make_engine(), [request])["r"].events
    assert [(event.index, event.token_ids, event.finish_reason) for event in events] == [(2, [], "length")]


def test_text_is_the_decoded_output() -> None:
    for request in mixed_requests():
        result = alone(request)
        assert result.text == TOKENIZER.decode(result.token_ids)
        assert [event.index for event in result.events] == list(range(20))


def test_logprobs_are_the_models_own() -> None:
    params = {"temperature": 0.5, "seed": 1, "top_k": 2, "logit_bias": {3: 5.0}, "logprobs": 4, "max_tokens": 3}
    result = alone(make_request("a", **params))
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert all(len(entry.top) == 4 for entry in result.logprobs)
    plain = alone(make_request("a", logprobs=0, max_tokens=1)).logprobs[0]
    assert (plain.rank, plain.top) == (1, [])
    assert result.logprobs[0].top[0] == (plain.token_id, plain.logprob), "neither bias nor temperature"
    assert alone(make_request("a")).events[0].logprobs is None


def test_bad_logits_end_one_request_only() -> None:
    requests = mixed_requests()
    victim, *others = requests
    not_its_own = {token_id for r in others for token_id in (*r.prompt_token_ids, *alone(r).token_ids)}
    decoder = FakeDecoder()
    decoder.poisoned_tokens = {next(t for t in alone(victim).token_ids[3:] if t not in not_its_own)}
    together = run_to_end(make_engine(decoder=decoder), requests)
    ended = together[victim.request_id]
    assert (ended.finish_reason, ended.error_kind) == ("error", "GenerationError")
    assert "261 of 261 logits" in (ended.error or "")
    assert ended.token_ids == alone(victim).token_ids[: len(ended.token_ids)] != []
    for request in others:
        assert together[request.request_id].token_ids == alone(request).token_ids


@pytest.mark.parametrize("victim", range(3))
def test_a_request_whose_token_crashes_the_experts_ends_alone(victim: int) -> None:
    """The decoder names a row of its batch: prompts of several lengths make rows and requests differ."""
    requests = [make_request(f"r{n}", num_prompt=2 + 2 * n, max_tokens=6) for n in range(3)]
    first_row = sum(len(request.prompt_token_ids) for request in requests[:victim])
    decoder = FakeDecoder()
    last_of_its_rows = first_row + len(requests[victim].prompt_token_ids) - 1
    decoder.failures = [ExpertsCrashedError("crashed twice", row=last_of_its_rows)]
    ended = run_to_end(make_engine(decoder=decoder), requests)
    poisoned = ended.pop(requests[victim].request_id)
    assert (poisoned.finish_reason, poisoned.error_kind, poisoned.token_ids) == ("error", "GenerationError", [])
    assert "crashed twice; do not send it again" in (poisoned.error or "")
    for request in requests:
        if request.request_id in ended:
            assert ended[request.request_id].token_ids == alone(request).token_ids


def test_a_decoder_that_fails_can_be_called_again() -> None:
    decoder = FakeDecoder()
    engine = make_engine(decoder=decoder)
    request = make_request("a")
    engine.add_request(request)
    events: list[TokenEvent] = []
    for _ in range(3):
        events += engine.step()
    decoder.failures = [ConnectionError("the experts are away")]
    with pytest.raises(ConnectionError):
        engine.step()
    while engine.has_work:
        events += engine.step()
    assert [token_id for event in events for token_id in event.token_ids] == alone(request).token_ids


def test_a_full_engine_refuses() -> None:
    engine = make_engine(max_num_seqs=1, max_waiting=1)
    engine.add_request(make_request("a"))
    assert engine.has_room
    engine.add_request(make_request("b"))
    assert not engine.has_room
    with pytest.raises(OverloadedError, match=r"2 requests.*1 running and 1 waiting.*max_waiting"):
        engine.add_request(make_request("c"))
    engine.abort("a")
    engine.add_request(make_request("c"))


def test_a_newer_attempt_takes_the_place_of_an_older_one() -> None:
    engine = make_engine(max_num_seqs=1, max_waiting=0)
    request = make_request("a")
    engine.add_request(request)
    (first,) = engine.step()
    with pytest.raises(RequestError, match="'a' is running here already"):
        engine.add_request(request)
    again = msgspec.structs.replace(request, attempt=1, output_token_ids=first.token_ids)
    events = run_to_end(engine, [again])["a"].events
    assert {event.attempt for event in events} == {1}
    assert first.token_ids + [t for event in events for t in event.token_ids] == alone(request).token_ids


def test_several_outputs_of_one_prompt() -> None:
    expanded = expand_request(make_request("a", n=3, temperature=1.0, seed=5))
    results = run_to_end(make_engine(), expanded)
    outputs = [results[request.request_id].token_ids for request in expanded]
    assert len({tuple(output) for output in outputs}) == 3
    assert outputs[0] == alone(make_request("a", temperature=1.0, seed=5)).token_ids


def test_refused_requests_leave_nothing_behind() -> None:
    engine = make_engine()
    for bad in ({"num_prompt": 0}, {"temperature": -1.0}, {"num_prompt": 300}):
        with pytest.raises(RequestError):
            engine.add_request(make_request("a", **bad))
    assert not engine.has_work
    assert run_to_end(engine, [make_request("a")])["a"].finish_reason == "length"


def test_stats_count() -> None:
    engine = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add_request(make_request(name, num_prompt=5))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_kv_blocks_total) == (2, 1, 4, 200)
    assert (stats.num_prompt_tokens, stats.num_generated_tokens, stats.num_preemptions) == (15, 2, 0)


def test_an_idle_engine_steps_without_work() -> None:
    decoder = FakeDecoder()
    assert make_engine(decoder=decoder).step() == []
    assert decoder.num_steps == 0


def test_whatever_fails_in_one_request_ends_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: StopStrings, text: str, armed: bool = True) -> tuple[str, str | None]:
        if self._strings:
            raise ZeroDivisionError("a bug")
        return text, None

    monkeypatch.setattr(StopStrings, "push", broken)
    results = run_to_end(make_engine(), [make_request("good"), make_request("bad", stop="x")])
    assert (results["bad"].finish_reason, results["bad"].error_kind) == ("error", "ZeroDivisionError")
    assert results["bad"].events[0].index == 0, "no token was given"
    assert len(results["good"].token_ids) == 20


def test_rows_are_handed_to_their_sequences() -> None:
    """Chunks that do not sample stand between those that do; logits rows have to match up."""
    requests = [make_request("a", num_prompt=2), make_request("b", num_prompt=30), make_request("c", num_prompt=2)]
    results = run_to_end(make_engine(max_num_batched_tokens=8), requests)
    for request in requests:
        assert results[request.request_id].token_ids == alone(request).token_ids
