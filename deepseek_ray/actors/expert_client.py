"""The expert backend of an attention worker: one frame per shard and layer, sent again until it is answered.

An expert call is a pure function of (weights, activations). So one whose shard died or does not answer in time goes to
another shard that has the experts, at once; where none has, it waits for the shard's next process, or for a table that
says where the experts are now. The bits are the same whoever answers.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek_ray.actors.expert_frames import ONE_BY_ONE, RELOAD, call_frame, read_reply
from deepseek_ray.actors.expert_meter import ExpertMeter
from deepseek_ray.actors.shard_directory import ShardDirectory
from deepseek_ray.actors.shard_links import ShardLinks
from deepseek_ray.control.patience import Patience
from deepseek_ray.control.reports import ShardAddress
from deepseek_ray.errors import ExpertsCrashedError, LinkClosedError, LinkError, LinkLostError, UnavailableError
from deepseek_ray.expert_parallel.dispatch import ShardCall, reading_cost
from deepseek_ray.kernels.pairs import default_pairs
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


@dataclass
class _Pending:
    """One call that has no answer yet. `link` is None until it could be sent."""

    call: ShardCall
    attempt: int
    flags: int = 0
    link: Link | None = None
    sent: float = 0.0
    answered: int = 0
    """Pairs that have their rows; with the flag ONE_BY_ONE they come token by token."""
    is_computing: bool = False
    """With the flag ONE_BY_ONE: the shard has said that it computes the next token, and no other call."""
    crashed: bool = False
    """The process it was sent to has died over it, or beside it."""

    @property
    def places(self) -> Tensor:
        """Of the pairs that have no answer yet."""
        return self.call.places[self.answered :]


@dataclass(eq=False)
class _Ticket:
    layer: int
    first_row: int
    """Place of the first row of `hidden` in the step's batch."""
    hidden: Tensor
    expert_ids: Tensor
    counts: Tensor
    """[experts]: tokens of each."""
    rows: Tensor
    """[T * K, H], filled by replies."""
    pending: dict[int, _Pending] = field(default_factory=dict)
    """By sequence number, which is the order in which they were sent."""
    refused: set[int] = field(default_factory=set)
    """Shards that said they do not hold what they were asked for."""

    def token_of(self, places: Tensor) -> Tensor:
        """Rows of `hidden` that places [P] belong to."""
        return places // self.expert_ids.shape[1]


class RemoteExperts(ExpertBackend):
    """Routed experts in other processes. Used by one thread; `lost_shards` may be called by any."""

    def __init__(
        self,
        directory: ShardDirectory,
        connect: Callable[[ShardAddress], Link],
        incarnation: int,
        ask_for_news: Callable[[], None],
        interrupted: Callable[[], bool],
        hedge_after_seconds: float = 0.3,
        node_with_our_cores: str | None = None,
        device: torch.device | str = "cpu",
        weight_bytes: float = 2.0,
    ) -> None:
        """`node_with_our_cores`: shards there compute on the cores that this process has; None if none does. `device`:
        where the activations are, and are to be again; another one than the CPU pays where links take tensors.
        `weight_bytes`: of each weight of an expert."""
        self._reading = reading_cost(weight_bytes)
        self.device = torch.device(device)
        self._node_with_our_cores = node_with_our_cores
        self._directory = directory
        self._links = ShardLinks(directory, connect)
        self._incarnation = incarnation
        self._ask_for_news = ask_for_news
        self._interrupted = interrupted
        self._patience = Patience(hedge_after_seconds)
        self._pairs = default_pairs()
        self._sequence = 0
        self._open: list[_Ticket] = []
        """Dispatched and not combined, in this order: answers to all of them come over the same links."""
        self.meter = ExpertMeter()
        self.num_frames = 0
        self.num_frames_resent = 0
        self.num_frames_hedged = 0
        """Of those sent again: because an answer was overdue."""
        self.num_experts_wrong = 0
        """Times that an expert gave values that are not finite from finite ones."""

    def lost_shards(self) -> dict[int, int]:
        """Shard -> incarnation of the process that cannot be reached."""
        return self._links.lost

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor, first_row: int = 0) -> _Ticket:
        started = time.monotonic()
        tokens, top_k = expert_ids.shape
        routes = self._directory.routes(layer)
        expert_ids = expert_ids.cpu().contiguous()
        counts, calls = self._pairs.divide(expert_ids, routes, self._links.avoided, self._reading)
        rows = torch.empty(
            tokens * top_k,
            hidden.shape[1],
            dtype=hidden.dtype,
            device=hidden.device,
            pin_memory=not hidden.is_cuda and hidden.is_pinned(),  # it came from a GPU, and they are to go there
        )
        ticket = _Ticket(layer, first_row, hidden, expert_ids, counts, rows)
        with self._giving_up():
            self._open.append(ticket)
            for call in calls:
                self._send(ticket, _Pending(call, attempt=0))
        self.meter.dispatched(layer, counts, time.monotonic() - started)
        return ticket

    def uses_our_cores(self, ticket: _Ticket) -> bool:
        links = [pending.link for pending in ticket.pending.values()]
        return any(link is not None and link.peer_node_id == self._node_with_our_cores for link in links)

    def combine(self, ticket: _Ticket) -> Tensor:
        """Raises StepInterruptedError when experts are away and a request of the batch ended meanwhile, and
        ExpertsCrashedError when a token has crashed shards twice."""
        started = time.monotonic()
        with self._giving_up():
            while ticket.pending:
                if any(pending.link is None for pending in ticket.pending.values()):
                    self._send_again(ticket)
                self._collect(ticket)
                self._hedge(ticket)
                if ticket.pending and time.monotonic() - started > _PATIENCE_SECONDS and self._interrupted():
                    raise StepInterruptedError(
                        "a request of this batch ended while experts were away; run the step again"
                    )
        self._open.remove(ticket)
        self.meter.combined(time.monotonic() - started)
        tokens, top_k = ticket.expert_ids.shape
        return ticket.rows.view(tokens, top_k, -1)

    def close(self) -> None:
        self._links.close()

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """What fails ends the step: the answers to its other tickets are not waited for."""
        try:
            yield
        except BaseException:
            self._open.clear()
            raise

    def _send(self, ticket: _Ticket, pending: _Pending) -> None:
        """Register the call and send it if its shard can be reached."""
        self._sequence += 1
        ticket.pending[self._sequence] = pending
        link = self._links.get(pending.call.shard)
        if link is None:
            return
        frame = call_frame(
            pending.call,
            self._pairs.pick(ticket.hidden, pending.call.token_rows),
            ticket.layer,
            self._sequence,
            pending.attempt,
            self._incarnation,
            self._directory.version,
            pending.flags,
            link.takes_tensors,
        )
        try:
            link.send(frame)
        except LinkError as error:
            self._read(link, pending.call.shard)  # what it has answered came before its end
            if link in self._links.open:
                self._drop(pending.call.shard, error)
            return
        pending.link, pending.sent = link, time.monotonic()
        self.num_frames += 1
        self.num_frames_resent += pending.attempt > 0

    def _send_again(self, ticket: _Ticket) -> None:
        """Plan what was not delivered anew, under the newest table and without the shards that are away."""
        self._ask_for_news()
        version = self._directory.version
        for sequence in [sequence for sequence, pending in ticket.pending.items() if pending.link is None]:
            self._plan_again(ticket, sequence)
        if any(pending.link is None for pending in ticket.pending.values()):
            self._directory.wait_newer(version, _POLL_SECONDS)

    def _plan_again(self, ticket: _Ticket, sequence: int) -> None:
        """What has crashed a shard is answered token by token from now on, to learn which one if it crashes again."""
        pending = ticket.pending.pop(sequence)
        flags = pending.flags & ONE_BY_ONE or (ONE_BY_ONE if pending.crashed else 0)
        self._plan(ticket, pending.places, pending.attempt + 1, flags)

    def _plan(self, ticket: _Ticket, places: Tensor, attempt: int, flags: int) -> None:
        routes = self._directory.routes(ticket.layer)
        shards = self._pairs.choose(routes, ticket.counts, self._links.avoided | ticket.refused, self._reading)
        for call in self._pairs.plan(ticket.expert_ids, shards, places):
            self._send(ticket, _Pending(call, attempt, flags))

    def _hedge(self, ticket: _Ticket) -> None:
        """A call that is overdue goes elsewhere if others have all of its experts; its own answer is then dropped."""
        now = time.monotonic()
        late = [
            number
            for number, pending in ticket.pending.items()
            if pending.link and pending.sent < now - self._patience.seconds(len(pending.places))
        ]
        for sequence in late:
            call = ticket.pending[sequence].call
            avoid = self._links.avoided | ticket.refused | {call.shard}
            if self._directory.routes(ticket.layer).has_other(call.pair_experts, avoid).all():
                self._links.suspect(call.shard)
                self.num_frames_hedged += 1
                self._plan_again(ticket, sequence)

    def _collect(self, ticket: _Ticket) -> None:
        """Take the answers that are there; wait a moment for the first. Late ones of other calls are read as well."""
        links = self._links.open
        for pending in ticket.pending.values():
            if pending.link not in links:  # given up for a newer process
                pending.link = None
        unsent = any(pending.link is None for pending in ticket.pending.values())
        by_fileno = {link.fileno(): (link, shard) for link, shard in links.items()}
        poller = select.poll()
        for fileno in by_fileno:
            poller.register(fileno, select.POLLIN)
        for fileno, _ in poller.poll(0 if unsent else int(_POLL_SECONDS * 1000)):
            self._read(*by_fileno[fileno])

    def _read(self, link: Link, shard: int) -> None:
        """Take what has come over a link; at its end, drop it."""
        try:
            while (frame := link.receive(0)) is not None:
                self._links.heard(shard)
                self._take(frame)
        except LinkError as error:
            self._drop(shard, error)

    def _take(self, frame: Frame) -> None:
        with frame:
            ticket = next((ticket for ticket in self._open if frame.sequence in ticket.pending), None)
            if ticket is None or frame.incarnation != self._incarnation:
                return  # a late answer to a call that was sent again, or to a step that was given up
            pending = ticket.pending[frame.sequence]
            if frame.kind is FrameKind.EXPERT_REPLY:
                if frame.num_rows < pending.answered:
                    return  # a part of an answer that came before
                if frame.num_rows > pending.answered:
                    raise LinkError(f"an answer goes on at pair {frame.num_rows}, {pending.answered} have come")
                self._take_rows(ticket, frame.sequence, pending, read_reply(frame, ticket.hidden.shape[1]))
            elif frame.kind is FrameKind.STALE:
                ticket.refused.add(pending.call.shard)
                pending.link = None  # goes to another one, or waits until the router has told where the experts are
            elif frame.kind is FrameKind.ERROR:
                sentence = bytes(frame.payload).decode(errors="replace")
                raise UnavailableError(f"expert shard {pending.call.shard} failed: {sentence}")

    def _take_rows(self, ticket: _Ticket, sequence: int, pending: _Pending, rows: Tensor) -> None:
        """An answer, or the next part of one that comes token by token."""
        pending.is_computing = not len(rows)
        places = pending.places[: len(rows)]
        if len(places) < len(rows) or (len(rows) < len(pending.places) and not pending.flags & ONE_BY_ONE):
            raise LinkError(f"an expert reply has {len(rows)} rows, {len(pending.places)} were wanted")
        now = time.monotonic()
        self._patience.answered(now - pending.sent, len(rows))
        pending.sent = now
        if pending.is_computing:
            return
        finite = self._pairs.put(rows, places, ticket.rows)
        if not finite and self._has_gone_wrong(ticket, pending, places, rows):
            del ticket.pending[sequence]
            self._plan(ticket, pending.places, pending.attempt + 1, pending.flags | RELOAD)
            return
        pending.answered += len(rows)
        if pending.answered == len(pending.call.places):
            del ticket.pending[sequence]

    def _has_gone_wrong(self, ticket: _Ticket, pending: _Pending, places: Tensor, rows: Tensor) -> bool:
        """Whether finite inputs gave these rows [P, H], which are not: the shard's weights are to be read anew.

        If the rows are the same after that, the model gives them; the requests they belong to end with an error.
        """
        if pending.flags & RELOAD or not ticket.hidden[ticket.token_of(places)].isfinite().all():
            return False
        wrong = ticket.expert_ids.flatten()[places[~rows.isfinite().all(dim=1).cpu()]].unique().tolist()
        logger.error(
            "experts %s of layer %d on shard %d gave values that are not finite; they are read anew",
            wrong,
            ticket.layer,
            pending.call.shard,
        )
        self.num_experts_wrong += len(wrong)
        return True

    def _drop(self, shard: int, error: Exception) -> None:
        """Give a link up; what was sent over it and not answered goes elsewhere, or waits.

        A shard computes the calls of one link one after the other: it has died over the first without an answer, if
        over any, or over another worker's. So this one is computed token by token from now on.
        """
        link = self._links.drop(shard, error)
        if link is None:
            return
        died = isinstance(error, LinkClosedError) and not isinstance(error, LinkLostError)
        sent = [(number, ticket, call) for ticket in self._open for number, call in ticket.pending.items()]
        for _, ticket, pending in sorted(sent, key=lambda each: each[0]):
            if pending.link is not link:
                continue
            if died and pending.is_computing:
                raise ExpertsCrashedError(
                    f"computing one of its tokens in layer {ticket.layer} has crashed the process of its experts "
                    f"twice, last shard {shard}'s",
                    row=ticket.first_row + int(ticket.token_of(pending.places[0])),
                )
            pending.link, pending.crashed, died = None, died, False
