"""Brings what a shard holds to what it shall hold, beside the calls it answers."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from deepseek_ray.models.expert_store import ExpertStore

logger = logging.getLogger(__name__)

_AHEAD_SECONDS = 1.0
"""How often a standby looks for experts that others have packed."""

Held = Mapping[int, Sequence[int]]
"""layer -> logical experts."""


class ExpertLoader:
    """Loads first and drops last, in a thread of its own; `changed` is called when it has come to rest.

    What cannot be loaded is in `error`; the next `want` tries again.
    """

    def __init__(
        self,
        store: ExpertStore,
        changed: Callable[[], None],
        measure: Callable[[], float] = lambda: 0.0,
        ahead_bytes: float = 0.0,
        begin_at: float = 0.0,
    ) -> None:
        """`measure` is called in the thread once there are experts; its result is `measured`, until then 0.

        `ahead_bytes`: while it holds none, how much to map ahead of what others have packed. `begin_at`: with which
        part of what is wanted it begins, 0 to 1; shards that begin with different experts find those that they share
        packed by each other.
        """
        self._ahead_bytes = ahead_bytes
        self._store = store
        self._begin_at = begin_at
        self._measure = measure
        self.measured = 0.0
        self._changed = changed
        self._news = threading.Condition()
        self._target: Held | None = None
        self._done: Held | None = None
        self.error: str | None = None
        self.has_loaded = False
        """Whether a first target was reached."""
        threading.Thread(target=self._run, name="load experts", daemon=True).start()

    def want(self, held: Held) -> None:
        """Hold exactly these experts, soon. Called again and again with the same ones, it does nothing."""
        with self._news:
            if held != self._target or self.error:
                self._target = held
                self._news.notify()

    def _run(self) -> None:
        torch.set_num_threads(1)  # of this thread: packing must not take the cores from the calls
        while True:
            target = self._next_target()
            try:
                if not self._approach(target):
                    continue
                self.error, self.has_loaded = None, True
            except Exception as error:  # reported; what is held already is served on
                logger.exception("cannot hold the assigned experts")
                self.error = str(error)
            self._done = target
            self._changed()
            if self.error is None:
                self._store.forget_ahead()  # after the news: giving back gigabytes takes tens of milliseconds
            if not self.measured:  # after the news: whoever waits for these experts does not wait for this
                self.measured = self._measure()

    def _next_target(self) -> Held:
        """Waits for one; meanwhile a process without experts prepares to stand in for another."""
        while True:
            with self._news:
                if self._news.wait_for(lambda: self._target is not self._done, _AHEAD_SECONDS):
                    assert self._target is not None
                    return self._target
            if self.has_loaded and not self._store.held:
                self._store.map_ahead(self._ahead_bytes)

    def _approach(self, target: Held) -> bool:
        """False when another target came in between."""
        wanted = [(layer, expert) for layer, experts in target.items() for expert in experts]
        first = int(self._begin_at * len(wanted))
        with contextlib.closing(self._store.load_all([*wanted[first:], *wanted[:first]])) as loading:
            for _ in loading:
                if self._target is not target:
                    return False
        for layer, experts in self._store.held.items():
            for expert in set(experts) - set(target.get(layer, ())):
                self._store.drop(layer, expert)
        return True
