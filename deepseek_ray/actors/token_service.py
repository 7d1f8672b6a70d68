"""What an attention worker does, without Ray: take requests from links, step the engine, stream tokens back.

Reader threads put messages into an inbox; one loop thread owns the engine. All events of a step for one client travel
in one frame.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import msgspec

from deepseek_ray.actors.expert_client import StepInterruptedError
from deepseek_ray.actors.kv_copies import CopyInbox
from deepseek_ray.engine.engine import Engine
from deepseek_ray.errors import DeepSeekRayError, LinkClosedError, LinkError, RequestError
from deepseek_ray.links.base import Link
from deepseek_ray.links.connect import Listener
from deepseek_ray.links.frame import Frame, FrameKind, message_frame, read_message
from deepseek_ray.messages import AbortRequest, ClientMessage, GenerateRequest, TokenEvent, TokenEvents

logger = logging.getLogger(__name__)

_DECODER: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)


class _LinkLost(msgspec.Struct, frozen=True):
    """In the inbox: the client behind a link is gone."""


class _CopyCame(msgspec.Struct, frozen=True):
    """In the inbox of an idle engine: there is a copy of a block to take in."""


_Message = GenerateRequest | AbortRequest | _LinkLost | _CopyCame
_Item = tuple[Link, _Message]


class TokenService:
    """Serves requests on every link the listener accepts.

    `fatal` is called when the engine loop cannot go on, `after_step` after each step of the engine. With `keep_copies`
    other workers may send copies of their cache blocks, which then are in the engine's prefix cache.
    """

    def __init__(
        self,
        listener: Listener,
        fatal: Callable[[BaseException], None],
        after_step: Callable[[], None] = lambda: None,
        keep_copies: bool = False,
    ) -> None:
        self._listener = listener
        self._fatal = fatal
        self._after_step = after_step
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._owners: dict[str, Link] = {}
        self._engine: Engine | None = None
        self._keep_copies = keep_copies
        self.copies: CopyInbox | None = None
        """With `keep_copies`, from `start` on."""
        self._idle = False

    def start(self, engine: Engine) -> None:
        """Begin to accept clients; until now they wait in the listener's queue."""
        self._engine = engine
        self.copies = CopyInbox(engine.copies.shape) if self._keep_copies else None
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def interrupted(self) -> bool:
        """Whether a step that is stuck should be given up: somebody left, or a deadline passed."""
        assert self._engine is not None
        deadline = self._engine.next_deadline
        return not self._inbox.empty() or (deadline is not None and time.monotonic() >= deadline)

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept(timeout=None)
            except LinkClosedError:
                return
            if link is not None:
                threading.Thread(target=self._read, args=(link,), name=f"read {link.peer}", daemon=True).start()

    def _read(self, link: Link) -> None:
        try:
            while True:
                frame = link.receive()
                if frame is None:
                    continue
                if frame.kind is FrameKind.BYE:
                    break
                if frame.kind is FrameKind.KV_BLOCK:
                    self._keep(link, frame)
                    continue
                message = read_message(frame, _DECODER)
                self._compile(message)
                self._inbox.put((link, message))
        except LinkClosedError:
            pass
        except LinkError as error:
            logger.warning("link to %s closed: %s", link.peer, error)
        self._inbox.put((link, _LinkLost()))

    def _keep(self, link: Link, frame: Frame) -> None:
        """Hand a copy to the engine's thread. It is not worth interrupting a step: only an idle engine is woken."""
        if self.copies is None:
            raise LinkError("a copy of a cache block came and this worker keeps none; run one configuration everywhere")
        self.copies.put(frame)
        if self._idle:
            self._inbox.put((link, _CopyCame()))

    def _compile(self, message: ClientMessage) -> None:
        """Compile a structured output's constraint here, in a reader's thread: other sequences go on meanwhile."""
        assert self._engine is not None
        if isinstance(message, GenerateRequest) and message.params.structured_outputs and self._engine.grammars:
            with contextlib.suppress(RequestError):  # the engine says it again, to the client
                self._engine.grammars.start(message.params.structured_outputs)

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except BaseException as error:
            logger.exception("the engine loop ends")
            self._fatal(error)

    def _turn(self) -> None:
        """Take in what arrived (waiting for it when idle), run one step, send what it added."""
        engine = self._engine
        assert engine is not None
        self._idle = not engine.has_work
        # In this order: whose copy is not seen here sees `_idle` and wakes this thread.
        self._drain(block=self._idle and not (self.copies and self.copies.has_any))
        if self.copies:
            self.copies.take_in(engine.copies)  # before a request that they are for is admitted
        if not engine.has_work:
            return
        self._idle = False
        try:
            self._send(engine.step())
        except StepInterruptedError as error:
            logger.info("%s", error)
        self._after_step()

    def _drain(self, block: bool) -> None:
        while block or not self._inbox.empty():
            self._handle(*self._inbox.get())
            block = False

    def _handle(self, link: Link, message: _Message) -> None:
        engine = self._engine
        assert engine is not None
        if isinstance(message, GenerateRequest):
            try:
                engine.add_request(message)
                self._owners[message.request_id] = link
            except DeepSeekRayError as error:
                self._send_to(link, [_refusal(message, error)])
        elif isinstance(message, AbortRequest):
            engine.abort(message.request_id)
        elif isinstance(message, _LinkLost):
            for request_id in [id for id, owner in self._owners.items() if owner is link]:
                del self._owners[request_id]
                engine.abort(request_id)
            link.close()

    def _send(self, events: list[TokenEvent]) -> None:
        by_link: dict[Link, list[TokenEvent]] = defaultdict(list)
        for event in events:
            link = self._owners.get(event.request_id)
            if event.finish_reason is not None:
                self._owners.pop(event.request_id, None)
            if link is not None:
                by_link[link].append(event)
        for link, batch in by_link.items():
            self._send_to(link, batch)

    def _send_to(self, link: Link, events: list[TokenEvent]) -> None:
        try:
            link.send(message_frame(TokenEvents(events)))
        except LinkError as error:
            logger.info("client %s is gone: %s", link.peer, error)
            self._inbox.put((link, _LinkLost()))


def _refusal(request: GenerateRequest, error: DeepSeekRayError) -> TokenEvent:
    return TokenEvent(
        request_id=request.request_id,
        attempt=request.attempt,
        index=len(request.output_token_ids),
        finish_reason="error",
        error=str(error),
        error_kind=type(error).__name__,
    )
