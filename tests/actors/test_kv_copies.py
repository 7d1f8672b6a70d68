"""Copies of cache blocks from one worker's service to another's: over real links, with small engines, without Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from deepseek_ray.actors import kv_copies
from deepseek_ray.actors.kv_copies import CopyInbox, CopySender
from deepseek_ray.actors.kv_frames import block_frame, read_block
from deepseek_ray.actors.token_service import TokenService
from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.control.reports import WorkerView
from deepseek_ray.engine.block_copies import BlockCopy, BlockShape
from deepseek_ray.engine.engine import Engine
from deepseek_ray.engine.prefix_cache import KEY_BYTES
from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links.base import Link, LinkLimits
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import DtypeCode, Frame, FrameKind, message_frame, read_message
from deepseek_ray.links.listener import Listener
from deepseek_ray.messages import GenerateRequest, SamplingParams, TokenEvents
from deepseek_ray.nn.paged import LatentCache, PagedBatch
from tests.fakes import FakeDecoder, run_to_end
from tests.live_requests import wait_for

SECRET = b"s" * 32
DECODER = msgspec.msgpack.Decoder(TokenEvents)
PROMPT = [(7 * place * place + 3) % 256 for place in range(90)]
SHAPE = BlockShape(num_layers=2, block_size=4, width=6, dtype=torch.float32)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "little")


def some_copy(number: int = 1, shape: BlockShape = SHAPE) -> BlockCopy:
    latents = torch.randn(shape.num_layers, shape.block_size, shape.width).to(shape.dtype)
    return BlockCopy(key(number), key(number - 1), latents)


def received(frame: Frame) -> Frame:
    """As it comes out of a link."""
    parts = frame.payload if isinstance(frame.payload, list) else [frame.payload]
    payload = bytearray(b"".join(bytes(part) for part in parts))
    return msgspec.structs.replace(frame, payload=memoryview(payload))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_survives_its_frame(dtype: torch.dtype) -> None:
    shape = SHAPE._replace(dtype=dtype)
    copy = some_copy(5, shape)
    frame = received(block_frame(copy))
    read = read_block(frame, shape)
    frame.payload[:] = bytes(len(frame.payload))  # the sender's slot is used again
    assert (read.key, read.parent) == (copy.key, copy.parent)
    assert read.latents.dtype == dtype
    assert torch.equal(read.latents, copy.latents)


def cut(frame: Frame) -> Frame:
    return msgspec.structs.replace(frame, payload=frame.payload[:-1])


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (cut(received(block_frame(some_copy()))), "payload bytes"),
        (Frame(FrameKind.KV_BLOCK), "0 payload bytes"),
        (received(block_frame(some_copy(shape=SHAPE._replace(num_layers=3)))), "payload bytes"),
        (
            received(block_frame(some_copy(shape=SHAPE._replace(num_layers=4, block_size=2)))),
            "num_layers=4, block_size",
        ),
        (received(block_frame(some_copy(shape=SHAPE._replace(width=12, dtype=torch.bfloat16)))), "bfloat16"),
        (msgspec.structs.replace(received(block_frame(some_copy())), dtype=DtypeCode.FLOAT16), "uint8"),
    ],
    ids=["cut", "empty", "larger", "other shape", "other dtype", "unknown dtype"],
)
def test_a_block_that_does_not_fit_is_refused(frame: Frame, words: str) -> None:
    with pytest.raises(LinkError, match=words):
        read_block(frame, SHAPE)


class PausingDecoder(FakeDecoder):
    """Waits after some steps until it may go on."""

    def __init__(self, after_steps: int) -> None:
        super().__init__()
        self._after_steps = after_steps
        self.go_on = threading.Event()

    def forward(self, batch: PagedBatch, cache: LatentCache) -> Tensor:
        if self.num_steps == self._after_steps:
            assert self.go_on.wait(30)
        return super().forward(batch, cache)


@dataclass
class Worker:
    listener: Listener
    engine: Engine
    service: TokenService
    sender: CopySender
    fatal: list[BaseException] = field(default_factory=list)

    @property
    def view(self) -> WorkerView:
        return WorkerView(0, self.listener.endpoints.incarnation, self.listener.endpoints)

    def dial(self) -> Link:
        return dial(self.view)


def dial(peer: WorkerView) -> Link:
    return connect(peer.endpoints, "node", "d", SECRET)


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def make(
        keep_copies: bool = True,
        connect_to: Callable[[WorkerView], Link] = dial,
        decoder: FakeDecoder | None = None,
    ) -> Worker:
        listener = listen("node", "127.0.0.1", "d", SECRET)
        made = Engine(decoder or FakeDecoder(), None, EngineConfig(block_size=4, max_num_batched_tokens=32))
        sender, fatal = CopySender(connect_to), []  # type: ignore[var-annotated]
        service = TokenService(listener, fatal.append, lambda: sender.after_step(made.copies), keep_copies)
        service.start(made)
        started.append(Worker(listener, made, service, sender, fatal))
        return started[-1]

    yield make
    for worker in started:
        worker.listener.close()
        worker.sender.follow(None)
        assert not worker.fatal


def asked(name: str = "a", max_tokens: int = 60, **fields: Any) -> GenerateRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest(request_id=name, prompt_token_ids=PROMPT, params=params, **fields)


def expected_tokens(max_tokens: int = 60) -> list[int]:
    engine = Engine(FakeDecoder(), None, EngineConfig(prefix_caching=False))
    return run_to_end(engine, [asked(max_tokens=max_tokens)])["a"].token_ids


def tokens(link: Link, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        frame = link.receive(timeout=10)
        assert frame is not None, "no answer"
        for event in read_message(frame, DECODER).events:
            assert event.error is None
            found += event.token_ids
    return found


def test_the_peer_goes_on_from_the_copies(start: Callable[..., Worker]) -> None:
    worker, peer = start(), start()
    worker.sender.follow(peer.view)
    with worker.dial() as link:
        link.send(message_frame(asked(max_tokens=31)))
        delivered = tokens(link, 31)
    wait_for(lambda: peer.service.copies.num_received == 30)  # 90 + 30 tokens; the last one has no latent
    assert worker.sender.num_sent == 30
    assert peer.engine.stats().num_kv_blocks_used == 0
    with peer.dial() as link:
        link.send(message_frame(asked(attempt=1, output_token_ids=delivered)))
        rest = tokens(link, 29)
    assert delivered + rest == expected_tokens()
    stats = peer.engine.stats()
    assert (stats.num_prefix_cache_queries, stats.num_prefix_cache_hits) == (121, 120)
    assert (worker.sender.num_dropped, peer.service.copies.num_dropped) == (0, 0)


def test_an_idle_peer_is_woken_and_a_busy_one_is_not_interrupted(start: Callable[..., Worker]) -> None:
    peer = start()
    copies = peer.service.copies
    with peer.dial() as link:
        link.send(block_frame(some_copy(1)))
        wait_for(lambda: copies.num_received == 1)
        peer.service._idle = False  # as while a step waits for experts
        link.send(block_frame(some_copy(2)))
        wait_for(lambda: copies.has_any)
        assert not peer.service.interrupted()


def test_a_new_peer_gets_what_running_sequences_have(start: Callable[..., Worker]) -> None:
    decoder = PausingDecoder(after_steps=20)
    worker, first, second = start(decoder=decoder), start(), start()
    worker.sender.follow(first.view)
    with worker.dial() as link:
        link.send(message_frame(asked(max_tokens=150)))
        tokens(link, 18)  # the prompt takes three steps
        wait_for(lambda: first.service.copies.num_received == 26)  # 90 + 17 tokens
        worker.sender.follow(second.view)
        decoder.go_on.set()
        tokens(link, 132)
    wait_for(lambda: second.service.copies.num_received == 59)  # 90 + 149 tokens
    assert first.service.copies.num_received == 26


def test_a_peer_that_could_not_be_reached_gets_everything_again(start: Callable[..., Worker]) -> None:
    tries: list[WorkerView] = []

    def fails_once(peer: WorkerView) -> Link:
        tries.append(peer)
        if len(tries) == 1:
            raise LinkError("nobody there")
        return dial(peer)

    worker, peer = start(connect_to=fails_once), start()
    worker.sender.follow(peer.view)
    with worker.dial() as link:
        link.send(message_frame(asked(max_tokens=100)))
        tokens(link, 100)
        wait_for(lambda: len(tries) == 2)
        link.send(message_frame(asked("b", max_tokens=100)))  # whoever runs next offers all it has
        tokens(link, 100)
    wait_for(lambda: peer.service.copies.num_received == 47)  # 90 + 99 tokens
    assert worker.sender.num_dropped == 1


def test_what_waited_for_a_lost_peer_does_not_hold_up_the_next_one(start: Callable[..., Worker]) -> None:
    peer = start()

    def connect_to(view: WorkerView) -> Link:
        if view.id == 9:
            raise LinkError("it died")
        return dial(view)

    worker = start(connect_to=connect_to)
    worker.sender.follow(msgspec.structs.replace(peer.view, id=9))
    with worker.dial() as link:
        link.send(message_frame(asked("a", max_tokens=31)))
        tokens(link, 31)
        wait_for(lambda: worker.sender.num_dropped > 0)
        worker.sender.follow(peer.view)
        other = msgspec.structs.replace(asked("b", max_tokens=150), prompt_token_ids=PROMPT[::-1])
        link.send(message_frame(other))
        tokens(link, 150)
    # 90 + 149 tokens of the second; of the first at most the block that was filled while the peer changed.
    wait_for(lambda: peer.service.copies.num_received >= 59 and worker.sender._queue.empty())
    assert peer.service.copies.num_received in (59, 60)
    assert worker.sender.num_dropped >= 29


def test_the_engine_never_waits_for_a_peer_that_takes_nothing(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer's end of the link is never read: a send to it waits, and soon the queue before it is full."""
    monkeypatch.setattr(kv_copies, "_QUEUE_BYTES", 1)
    listener = listen("node", "127.0.0.1", "d", SECRET)
    limits = LinkLimits(num_slots=1, inline_bytes=0, send_timeout_seconds=30)
    worker = start(connect_to=lambda peer: connect(peer.endpoints, "node", "d", SECRET, limits=limits))
    worker.sender.follow(WorkerView(9, listener.endpoints.incarnation, listener.endpoints))
    started = time.monotonic()
    with worker.dial() as link:
        link.send(message_frame(asked(max_tokens=60)))
        assert tokens(link, 60) == expected_tokens()
    assert time.monotonic() - started < 20
    wait_for(lambda: worker.sender.num_sent == 1)
    assert worker.sender._queue is not None
    assert worker.sender._queue.qsize() >= 14, "of 16 places; one block is sent, one waits for the link"
    listener.close()


def test_what_does_not_fit_is_dropped_and_counted() -> None:
    inbox = CopyInbox(SHAPE._replace(block_size=1 << 16, width=1 << 10))  # 512 MiB a block
    inbox._shape = SHAPE
    for number in range(20):
        inbox.put(received(block_frame(some_copy(number + 1))))
    assert inbox.num_dropped == 4
    engine = Engine(FakeDecoder(), None, EngineConfig(block_size=4))
    inbox.take_in(engine.copies)
    assert (inbox.num_received, inbox.has_any) == (16, False)


@pytest.mark.parametrize("keep_copies", [True, False])
def test_a_frame_that_is_none_of_ours_closes_the_link_only(start: Callable[..., Worker], keep_copies: bool) -> None:
    worker = start(keep_copies)
    bad = some_copy(shape=SHAPE._replace(width=7)) if keep_copies else some_copy()
    with worker.dial() as link:
        link.send(block_frame(bad))
        with pytest.raises(LinkClosedError):
            link.receive(timeout=10)
    with worker.dial() as link:
        link.send(message_frame(asked(max_tokens=2)))
        assert tokens(link, 2) == expected_tokens(2)
    assert worker.engine.stats().num_prefix_cache_hits == 0


def test_a_copy_of_another_deployment_is_not_let_in(start: Callable[..., Worker]) -> None:
    worker = start()
    with pytest.raises(LinkError, match="no link"):
        connect(worker.view.endpoints, "node", "d", b"x" * 32, timeout=2)
    assert worker.service.copies.num_received == 0
