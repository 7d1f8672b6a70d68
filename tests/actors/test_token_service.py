"""An attention worker's service over real links, with a small engine and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import pytest

from deepseek_ray.actors.token_service import TokenService
from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import message_frame, read_message
from deepseek_ray.links.listener import Listener
from deepseek_ray.messages import AbortRequest, GenerateRequest, SamplingParams, TokenEvent, TokenEvents
from tests.fakes import FakeDecoder

SECRET = b"s" * 32
DECODER = msgspec.msgpack.Decoder(TokenEvents)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@dataclass
class Worker:
    listener: Listener
    engine: Engine
    fatal: list[BaseException] = field(default_factory=list)

    def dial(self) -> Link:
        return connect(self.listener.endpoints, "node", "d", SECRET)


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def make(**engine: int) -> Worker:
        listener = listen("node", "127.0.0.1", "d", SECRET)
        worker = Worker(listener, Engine(FakeDecoder(), None, EngineConfig(**engine)))
        TokenService(listener, worker.fatal.append).start(worker.engine)
        started.append(worker)
        return worker

    yield make
    for worker in started:
        worker.listener.close()


def receive(link: Link) -> list[TokenEvent]:
    frame = link.receive(timeout=10)
    assert frame is not None, "no answer"
    return read_message(frame, DECODER).events


def collect(link: Link, *ids: str) -> dict[str, list[TokenEvent]]:
    """Events until each of the requests has ended."""
    events: dict[str, list[TokenEvent]] = {id: [] for id in ids}
    while not all(seen and seen[-1].finish_reason for seen in events.values()):
        for event in receive(link):
            events[event.request_id].append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_requests_of_one_client_share_frames(start: Callable[..., Worker]) -> None:
    worker = start()
    with worker.dial() as link:
        for id in ("a", "b"):
            link.send(message_frame(GenerateRequest(request_id=id, prompt_token_ids=[1, 2], params=greedy(6))))
        events = collect(link, "a", "b")
    assert tokens(events["a"]) == tokens(events["b"])
    assert len(tokens(events["a"])) == 6
    assert [event.index for event in events["a"]] == sorted(event.index for event in events["a"])


def test_a_refused_request_is_answered_and_others_go_on(start: Callable[..., Worker]) -> None:
    worker = start()
    with worker.dial() as link:
        link.send(message_frame(GenerateRequest(request_id="bad", prompt_token_ids=[999_999], params=greedy(1))))
        link.send(message_frame(GenerateRequest(request_id="good", prompt_token_ids=[1], params=greedy(2))))
        events = collect(link, "bad", "good")
    (refusal,) = events["bad"]
    assert (refusal.finish_reason, refusal.error_kind) == ("error", "RequestError")
    assert "999999" in (refusal.error or "")
    assert len(tokens(events["good"])) == 2


def test_a_client_that_is_gone_frees_its_blocks(start: Callable[..., Worker]) -> None:
    worker = start()
    with worker.dial() as leaver:
        leaver.send(message_frame(GenerateRequest(request_id="a", prompt_token_ids=[1], params=greedy(250))))
        receive(leaver)
    with worker.dial() as link:  # served after the leaver's end was seen
        link.send(message_frame(GenerateRequest(request_id="b", prompt_token_ids=[1], params=greedy(250))))
        collect(link, "b")
    assert worker.engine.stats().num_kv_blocks_used == 0
    assert worker.engine.stats().num_generated_tokens < 2 * 250


def test_an_abort_ends_the_request_with_an_event(start: Callable[..., Worker]) -> None:
    worker = start()
    with worker.dial() as link:
        link.send(message_frame(GenerateRequest(request_id="a", prompt_token_ids=[1], params=greedy(250))))
        receive(link)
        link.send(message_frame(AbortRequest(request_id="a")))
        events = collect(link, "a")["a"]
    assert events[-1].finish_reason == "abort"
    assert len(tokens(events)) < 249


def test_a_message_that_is_none_of_ours_closes_the_link_only(start: Callable[..., Worker]) -> None:
    worker = start()
    with worker.dial() as bad:
        bad.send(message_frame({"type": "launch", "missiles": 1}))
    with worker.dial() as link:
        link.send(message_frame(GenerateRequest(request_id="a", prompt_token_ids=[1], params=greedy(2))))
        assert len(tokens(collect(link, "a")["a"])) == 2
    assert not worker.fatal


def test_a_broken_decoder_ends_the_process(start: Callable[..., Worker]) -> None:
    worker = start()
    assert isinstance(worker.engine._runner._decoder, FakeDecoder)
    worker.engine._runner._decoder.failures.append(RuntimeError("out of memory"))
    with worker.dial() as link:
        link.send(message_frame(GenerateRequest(request_id="a", prompt_token_ids=[1], params=greedy(2))))
        assert link.receive(timeout=0.5) is None
    assert [str(error) for error in worker.fatal] == ["out of memory"]
