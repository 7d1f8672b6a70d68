"""What goes in at one end comes out at the other, on each medium."""

from __future__ import annotations

import errno
import os
import random
import select
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links import shared_memory
from deepseek_ray.links.base import Link
from deepseek_ray.links.channel import SocketWait
from deepseek_ray.links.frame import DtypeCode, Frame, FrameKind
from deepseek_ray.links.stream import StreamLink

MEDIA = ("shared_memory", "tcp", "tcp+tensors")
SLOT = 1 << 20
Pair = Callable[..., tuple[Link, Link]]

each_medium = pytest.mark.parametrize("medium", MEDIA)


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def take(link: Link) -> Frame:
    frame = link.receive(20)
    assert frame is not None
    return frame


@each_medium
@pytest.mark.parametrize("size", [0, 1, 2048, 2049, SLOT - 1, SLOT, SLOT + 1, 40_000_000])
def test_a_frame_of_any_size_arrives_whole(link_pair: Pair, medium: str, size: int) -> None:
    client, server = link_pair(medium)
    payload = noise(size)
    sent = Frame(FrameKind.EXPERT_CALL, payload, epoch=7, sequence=9, layer=3, num_rows=5, dtype=DtypeCode.BFLOAT16)
    with ThreadPoolExecutor(1) as pool:
        for source, sink in ((client, server), (server, client)):
            sending = pool.submit(source.send, sent)
            with take(sink) as frame:
                assert (frame.kind, frame.epoch, frame.sequence, frame.layer, frame.num_rows, frame.dtype) == (
                    *(FrameKind.EXPERT_CALL, 7, 9, 3, 5),
                    DtypeCode.BFLOAT16,
                )
                assert frame.payload == payload
            sending.result()


@each_medium
def test_parts_are_gathered_across_slot_borders(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium, slot_bytes=1000, num_slots=2, inline_bytes=10)
    chance = random.Random(1)
    for _ in range(30):
        parts = [chance.randbytes(chance.choice((0, 1, 999, 1000, 1001, 3000))) for _ in range(chance.randrange(1, 6))]
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(client.send, Frame(FrameKind.EXPERT_CALL, parts))
            with take(server) as frame:
                assert frame.payload == b"".join(parts)
            sending.result()


@each_medium
def test_more_parts_than_one_system_call_takes(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium, inline_bytes=30_000)
    client.send(Frame(FrameKind.EXPERT_CALL, [bytes([i % 251]) * 4 for i in range(2000)]))
    with take(server) as frame:
        assert frame.payload == b"".join(bytes([i % 251]) * 4 for i in range(2000))


@each_medium
def test_many_frames_both_ways_from_several_threads(link_pair: Pair, medium: str) -> None:
    """Three senders and two receivers at each end: every frame once, whole, and in order per sender."""
    ends = link_pair(medium, slot_bytes=8192, num_slots=4)
    per_sender, senders = 60, 3

    def send(link: Link, sender: int) -> None:
        chance = random.Random(sender)
        for sequence in range(per_sender):
            payload = chance.randbytes(chance.choice((0, 100, 2048, 5000, 8192, 30_000)))
            link.send(
                Frame(FrameKind.EXPERT_CALL, payload, batch_id=sender, sequence=sequence, epoch=zlib.crc32(payload))
            )

    def receive(link: Link, seen: list[tuple[int, int]], lock: threading.Lock) -> None:
        while True:
            with lock:  # so that `seen` is in the order of arrival
                if len(seen) == per_sender * senders:
                    return
                frame = take(link)
                seen.append((frame.batch_id, frame.sequence))
            with frame:
                assert zlib.crc32(frame.payload) == frame.epoch

    arrived: list[list[tuple[int, int]]] = [[], []]
    locks = [threading.Lock(), threading.Lock()]
    with ThreadPoolExecutor(10) as pool:
        jobs = [pool.submit(send, link, sender) for link in ends for sender in range(senders)]
        jobs += [pool.submit(receive, ends[i], arrived[i], locks[i]) for i in (0, 1) for _ in range(2)]
        for job in jobs:
            job.result(60)
    for seen in arrived:
        for sender in range(senders):
            assert [sequence for who, sequence in seen if who == sender] == list(range(per_sender))


@each_medium
def test_receivers_of_one_link_share_the_frames(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(take, server) for _ in range(4)]
        for sequence in range(4):
            client.send(Frame(FrameKind.PING, sequence=sequence))
        assert sorted(job.result(20).sequence for job in waiting) == [0, 1, 2, 3]


@each_medium
def test_two_ends_that_send_before_they_receive_do_not_wait_for_each_other(link_pair: Pair, medium: str) -> None:
    """8 MB each way, far more than ring or socket hold, one thread at each end."""
    ends = link_pair(medium, slot_bytes=1 << 16, num_slots=2)
    payloads = [noise(8 << 20, seed) for seed in (0, 1)]

    def send_then_receive(i: int) -> None:
        ends[i].send(Frame(FrameKind.EXPERT_CALL, payloads[i]))
        with take(ends[i]) as frame:
            assert frame.payload == payloads[1 - i]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send_then_receive, (0, 1)))


@each_medium
def test_small_messages_into_a_full_socket_while_the_peer_does_the_same(link_pair: Pair, medium: str) -> None:
    ends = link_pair(medium)
    count = 3000

    def send_then_receive(link: Link) -> None:
        for sequence in range(count):
            link.send(Frame(FrameKind.MESSAGE, b"x" * 1500, sequence=sequence))
        assert [take(link).sequence for _ in range(count)] == list(range(count))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(send_then_receive, ends))


def test_releases_reach_a_peer_whose_socket_was_full(link_pair: Pair) -> None:
    """All notices found no room, because the sender had not read for long; once it reads, they must go out."""
    client, server = link_pair("shared_memory", slot_bytes=4096, num_slots=4, send_timeout_seconds=5)
    nothing_released = shared_memory._RECORD.pack(shared_memory._RELEASE, 0, 0, 0)
    while server._channel.write([nothing_released]):
        pass
    for _ in range(4):
        client.send(Frame(FrameKind.EXPERT_CALL, bytes(4096)))
    for _ in range(4):
        take(server).release()
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(take, server)
        client.send(Frame(FrameKind.EXPERT_CALL, noise(4096)))  # out of slots: waits, and so reads
        assert receiving.result(20).payload == noise(4096)


def test_a_payload_lies_still_until_it_is_released(link_pair: Pair) -> None:
    client, server = link_pair("shared_memory", slot_bytes=4096, num_slots=4)
    payloads = [noise(4096, seed) for seed in range(4)]
    frames = []
    for payload in payloads[:3]:
        client.send(Frame(FrameKind.EXPERT_CALL, payload))
        frames.append(take(server))
    for seed in range(100):  # all through the one slot that is left
        client.send(Frame(FrameKind.EXPERT_CALL, noise(4096, seed)))
        with take(server) as frame:
            assert frame.payload == noise(4096, seed)
    assert [bytes(frame.payload) for frame in frames] == payloads[:3]
    frames[0].payload[:4] = b"mine"  # the reader may write there
    for frame in frames:
        frame.release()


def test_a_peer_that_releases_nothing_is_suspect_within_the_bound(link_pair: Pair) -> None:
    client, server = link_pair("shared_memory", slot_bytes=4096, num_slots=3, send_timeout_seconds=0.3)
    for _ in range(3):
        client.send(Frame(FrameKind.EXPERT_CALL, bytes(4096)))
    start = time.monotonic()
    with pytest.raises(LinkError, match=r"none of 3 slots back for 0\.3 s \(send_timeout_seconds\)"):
        client.send(Frame(FrameKind.EXPERT_CALL, bytes(4096)))
    assert 0.3 <= time.monotonic() - start < 3
    with pytest.raises(LinkClosedError):
        client.send(Frame(FrameKind.PING))
    for _ in range(3):
        take(server).release()  # what was sent before still arrives, and releasing it does no harm
    with pytest.raises(LinkClosedError):
        server.receive(5)


@each_medium
def test_a_peer_that_reads_nothing_is_suspect_within_the_bound(link_pair: Pair, medium: str) -> None:
    client, _ = link_pair(medium, send_timeout_seconds=0.3)
    start = time.monotonic()

    def send_on() -> None:
        for _ in range(20_000):
            client.send(Frame(FrameKind.MESSAGE, bytes(2000)))

    with pytest.raises(LinkError, match=r"took nothing from the socket for 0\.3 s"):
        send_on()
    assert time.monotonic() - start < 10


@each_medium
def test_a_frame_above_the_limit_leaves_the_link_usable(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium, max_payload_bytes=5000)
    with pytest.raises(LinkError, match="5001 bytes, the limit is 5000"):
        client.send(Frame(FrameKind.EXPERT_CALL, bytes(5001)))
    client.send(Frame(FrameKind.EXPERT_CALL, bytes(5000)))
    assert len(take(server).payload) == 5000


def test_no_memory_for_slots_is_said_and_leaves_the_link_usable(
    link_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = link_pair("shared_memory")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(LinkError, match=r"8 slots of 1048576 bytes .*No space left"):
            client.send(Frame(FrameKind.EXPERT_CALL, bytes(5000)))
    client.send(Frame(FrameKind.EXPERT_CALL, bytes(5000)))
    assert len(take(server).payload) == 5000


@each_medium
def test_nothing_there_is_none(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium)
    assert server.receive(0) is None
    start = time.monotonic()
    assert server.receive(0.05) is None
    assert 0.04 < time.monotonic() - start < 2
    client.send(Frame(FrameKind.PING))
    assert take(server).kind is FrameKind.PING


@each_medium
def test_the_descriptor_shows_what_receive_would_give(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium)

    def readable(seconds: float) -> bool:
        return bool(select.select([server.fileno()], [], [], seconds)[0])

    assert not readable(0)
    for sequence in range(3):
        client.send(Frame(FrameKind.PING, sequence=sequence))
    for sequence in range(3):  # one read of the socket takes in all three; the descriptor must still show the others
        assert readable(10)
        assert take(server).sequence == sequence
    assert not readable(0)
    assert server.receive(0) is None
    client.close()
    assert readable(10)
    with pytest.raises(LinkClosedError):
        server.receive(0)
    assert readable(0)  # the end stays visible


@each_medium
def test_the_descriptor_shows_frames_that_a_sender_read(link_pair: Pair, medium: str) -> None:
    """A sender that waits reads the socket; who polls the descriptor must hear of those frames."""
    client, server = link_pair(medium, slot_bytes=4096, num_slots=2)
    descriptor = server.fileno()
    client.send(Frame(FrameKind.PING, sequence=1))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(server.send, Frame(FrameKind.EXPERT_CALL, bytes(16 << 20)))
        take(client).release()
        sending.result(20)
    assert select.select([descriptor], [], [], 10)[0]
    assert take(server).sequence == 1


@each_medium
def test_what_was_sent_before_closing_arrives_before_the_end(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium)
    payload = noise(300_000)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send, Frame(FrameKind.EXPERT_CALL, payload))
        frame = take(server)
        sending.result(10)
    client.send(Frame(FrameKind.BYE))
    client.close()
    client.close()
    assert take(server).kind is FrameKind.BYE
    with pytest.raises(LinkClosedError):
        server.receive(10)
    server.close()
    assert frame.payload == payload  # the memory outlives the link
    frame.release()
    for call in (server.receive, server.fileno, lambda: server.send(Frame(FrameKind.PING))):
        with pytest.raises(LinkClosedError):
            call()


@pytest.mark.parametrize("medium", ["shared_memory", "tcp"])
def test_a_write_that_closing_breaks_off_says_so(link_pair: Pair, medium: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, server = link_pair(medium)
    assert isinstance(server, StreamLink)
    write = server._channel.write

    def close_and_write(*arguments: Any) -> int:
        server._fail(LinkClosedError("closed here"))  # what `close` does first, before it waits for writers
        return write(*arguments)

    monkeypatch.setattr(server._channel, "write", close_and_write)
    with pytest.raises(LinkClosedError, match="closed here"):
        server.send(Frame(FrameKind.PING))


@each_medium
def test_closing_wakes_whoever_waits(link_pair: Pair, medium: str) -> None:
    client, server = link_pair(medium, slot_bytes=4096, num_slots=1)
    waits = threading.Barrier(3)

    def receive() -> None:
        waits.wait()
        server.receive(None)

    def send() -> None:
        waits.wait()
        server.send(Frame(FrameKind.EXPERT_CALL, bytes(100 << 20)))

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(receive), pool.submit(send)]
        waits.wait()
        select.select([client.fileno()], [], [], 10)  # the sender is under way, and stuck: the client does not read
        server.close()
        for job in jobs:
            with pytest.raises(LinkClosedError, match="closed here"):
                job.result(10)


def test_links_work_without_epoll(link_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to wait on systems other than Linux, which Linux has as well."""
    monkeypatch.setattr("deepseek_ray.links.stream.socket_wait", SocketWait)
    client, server = link_pair("tcp")
    payload = random.Random(0).randbytes(20 << 20)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send, Frame(FrameKind.EXPERT_CALL, payload))
        frame = server.receive(20)
        assert frame is not None
        assert frame.payload == payload
        sending.result(20)
    assert server.receive(0) is None
    client.close()
    with pytest.raises(LinkClosedError):
        server.receive(10)
