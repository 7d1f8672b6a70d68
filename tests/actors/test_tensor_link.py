"""Frames that carry a tensor beside their payload: by gloo here, by NCCL in test_tensor_link_gpu.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any

import pytest
import torch

from deepseek_ray.actors import tensor_link
from deepseek_ray.actors.tensor_link import TensorPlace
from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links.base import Endpoints, Link, LinkLimits
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame, FrameKind
from deepseek_ray.links.listener import Listener
from tests.links.conftest import nothing_left_behind  # noqa: F401

Pair = Callable[..., tuple[Link, Link]]
resource_tracker.ensure_running()  # spawning would start it within a test, and it stays


def frame(tensor: torch.Tensor | None, payload: Any = b"", sequence: int = 0) -> Frame:
    return Frame(FrameKind.EXPERT_CALL, payload, sequence=sequence, tensor=tensor)


def take(link: Link) -> Frame:
    received = link.receive(20)
    assert received is not None
    return received


@pytest.mark.parametrize("medium", ["shared_memory+tensors", "tcp+tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_a_tensor_arrives_beside_its_payload(link_pair: Pair, medium: str, dtype: torch.dtype, rows: int) -> None:
    client, server = link_pair(medium)
    sent = torch.randn(rows, 96).to(dtype)
    for source, sink in ((client, server), (server, client)):
        assert source.takes_tensors and "tensors by gloo" in source.peer
        source.send(frame(sent, [b"some ", b"indices"]))
        source.send(frame(None, b"no tensor"))
        with take(sink) as received:
            assert bytes(received.payload) == b"some indices"
            assert received.tensor.dtype == dtype and torch.equal(received.tensor, sent)
        with take(sink) as received:
            assert bytes(received.payload) == b"no tensor" and received.tensor is None


def test_a_sent_tensor_may_be_changed_at_once(link_pair: Pair) -> None:
    client, server = link_pair("tcp+tensors")
    sent = torch.ones(4000, 64)
    client.send(frame(sent))
    sent.zero_()
    assert take(server).tensor.eq(1).all()


def test_two_peers_that_send_first_do_not_wait_for_each_other(link_pair: Pair) -> None:
    client, server = link_pair("shared_memory+tensors")
    count = tensor_link._MAX_ON_THEIR_WAY  # beyond that a sender waits, as for a slot

    def talk(link: Link) -> list[int]:
        for number in range(count):
            link.send(frame(torch.full((100, 64), float(number)), sequence=number))
        return [int(take(link).tensor[99, 63]) for _ in range(count)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, (client, server))) == [list(range(count))] * 2


def test_threads_that_send_at_once_keep_frames_and_tensors_together(link_pair: Pair) -> None:
    client, server = link_pair("tcp+tensors")

    def send(thread: int) -> None:
        for number in range(thread, 60, 3):
            client.send(frame(torch.full((1 + number, 8), float(number)), sequence=number))

    with ThreadPoolExecutor(3) as pool:
        sending = pool.map(send, range(3))
        received = [take(server) for _ in range(60)]
        list(sending)
    assert sorted(each.sequence for each in received) == list(range(60))
    for each in received:
        assert each.tensor.shape == (1 + each.sequence, 8) and each.tensor.eq(each.sequence).all()


def test_a_sender_is_held_up_by_a_peer_that_takes_nothing(link_pair: Pair) -> None:
    client, _ = link_pair("tcp+tensors", send_timeout_seconds=0.3)
    for _ in range(tensor_link._MAX_ON_THEIR_WAY):
        client.send(frame(torch.zeros(2000, 64)))
    with pytest.raises(LinkError, match="tensor"):
        client.send(frame(torch.zeros(2000, 64)))
    with pytest.raises(LinkError):
        client.send(frame(None))


def test_a_tensor_above_the_limit_is_not_allocated(link_pair: Pair) -> None:
    client, server = link_pair("tcp+tensors", max_payload_bytes=4096)
    client.send(frame(torch.zeros(33, 32)))
    with pytest.raises(LinkError, match=r"FLOAT32 of shape \[33, 32\]"):
        server.receive(20)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("", "gloo:server"), ("gloo:client", ""), ("gloo:same", "gloo:same"), ("gloo:a", "nccl:b")]
)
def test_without_a_common_way_between_two_places_it_is_a_plain_link(
    serve: Callable[..., Listener], secret: bytes, ours: str, theirs: str
) -> None:
    listener = serve(tensors=TensorPlace(theirs) if theirs else None)
    with connect(listener.endpoints, "node-a", "test", secret, tensors=TensorPlace(ours) if ours else None) as link:
        accepted = listener.accept(10)
        assert accepted is not None and not accepted.takes_tensors and not link.takes_tensors
        accepted.close()


def test_a_link_whose_channels_fail_goes_on_without_tensors(
    serve: Callable[..., Listener], secret: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such library")

    monkeypatch.setattr(tensor_link, "_group", broken)
    listener = serve(tensors=TensorPlace("gloo:server"))
    with connect(listener.endpoints, "node-a", "test", secret, tensors=TensorPlace("gloo:client")) as link:
        assert not link.takes_tensors
        accepted = listener.accept(10)
        assert accepted is not None and not accepted.takes_tensors
        link.send(frame(None, b"all the same"))
        assert bytes(take(accepted).payload) == b"all the same"
        accepted.close()


def test_a_backend_that_the_listener_does_not_offer_is_refused(serve: Callable[..., Listener], secret: bytes) -> None:
    listener = serve()
    pretended = Endpoints(
        **{name: getattr(listener.endpoints, name) for name in Endpoints.__struct_fields__ if name != "tensors"},
        tensors="gloo:server",
    )
    with connect(pretended, "node-a", "test", secret, tensors=TensorPlace("gloo:client")) as link:
        assert not link.takes_tensors, "the plain link that comes after the refusals"
    assert "wants tensors by 'gloo'" in listener.last_rejection


def exchange_for_ever(link: Link, tensor: torch.Tensor) -> None:
    while True:
        link.send(frame(tensor))
        take(link)


def _answer_for_ever(endpoints: Endpoints, secret: bytes, ready: Any) -> None:
    with connect(endpoints, "node-a", "test", secret, tensors=TensorPlace("gloo:child")) as link:
        ready.set()
        while (received := link.receive()) is not None:
            link.send(frame(received.tensor + 1, sequence=received.sequence))


@pytest.mark.parametrize("moment", ["idle", "busy"])
def test_the_death_of_a_peer_ends_the_link(secret: bytes, moment: str) -> None:
    listener = listen("node-a", "127.0.0.1", "test", secret, tensors=TensorPlace("gloo:parent"))
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    child = spawn.Process(target=_answer_for_ever, args=(listener.endpoints, secret, ready))
    child.start()
    try:
        link = listener.accept(60)
        assert link is not None and ready.wait(60)
        large = torch.zeros(20_000, 256)
        link.send(frame(large))
        assert take(link).tensor.eq(1).all()
        killer = threading.Timer(0.02, os.kill, (child.pid, signal.SIGKILL))
        if moment == "idle":
            os.kill(child.pid or 0, signal.SIGKILL)
        else:
            killer.start()
        with pytest.raises(LinkClosedError):
            exchange_for_ever(link, large)
        killer.cancel()
        link.close()
    finally:
        child.kill()
        child.join()
        child.close()
        listener.close()


def test_closing_here_wakes_whoever_receives(link_pair: Pair) -> None:
    client, _ = link_pair("tcp+tensors")
    failed: list[BaseException] = []

    def receive() -> None:
        try:
            client.receive()
        except LinkClosedError as error:
            failed.append(error)

    waiting = threading.Thread(target=receive)
    waiting.start()
    client.close()
    waiting.join(10)
    assert not waiting.is_alive() and failed


def test_limits_say_how_long_channels_may_take() -> None:
    assert LinkLimits().tensor_setup_seconds > LinkLimits().handshake_timeout_seconds
