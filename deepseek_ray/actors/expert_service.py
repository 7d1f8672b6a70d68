"""What an expert shard does, without Ray: hold some experts and answer calls over links."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepseek_ray.actors.expert_frames import (
    ONE_BY_ONE,
    RELOAD,
    CallContent,
    answer,
    one_by_one,
    read_call,
    reply_frame,
)
from deepseek_ray.actors.joint_calls import JointCalls
from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import Listener
from deepseek_ray.links.frame import Frame, FrameKind
from deepseek_ray.models.expert_store import ExpertStore

logger = logging.getLogger(__name__)


class ExpertService:
    """Answers expert calls on every link a listener accepts; one thread per link, one computation at a time.

    Calls of one layer that wait are computed together (`JointCalls`).
    """

    def __init__(self, listener: Listener, store: ExpertStore, hidden_size: int) -> None:
        self._listener = listener
        self._hidden_size = hidden_size
        self._store = store
        self.calls = JointCalls(self._compute)
        self.num_calls = 0
        self.num_pairs = 0
        self.num_reloaded = 0
        """Experts whose weights in memory were found wrong."""
        self.compute_seconds = 0.0

    def start(self) -> None:
        _start_thread(self._accept, "accept")

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept(timeout=None)
            except LinkClosedError:
                return
            if link is not None:
                _start_thread(functools.partial(self._serve, link), f"serve {link.peer}")

    def _serve(self, link: Link) -> None:
        with link:
            try:
                while True:
                    frame = link.receive()
                    if frame is not None:
                        with frame:
                            for reply in self._answer(frame, link.takes_tensors):
                                link.send(reply)
            except LinkClosedError:
                logger.info("%s is gone", link.peer)
            except LinkError as error:
                logger.warning("link to %s closed: %s", link.peer, error)

    def _answer(self, frame: Frame, by_tensor: bool) -> Iterator[Frame]:
        if frame.kind is FrameKind.PING:
            yield answer(frame, FrameKind.PONG)
            return
        if frame.kind is not FrameKind.EXPERT_CALL:
            raise LinkError(f"an expert shard got a {frame.kind.name} frame; it takes EXPERT_CALL and PING")
        content = read_call(frame, self._hidden_size)
        if frame.flags & RELOAD:
            for expert in set(content.pair_experts.tolist()):
                logger.error(
                    "expert %d of layer %d gave values that are not finite; reading it anew", expert, frame.layer
                )
                self._store.reload(frame.layer, expert)
                self.num_reloaded += 1
        self.num_calls += 1
        if frame.flags & ONE_BY_ONE:
            yield from self._answer_one_by_one(frame, content, by_tensor)
            return
        rows = self.calls.run(frame.layer, content)
        yield answer(frame, FrameKind.STALE) if rows is None else reply_frame(frame, rows, by_tensor=by_tensor)

    def _answer_one_by_one(self, frame: Frame, content: CallContent, by_tensor: bool) -> Iterator[Frame]:
        """Before each row an empty answer: if this process dies now, it is over that row."""
        answered = 0
        for part in one_by_one(content):
            with self.calls.alone() as compute:
                yield reply_frame(frame, part.hidden[:0], answered, by_tensor)
                rows = compute(frame.layer, part)
            if rows is None:
                yield answer(frame, FrameKind.STALE)
                return
            yield reply_frame(frame, rows, answered, by_tensor)
            answered += len(rows)

    def _compute(self, layer: int, content: CallContent) -> Tensor | None:
        """None when an expert is not here."""
        with torch.inference_mode():
            started = time.monotonic()
            rows = self._store.run(layer, content.hidden, content.pair_rows, content.pair_experts)
            if rows is not None:
                self.compute_seconds += time.monotonic() - started
                self.num_pairs += len(rows)
            return rows


def _start_thread(run: Callable[[], None], name: str) -> None:
    threading.Thread(target=run, name=name, daemon=True).start()
