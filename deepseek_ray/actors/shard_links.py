"""An attention worker's links to expert shards, and which shards to leave alone for now.

A shard is *lost* when its link ended or could not be opened: a thread tries to reach it, or the process that replaces
it, so that the engine never waits for a connection where another shard has the expert. A shard is *suspect* when its
link is open and an answer is overdue: it may be stopped, slow, or cut off. It is asked again as soon as it is heard.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from deepseek_ray.actors.shard_directory import ShardDirectory
from deepseek_ray.control.reports import ShardAddress
from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links.base import Link

logger = logging.getLogger(__name__)

_RECONNECT_SECONDS = 0.1


class ShardLinks:
    """`get`, `drop`, `suspect` and `heard` belong to the engine's thread; `lost` may be read by any."""

    def __init__(self, directory: ShardDirectory, connect: Callable[[ShardAddress], Link]) -> None:
        self._directory = directory
        self._connect = connect
        self._links: dict[int, Link] = {}
        self._suspects: set[int] = set()
        self._lock = threading.Lock()
        self._lost: dict[int, int] = {}
        self._found: dict[int, Link] = {}
        self._closed = threading.Event()
        self._any_lost = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def avoided(self) -> frozenset[int]:
        """Shards to ask only for what no other one has."""
        self._take_found()
        return frozenset(self._lost) | self._suspects if self._lost or self._suspects else frozenset()

    @property
    def lost(self) -> dict[int, int]:
        """Shard -> incarnation of the process that cannot be reached (0: it has no address)."""
        with self._lock:
            return dict(self._lost)

    @property
    def open(self) -> dict[Link, int]:
        """Every open link and its shard."""
        return {link: shard for shard, link in self._links.items()}

    def get(self, shard: int) -> Link | None:
        """An open link to the shard's present process; None if it cannot be reached now."""
        self._take_found()
        address = self._directory.address(shard)
        link = self._links.get(shard)
        if link is not None and (address is None or link.peer_incarnation == address.incarnation):
            return link
        if link is not None:
            self.drop(shard, LinkClosedError("replaced by a newer process"))
        if address is None:
            self._lose(shard, 0)
            return None
        if self._lost.get(shard) == address.incarnation:
            return None  # the thread keeps trying
        try:
            link = self._connect(address)
        except (LinkError, OSError) as error:
            logger.info("expert shard %d cannot be reached: %s", shard, error)
            self._lose(shard, address.incarnation)
            return None
        self._keep(shard, link)
        return link

    def drop(self, shard: int, error: Exception) -> Link | None:
        """The link to a shard is over; returns it, closed, or None if there was none."""
        link = self._links.pop(shard, None)
        if link is None:
            return None
        logger.warning("expert shard %d is gone (%s)", shard, error)
        self._suspects.discard(shard)
        link.close()
        self._lose(shard, link.peer_incarnation)
        return link

    def suspect(self, shard: int) -> None:
        """An answer is overdue."""
        logger.warning("expert shard %d does not answer in time", shard)
        self._suspects.add(shard)

    def heard(self, shard: int) -> None:
        """A frame came from the shard."""
        self._suspects.discard(shard)

    def close(self) -> None:
        self._closed.set()
        self._any_lost.set()
        if self._thread is not None:
            self._thread.join()
        for link in [*self._links.values(), *self._found.values()]:
            link.close()
        self._links.clear()
        self._found.clear()

    def _keep(self, shard: int, link: Link) -> None:
        self._links[shard] = link
        with self._lock:
            self._lost.pop(shard, None)

    def _lose(self, shard: int, incarnation: int) -> None:
        with self._lock:
            self._lost[shard] = incarnation
        self._any_lost.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._reconnect, name="reconnect", daemon=True)
            self._thread.start()

    def _take_found(self) -> None:
        """Links that the thread has opened become the engine's."""
        if not self._found:
            return
        with self._lock:
            found, self._found = self._found, {}
        for shard, link in found.items():
            if shard in self._links:
                link.close()
            else:
                self._keep(shard, link)

    def _reconnect(self) -> None:
        while not self._closed.is_set():
            self._any_lost.wait()
            if self._closed.wait(_RECONNECT_SECONDS):
                return
            with self._lock:
                missing = [shard for shard in self._lost if shard not in self._found]
                if not self._lost:
                    self._any_lost.clear()
            for shard in missing:
                self._try(shard)

    def _try(self, shard: int) -> None:
        address = self._directory.address(shard)
        if address is None:
            return
        try:
            link = self._connect(address)
        except (LinkError, OSError):
            return
        with self._lock:
            self._found[shard] = link
