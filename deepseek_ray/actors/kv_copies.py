"""An attention worker's full cache blocks, copied to a peer: when the worker dies, the peer goes on from there.

Copies are an optimisation: nobody waits for one, what does not fit is dropped and counted, and a copy never takes the
room of a running sequence. Without them a request is computed again from its tokens, with the same result.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from deepseek_ray.actors.kv_frames import block_frame, read_block
from deepseek_ray.control.reports import WorkerView
from deepseek_ray.engine.block_copies import BlockCopies, BlockCopy, BlockShape
from deepseek_ray.engine.prefix_cache import NamedBlock
from deepseek_ray.errors import LinkError
from deepseek_ray.links.base import Link
from deepseek_ray.links.frame import Frame

logger = logging.getLogger(__name__)

_QUEUE_BYTES = 64 << 20
_LEAST_BLOCKS = 16
_BLOCKS_PER_STEP = 64
"""Reading a block out of the cache takes the engine's time."""
_RECONNECT_SECONDS = 0.5


class CopyCounts(NamedTuple):
    """In blocks, since the worker's process started."""

    sent: int = 0
    received: int = 0
    dropped: int = 0


class CopySender:
    """Gives the full blocks of running sequences to the peer, which may be another one at any time.

    `after_step` belongs to the engine's thread, `follow` to any; sending has a thread of its own.
    """

    def __init__(self, connect: Callable[[WorkerView], Link]) -> None:
        self._connect = connect
        self._peer: WorkerView | None = None
        self._offered_to: WorkerView | None = None
        self._offer = 0
        """One more each time that everything is offered anew: what waits from before is dropped."""
        self._must_offer_again = False
        self._given: dict[bytes, None] = {}  # keys that the peer was given, oldest first
        self._waiting: deque[NamedBlock] = deque()
        self._queue: queue.Queue[tuple[int, BlockCopy]] | None = None
        self.num_sent = 0
        self.num_dropped = 0

    def follow(self, peer: WorkerView | None) -> None:
        """From now on copies go there; None when there is nobody."""
        self._peer = peer

    def after_step(self, copies: BlockCopies) -> None:
        """Take the blocks that the step has filled, never waiting. A new peer gets all that running sequences have."""
        peer = self._peer
        if peer != self._offered_to or self._must_offer_again:
            self._offered_to, self._must_offer_again = peer, False
            self._offer += 1
            self._given = {}
            self._waiting = deque(copies.running_blocks())
        self._waiting += copies.new_blocks  # again, for a new peer, but for those whose sequence has just ended
        if peer is None:
            self._waiting.clear()
            return
        outbox = self._outbox(copies.shape)
        for _ in range(min(len(self._waiting), _BLOCKS_PER_STEP)):
            if outbox.full():
                break
            self._give(self._waiting.popleft(), copies, outbox)
        while len(self._waiting) > copies.num_blocks:
            self._waiting.popleft()
            self.num_dropped += 1

    def _give(self, name: NamedBlock, copies: BlockCopies, outbox: queue.Queue[tuple[int, BlockCopy]]) -> None:
        if name.key in self._given:
            return
        copy = copies.read(name)
        if copy is None:
            self.num_dropped += 1
            return
        outbox.put_nowait((self._offer, copy))
        self._given[name.key] = None
        if len(self._given) > copies.num_blocks:  # the peer has as many blocks: it has given up the oldest
            del self._given[next(iter(self._given))]

    def _outbox(self, shape: BlockShape) -> queue.Queue[tuple[int, BlockCopy]]:
        """Made with the first use, and the thread that empties it."""
        if self._queue is None:
            self._queue = queue.Queue(_queue_length(shape))
            threading.Thread(target=self._run, args=(self._queue,), name="kv copies", daemon=True).start()
        return self._queue

    def _run(self, outbox: queue.Queue[tuple[int, BlockCopy]]) -> None:
        link: Link | None = None
        reached: WorkerView | None = None
        while True:
            offer, copy = outbox.get()
            peer = self._offered_to
            if peer is None or offer != self._offer:
                self.num_dropped += 1
                continue
            try:
                if link is None or peer != reached:
                    _close(link)
                    link, reached = self._connect(peer), peer
                link.send(block_frame(copy))
                self.num_sent += 1
            except (LinkError, OSError) as error:
                logger.info("a cache block was not copied: %s", error)
                self.num_dropped += 1
                _close(link)
                link = None
                time.sleep(_RECONNECT_SECONDS)
                self._must_offer_again = True


def _close(link: Link | None) -> None:
    if link is not None:
        link.close()


class CopyInbox:
    """Copies that have arrived and wait for the engine's thread, which alone may touch blocks and latents."""

    def __init__(self, shape: BlockShape) -> None:
        self._shape = shape
        self._copies: deque[BlockCopy] = deque()
        self._most = _queue_length(shape)
        self.num_received = 0
        self.num_dropped = 0

    @property
    def has_any(self) -> bool:
        return bool(self._copies)

    def put(self, frame: Frame) -> None:
        """In a reader's thread; releases the frame. LinkError when it is no block of this cache's shape."""
        with frame:
            copy = read_block(frame, self._shape)
        if len(self._copies) >= self._most:
            self.num_dropped += 1
        else:
            self._copies.append(copy)

    def take_in(self, copies: BlockCopies) -> None:
        """In the engine's thread, between two steps."""
        while self._copies:
            self.num_received += copies.insert(self._copies.popleft())


def _queue_length(shape: BlockShape) -> int:
    return max(_LEAST_BLOCKS, _QUEUE_BYTES // shape.num_bytes)
