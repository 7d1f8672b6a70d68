"""What a link is, whatever carries it. Callers cannot tell which medium is used.

A link joins two processes. After connecting both sides are equal: each may send at any time. Frames of one sender
arrive in order, whole, once, or not at all when the peer dies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from deepseek_ray.errors import LinkError
from deepseek_ray.links.arena import MAX_SLOTS
from deepseek_ray.links.frame import Frame

Transport = Literal["auto", "shared_memory", "tcp"]


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """Where a listener can be reached. Small and picklable; holds no secret."""

    node_id: str
    """Ray node id of the listener: only peers with the same one try the UNIX socket."""
    unix_name: str | None
    """Name of the abstract UNIX socket without the leading NUL; None when the listener takes TCP only."""
    tcp_host: str | None
    """None when the listener takes shared memory only."""
    tcp_port: int
    """0 without TCP."""
    incarnation: int
    """Which life of the listening process this is; connecting to another one is refused."""
    tensors: str = ""
    """Name of the `TensorWay` that a link may take; empty for none."""


class LinkLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and times of a link. The two ends need not agree, except on `max_payload_bytes`."""

    max_payload_bytes: int = 1 << 30
    """Largest payload of one frame."""
    send_timeout_seconds: float = 10.0
    """Longest wait for a free slot or for room in the socket; then the peer is suspect and `send` raises."""
    inline_bytes: int = 2048
    """Shared memory: payloads up to this ride on the socket."""
    num_slots: int = 8
    """Shared memory: slots of each side for what it sends, allocated with the first payload above `inline_bytes`."""
    slot_bytes: int = 1 << 20
    """Shared memory: one slot; a larger payload is split and copied together by the reader."""
    max_inbox_bytes: int = 256 << 20
    """A sender that waits also reads (or two waiting senders would wait for each other); it stops reading here."""
    tensor_setup_seconds: float = 30.0
    """Longest wait for the channels of tensors, after the handshake."""
    handshake_timeout_seconds: float = 5.0
    """A peer that does not prove itself within this time is dropped."""
    max_pending_handshakes: int = 32
    """Beyond this the oldest unfinished handshake is dropped."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise LinkError(f"{name} is {value}; it must be between {low} and {high}")


MAX_INLINE_BYTES = 1 << 15
_RANGES = (
    ("max_payload_bytes", 0, 1 << 40),
    ("inline_bytes", 0, MAX_INLINE_BYTES),
    ("num_slots", 1, MAX_SLOTS),
    ("slot_bytes", 1, 1 << 30),
    ("max_pending_handshakes", 1, 1 << 16),
)


class Link(ABC):
    """A connection to one peer. `send` and `receive` may be called from any threads at the same time."""

    peer: str
    """Who is at the other end, for messages to people."""
    peer_node_id: str
    """The peer's Ray node."""
    peer_incarnation: int
    """Which life of the peer's process this is, as it proved in the handshake."""
    takes_tensors: bool = False
    """Whether a frame may carry a tensor beside its payload."""

    @abstractmethod
    def send(self, frame: Frame) -> None:
        """Send one frame; its payload may be reused as soon as this returns. Frames of several threads do not mix.

        Raises LinkClosedError when the peer is gone; LinkError when the frame is too large or when the peer has not
        taken anything for `send_timeout_seconds`, after which the link is closed.
        """

    @abstractmethod
    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next frame; None when none came within `timeout` seconds (None waits for ever, 0 only looks).

        The payload stays valid until `frame.release()`. Frames that arrived before the peer died come first; then
        LinkClosedError is raised. LinkError: the peer broke the protocol, and the link is closed.
        """

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor for select/poll/epoll/asyncio of many links: readable whenever `receive(0)` has something to say
        (a frame, the end, or - rarely - nothing yet). It belongs to the link: neither read nor close it."""

    @abstractmethod
    def close(self) -> None:
        """Close this side; the peer reads what was sent and then sees the end. Harmless to call twice.

        Payloads received and not yet released stay readable.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorWay(Protocol):
    """How tensors get from another process's device to that of this one, beside a link and past this one's memory."""

    @property
    def name(self) -> str:
        """`backend:place`. Two processes whose backends are the same and whose places are not have a way in common."""

    def join(self, link: Link, is_server: bool, limits: LinkLimits) -> Link:
        """A new link, taking tensors from now on; both ends call this at the same time. LinkError when it fails."""
