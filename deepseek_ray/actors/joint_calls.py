"""Expert calls of several attention workers at one shard: those of a layer that wait are computed together.

A shard that serves many workers is bound by reading weights. While it computes, calls of others arrive; whoever is next
takes all that wait for the same layer, so the weights of an expert are read once for them. No row depends on the rows
beside it, so the bits are those of calls computed one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_ray.actors.expert_frames import CallContent

Compute = Callable[[int, CallContent], Tensor | None]
"""Layer and call -> one row per pair, None when an expert is not here."""


@dataclass
class _Waiting:
    layer: int
    content: CallContent
    is_done: bool = False
    rows: Tensor | None = None
    error: Exception | None = None


class JointCalls:
    """One computation at a time. `run` is called by one thread per link."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._computing = threading.Lock()
        self._changing = threading.Lock()
        self._waiting: list[_Waiting] = []
        self.num_computations = 0

    def run(self, layer: int, content: CallContent) -> Tensor | None:
        """What `compute` gives for this call. Its exception is that of every call it was computed with."""
        own = _Waiting(layer, content)
        with self._changing:
            self._waiting.append(own)
        with self._computing:
            if not own.is_done:
                self._run(self._take(layer))
        if own.error is not None:
            raise own.error
        return own.rows

    @contextmanager
    def alone(self) -> Iterator[Compute]:
        """What computes a call together with no other one: what happens meanwhile is that call's doing."""
        with self._computing:
            yield self._once

    def _take(self, layer: int) -> list[_Waiting]:
        with self._changing:
            taken = [call for call in self._waiting if call.layer == layer]
            self._waiting = [call for call in self._waiting if call.layer != layer]
        return taken

    def _run(self, calls: Sequence[_Waiting]) -> None:
        layer = calls[0].layer
        try:
            rows = self._once(layer, _joined([call.content for call in calls]))
            if rows is not None:
                parts = rows.split([len(call.content.pair_rows) for call in calls])
                for call, part in zip(calls, parts, strict=True):
                    call.rows = part
            elif len(calls) > 1:  # an expert of one of them is not here; the others may be answered
                for call in calls:
                    call.rows = self._once(layer, call.content)
        except Exception as error:
            for call in calls:
                call.error = error
        finally:
            for call in calls:
                call.is_done = True

    def _once(self, layer: int, content: CallContent) -> Tensor | None:
        self.num_computations += 1
        return self._compute(layer, content)


def _joined(contents: Sequence[CallContent]) -> CallContent:
    """All calls as one; the pairs stay in order."""
    if len(contents) == 1:
        return contents[0]
    hidden, pair_rows, first = [], [], 0
    for content in contents:
        hidden.append(content.hidden.to(contents[0].hidden.device))  # some came over NCCL, others did not
        pair_rows.append(content.pair_rows + first)
        first += len(content.hidden)
    return CallContent(torch.cat(hidden), torch.cat(pair_rows), torch.cat([own.pair_experts for own in contents]))
