"""Tensors that travel from device to device beside a link, and never through host memory.

A `TensorLink` is a stream link whose frames may carry one tensor. The frame goes over the stream, its tensor over a
point-to-point channel of torch.distributed: NCCL between two GPUs, gloo between CPUs (for tests: a stream link is
faster there). The stream stays what says that the peer is alive: NCCL alone would wait for a dead one for ever.

Each direction has a group of its own, in which one side only sends and the other only receives: within one group two
peers that both send first would wait for each other. Groups find each other over the link itself, so nobody without
the deployment's secret takes part, and no port is opened but those that NCCL or gloo open for their own data.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_ray.errors import LinkError
from deepseek_ray.links.base import Link, LinkLimits
from deepseek_ray.links.frame import DtypeCode, Frame, message_frame, read_message
from deepseek_ray.links.stream import StreamLink

_CODES = {torch.float32: DtypeCode.FLOAT32, torch.bfloat16: DtypeCode.BFLOAT16, torch.float16: DtypeCode.FLOAT16}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_DIRECTIONS = ("there", "back")
"""From the client to the server, of which the client is rank 0, and the other way."""
_MAX_ON_THEIR_WAY = 64
"""Tensors that may be sent and not yet taken; then `send` waits for the oldest."""
_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class TensorPlace:
    """This process's device, as a peer may send tensors to (`links.base.TensorWay`)."""

    name: str

    def join(self, link: Link, is_server: bool, limits: LinkLimits) -> Link:
        """Closes the link when it fails."""
        backend = self.name.partition(":")[0]
        assert isinstance(link, StreamLink)
        try:
            channels = _Channels(link, backend, is_server, timedelta(seconds=limits.tensor_setup_seconds))
        except (RuntimeError, LinkError) as error:
            link.close()
            raise LinkError(f"no tensors by {backend} to {link.peer}: {error}") from None
        return TensorLink(link, channels, limits)


def place_of(device: torch.device) -> TensorPlace | None:
    """None where tensors come through host memory only."""
    if device.type != "cuda" or not torch.cuda.is_available() or not dist.is_nccl_available():
        return None
    return TensorPlace(f"nccl:{torch.cuda.get_device_properties(device).uuid}")


class TensorLink(Link):
    """See the module. Made by `TensorPlace.join`."""

    takes_tensors = True

    def __init__(self, link: StreamLink, channels: _Channels, limits: LinkLimits) -> None:
        self.peer = f"{link.peer}, tensors by {channels.backend}"
        self.peer_node_id = link.peer_node_id
        self.peer_incarnation = link.peer_incarnation
        self._link = link
        self._channels = channels
        self._limits = limits
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()  # tensors come in the order of their frames
        self._on_their_way: deque[tuple[Any, Tensor]] = deque()

    def send(self, frame: Frame) -> None:
        """The frame's tensor [rows, columns] may be changed as soon as this returns."""
        tensor: Tensor | None = frame.tensor
        if tensor is None:
            self._link.send(frame)
            return
        rows, columns = tensor.shape
        copy = tensor.to(self._channels.device, copy=True).contiguous()
        described = msgspec.structs.replace(
            frame, tensor=None, tensor_dtype=_CODES[tensor.dtype], tensor_rows=rows, tensor_columns=columns
        )
        with self._send_lock:
            self._link.send(described)
            if copy.numel():
                self._on_their_way.append((self._started(self._channels.send, copy), copy))
                self._let_go()

    def receive(self, timeout: float | None = None) -> Frame | None:
        if not self._receive_lock.acquire(timeout=-1 if timeout is None else timeout):
            return None
        try:
            frame = self._link.receive(timeout)
            if frame is not None:
                self._take_tensor(frame)
            return frame
        finally:
            self._receive_lock.release()

    def fileno(self) -> int:
        return self._link.fileno()

    def close(self) -> None:
        self._link.close()  # whoever is inside is about to leave
        with self._send_lock, self._receive_lock:
            self._on_their_way.clear()
            self._channels.close()

    def _take_tensor(self, frame: Frame) -> None:
        if frame.tensor_dtype is DtypeCode.NONE:
            return
        dtype, shape = _DTYPES.get(frame.tensor_dtype), (frame.tensor_rows, frame.tensor_columns)
        limit = self._limits.max_payload_bytes
        if dtype is None or math.prod(shape) * dtype.itemsize > limit:
            raise self._fail(f"announced {frame.tensor_dtype.name} of shape {list(shape)}; the limit is {limit} bytes")
        frame.tensor = torch.empty(shape, dtype=dtype, device=self._channels.device)
        if frame.tensor.numel():
            self._wait(self._started(self._channels.receive, frame.tensor))

    def _let_go(self) -> None:
        """Forget what has been taken; with too much on its way, wait for the oldest."""
        sent = self._on_their_way
        while sent and (len(sent) > _MAX_ON_THEIR_WAY or sent[0][0].is_completed()):
            self._wait(sent.popleft()[0])

    def _started(self, start: Callable[[Tensor], Any], tensor: Tensor) -> Any:
        try:
            return start(tensor)
        except RuntimeError as error:
            raise self._broken(error) from None

    def _wait(self, work: Any) -> None:
        """Until a transfer is done, the peer is gone, or it has taken longer than `send_timeout_seconds`."""
        seconds = self._limits.send_timeout_seconds
        try:
            if self._channels.device.type == "cuda":  # or this thread would only tell the stream to wait
                deadline = time.monotonic() + seconds
                while not work.is_completed():
                    self._link.check()
                    if time.monotonic() > deadline:
                        raise self._fail(f"has not moved a tensor for {seconds:g} s (send_timeout_seconds)")
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            raise self._broken(error) from None

    def _broken(self, error: RuntimeError) -> LinkError:
        """A transfer broke off. Normally the peer has died, and the stream says so at about the same time."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            self._link.check(_GRACE_SECONDS)
        return self._fail(f"broke off a tensor ({error})")

    def _fail(self, what: str) -> LinkError:
        """The stream and the tensors are out of step from here on: nothing more can be read. The error to raise."""
        self._link.close()
        return LinkError(f"{self.peer} {what}; the link is closed: connect again, or set transport to 'tcp'")


class _Channels:
    """Two groups of this process and one peer, one for each direction."""

    def __init__(self, link: StreamLink, backend: str, is_server: bool, timeout: timedelta) -> None:
        self.backend = backend
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        self._rank = int(is_server)
        store = _LinkStore(link, timeout)
        self._groups = [_group(backend, dist.PrefixStore(name, store), self._rank, timeout) for name in _DIRECTIONS]
        self._try(timeout)
        store.end()

    def _try(self, timeout: timedelta) -> None:
        """One number each way: NCCL connects with the first, for which it needs both sides in the same order."""
        numbers = [torch.zeros(1, device=self.device) for _ in self._groups]
        there, back = (self.receive, self.send) if self._rank else (self.send, self.receive)
        for work in (there(numbers[0]), back(numbers[1])):
            work.wait(timeout)

    def send(self, tensor: Tensor) -> Any:
        return self._groups[self._rank].send([tensor], 1 - self._rank, 0)

    def receive(self, tensor: Tensor) -> Any:
        return self._groups[1 - self._rank].recv([tensor], 1 - self._rank, 0)

    def close(self) -> None:
        """Nobody sends or receives any more."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.abort()  # what is on its way would be waited for, and the peer may be dead


def _group(backend: str, store: dist.Store, rank: int, timeout: timedelta) -> Any:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, 2, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, 2, options)


class _Entry(msgspec.Struct, array_like=True):
    key: str
    value: bytes


_ENTRY = msgspec.msgpack.Decoder(_Entry)
_END = "end"


class _LinkStore(dist.Store):
    """What the two sides of new groups tell each other, over their link: what one sets, the other has."""

    def __init__(self, link: StreamLink, timeout: timedelta) -> None:
        super().__init__()
        self._link = link
        self._seconds = timeout.total_seconds()
        self._entries: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # it is given bytes
        self._entries[key] = bytes(value)
        self._link.send(message_frame(_Entry(key, bytes(value))))

    def get(self, key: str) -> bytes:
        deadline = time.monotonic() + self._seconds
        while key not in self._entries:
            frame = self._link.receive(max(0.0, deadline - time.monotonic()))
            if frame is None:
                raise LinkError(f"the peer did not name {key!r} within {self._seconds:g} s (tensor_setup_seconds)")
            entry = read_message(frame, _ENTRY)
            self._entries[entry.key] = entry.value
        return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._entries for key in keys)

    def end(self) -> None:
        """Nothing of what follows on the link belongs to the store."""
        self._link.send(message_frame(_Entry(_END, b"")))
        self.get(_END)
