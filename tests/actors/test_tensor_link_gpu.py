"""Frames whose tensors go from one GPU to another by NCCL: what test_tensor_link.py shows of gloo."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepseek_ray.actors.tensor_link import place_of
from deepseek_ray.errors import LinkClosedError
from deepseek_ray.links.base import Endpoints, Link
from deepseek_ray.links.connect import connect, listen
from deepseek_ray.links.frame import Frame, FrameKind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins two processes only on two CUDA devices"),
]

GPU = torch.device("cuda")
SECRET = b"s" * 32


def _answer_for_ever(endpoints: Endpoints, ready: Any) -> None:
    with connect(endpoints, "node-b", "test", SECRET, transport="auto", tensors=place_of(GPU)) as link:
        ready.set()
        while (received := link.receive()) is not None:
            link.send(Frame(FrameKind.EXPERT_REPLY, received.payload, tensor=received.tensor + 1))


def drain(link: Link) -> None:
    while True:
        link.receive(20)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Link, int]]:
    """A link to a process on another GPU that answers each tensor with one more, and the process's id."""
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING"):
        monkeypatch.setenv(name, "0")  # as actors/launch.py does
    listener = listen("node-a", "127.0.0.1", "test", SECRET, tensors=place_of(GPU))
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    child = spawn.Process(target=_answer_for_ever, args=(listener.endpoints, ready))
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "1")
        child.start()
    try:
        link = listener.accept(120)
        assert link is not None and ready.wait(60)
        assert child.pid is not None
        with link:
            yield link, child.pid
    finally:
        child.kill()
        child.join()
        listener.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4096])
def test_a_tensor_goes_there_and_back(peer: tuple[Link, int], dtype: torch.dtype, rows: int) -> None:
    link, _ = peer
    assert link.takes_tensors and "nccl" in link.peer
    tensor = torch.randn(rows, 512, device=GPU).to(dtype)
    for number in range(50):
        link.send(Frame(FrameKind.EXPERT_CALL, b"indices", tensor=tensor + number))
        with link.receive(20) as answer:  # type: ignore[union-attr]
            assert answer.tensor.is_cuda and bytes(answer.payload) == b"indices"
            assert torch.equal(answer.tensor, tensor + number + 1)


@pytest.mark.parametrize("on_their_way", [0, 5])
def test_the_death_of_the_peer_ends_the_link_and_leaves_the_gpu_usable(
    peer: tuple[Link, int], on_their_way: int
) -> None:
    link, pid = peer
    tensor = torch.ones(100_000, 512, device=GPU)
    for _ in range(on_their_way):
        link.send(Frame(FrameKind.EXPERT_CALL, tensor=tensor))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LinkClosedError):
        drain(link)
    link.close()
    assert float((tensor + tensor).sum()) == 2 * tensor.numel()
