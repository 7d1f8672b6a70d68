"""The expert backend of an attention worker: one frame per shard and layer, sent again until it is answered.

An expert call is a pure function of (weights, activations), so a call whose shard died is simply sent again - to the
same shard's next process, or wherever a newer table says - and gives the same bits.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek_ray.actors.expert_frames import call_frame, read_reply
from deepseek_ray.actors.expert_meter import ExpertMeter
from deepseek_ray.control.membership import ShardAddress
from deepseek_ray.errors import LinkClosedError, LinkError, UnavailableError
from deepseek_ray.expert_parallel.dispatch import ShardCall, plan_calls
from deepseek_ray.expert_parallel.table import RoutingTable
from deepseek_ray.links.base import Link
from deepseek_ray.links.frame import Frame, FrameKind
from deepseek_ray.nn.moe import ExpertBackend

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
"""How often a wait looks up: for news from the router, for requests that ended meanwhile."""
_PATIENCE_SECONDS = 0.5
"""Experts that answer within this time are merely busy; only a longer wait is given up when a request ends."""


class StepInterruptedError(UnavailableError):
    """A step was given up while experts were away, because a request of its batch ended. Nothing is lost: run again."""


class ShardDirectory:
    """The newest routing table and where its shards listen. Written by the report loop, read by the engine thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._table: RoutingTable | None = None
        self._shards: dict[int, ShardAddress] = {}
        self._owners: dict[int, Tensor] = {}

    def update(self, table: RoutingTable, shards: dict[int, ShardAddress]) -> None:
        """Take in a table unless a newer one is here."""
        with self._changed:
            if self._table is not None and table.version < self._table.version:
                return
            self._table, self._shards = table, shards
            self._owners = {layer: torch.tensor(owners) for layer, owners in table.owners.items()}
            self._changed.notify_all()

    @property
    def version(self) -> tuple[int, int]:
        with self._changed:
            return self._table.version if self._table else (0, 0)

    def owners(self, layer: int) -> Tensor:
        """[experts] int64: shard of each logical expert."""
        with self._changed:
            return self._owners[layer]

    def address(self, shard: int) -> ShardAddress | None:
        with self._changed:
            return self._shards.get(shard)

    def wait_newer(self, version: tuple[int, int], seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: self._table is not None and self._table.version > version, timeout=seconds
            )


@dataclass
class _Pending:
    """One call that has no answer yet. `link` is None until it could be sent."""

    call: ShardCall
    attempt: int
    link: Link | None = None


@dataclass
class _Ticket:
    layer: int
    hidden: Tensor
    expert_ids: Tensor
    rows: Tensor
    """[T * K, H], filled by replies."""
    pending: dict[int, _Pending] = field(default_factory=dict)
    """By sequence number."""


class RemoteExperts(ExpertBackend):
    """Routed experts in other processes. Used by one thread."""

    def __init__(
        self,
        directory: ShardDirectory,
        connect: Callable[[ShardAddress], Link],
        incarnation: int,
        ask_for_news: Callable[[], None],
        interrupted: Callable[[], bool],
    ) -> None:
        self._directory = directory
        self._connect = connect
        self._incarnation = incarnation
        self._ask_for_news = ask_for_news
        self._interrupted = interrupted
        self._links: dict[int, Link] = {}
        self._sequence = 0
        self.meter = ExpertMeter()
        self.num_frames = 0
        self.num_frames_resent = 0

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor) -> _Ticket:
        started = time.monotonic()
        tokens, top_k = expert_ids.shape
        ticket = _Ticket(layer, hidden, expert_ids, hidden.new_empty(tokens * top_k, hidden.shape[1]))
        owners = self._directory.owners(layer)
        for call in plan_calls(expert_ids, owners):
            self._send(ticket, _Pending(call, attempt=0))
        self.meter.dispatched(layer, expert_ids, len(owners), time.monotonic() - started)
        return ticket

    def combine(self, ticket: _Ticket) -> Tensor:
        """Raises StepInterruptedError when experts are away and a request of the batch ended meanwhile."""
        started = time.monotonic()
        while ticket.pending:
            if any(pending.link is None for pending in ticket.pending.values()):
                self._send_again(ticket)
            self._collect(ticket)
            if ticket.pending and time.monotonic() - started > _PATIENCE_SECONDS and self._interrupted():
                raise StepInterruptedError("a request of this batch ended while experts were away; run the step again")
        self.meter.combined(time.monotonic() - started)
        tokens, top_k = ticket.expert_ids.shape
        return ticket.rows.view(tokens, top_k, -1)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _send(self, ticket: _Ticket, pending: _Pending) -> None:
        """Register the call and send it if its shard can be reached."""
        self._sequence += 1
        frame = call_frame(
            pending.call,
            ticket.hidden,
            ticket.layer,
            self._sequence,
            pending.attempt,
            self._incarnation,
            self._directory.version,
        )
        ticket.pending[self._sequence] = pending
        link = self._link(ticket, pending.call.shard)
        if link is None:
            return
        try:
            link.send(frame)
        except LinkError as error:
            self._drop(ticket, pending.call.shard, error)
            return
        pending.link = link
        self.num_frames += 1
        self.num_frames_resent += pending.attempt > 0

    def _send_again(self, ticket: _Ticket) -> None:
        """Plan what was not delivered anew, under the newest table."""
        self._ask_for_news()
        version = self._directory.version
        unsent = [sequence for sequence, pending in ticket.pending.items() if pending.link is None]
        owners = self._directory.owners(ticket.layer)
        for sequence in unsent:
            pending = ticket.pending.pop(sequence)
            for call in plan_calls(ticket.expert_ids, owners, pending.call.places):
                self._send(ticket, _Pending(call, pending.attempt + 1))
        if any(pending.link is None for pending in ticket.pending.values()):
            self._directory.wait_newer(version, _POLL_SECONDS)

    def _collect(self, ticket: _Ticket) -> None:
        """Take the answers that are there; wait a moment for the first."""
        waiting = {pending.link: pending.call.shard for pending in ticket.pending.values() if pending.link}
        if not waiting:
            return
        poller = select.poll()
        by_fileno = {link.fileno(): link for link in waiting}
        for fileno in by_fileno:
            poller.register(fileno, select.POLLIN)
        unsent = any(pending.link is None for pending in ticket.pending.values())
        for fileno, _ in poller.poll(0 if unsent else int(_POLL_SECONDS * 1000)):
            link = by_fileno[fileno]
            try:
                while (frame := link.receive(0)) is not None:
                    self._take(ticket, frame)
            except LinkError as error:
                self._drop(ticket, waiting[link], error)

    def _take(self, ticket: _Ticket, frame: Frame) -> None:
        with frame:
            pending = ticket.pending.get(frame.sequence)
            if pending is None or frame.incarnation != self._incarnation:
                return  # a late answer to a call that was sent again, or to a step that was given up
            if frame.kind is FrameKind.EXPERT_REPLY:
                ticket.rows[pending.call.places] = read_reply(frame, ticket.hidden.shape[1])
                del ticket.pending[frame.sequence]
            elif frame.kind is FrameKind.STALE:
                pending.link = None  # sent again once the router has told where the experts are
            elif frame.kind is FrameKind.ERROR:
                sentence = bytes(frame.payload).decode(errors="replace")
                raise UnavailableError(f"expert shard {pending.call.shard} failed: {sentence}")

    def _link(self, ticket: _Ticket, shard: int) -> Link | None:
        """An open link to the shard's present process, or None if it cannot be reached now."""
        address = self._directory.address(shard)
        link = self._links.get(shard)
        if link is not None and (address is None or link.peer_incarnation == address.incarnation):
            return link
        if link is not None:
            self._drop(ticket, shard, LinkClosedError("replaced by a newer process"))
        if address is None:
            return None
        try:
            self._links[shard] = self._connect(address)
        except (LinkError, OSError) as error:
            logger.info("expert shard %d cannot be reached: %s", shard, error)
            return None
        return self._links[shard]

    def _drop(self, ticket: _Ticket, shard: int, error: Exception) -> None:
        """Give a link up; what was sent over it and not answered waits to be sent again."""
        link = self._links.pop(shard, None)
        if link is None:
            return
        logger.warning("expert shard %d is gone (%s); its frames wait", shard, error)
        link.close()
        for pending in ticket.pending.values():
            if pending.link is link:
                pending.link = None
