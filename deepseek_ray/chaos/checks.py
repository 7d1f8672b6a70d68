"""Whether a run kept the promises, from its history alone: pure functions.

The promises: no token is lost, repeated, reordered or different from the undisturbed run; every call ends, without an
error, by its deadline; when all are over, no member still works for one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from deepseek_ray.chaos.history import Call, Fault, History, Reference

DEADLINE_GRACE_SECONDS = 1.0
DESCRIPTOR_GRACE = 32
"""Links that were made since then (about five descriptors each, copies of cache blocks have their own), and Ray's."""
STALL_WINDOW_SECONDS = 60.0
"""A gap that begins later than this after a fault is not the fault's."""
_MUST_BE_ZERO = ("num_running", "num_waiting", "num_kv_blocks_used", "in_flight")


class Violation(msgspec.Struct, frozen=True):
    """A promise that was not kept."""

    kind: str
    """"order", "token", "logprob", "failed", "late", "unfinished" or "left over"."""
    where: str
    detail: str


def check(history: History, references: Sequence[Reference]) -> list[Violation]:
    """Every promise that the run broke, in order of the calls."""
    found = [violation for call in history.calls for violation in _check_call(call, references[call.case])]
    strays = [Violation("left over", stray, "it runs beside the members") for stray in history.strays]
    return [*found, *_check_counters(history), *_check_descriptors(history), *strays]


def stall(call: Call, fault: Fault) -> float | None:
    """Seconds by which the fault held a stream up: its largest gap that overlaps the fault or begins soon after it,
    less its median gap before. None when the stream had not begun, or was over."""
    times = [arrival.time for arrival in call.arrivals]
    before = [b - a for a, b in pairwise(times) if b <= fault.struck]
    after = [b - a for a, b in pairwise(times) if b > fault.struck and a < fault.healed + STALL_WINDOW_SECONDS]
    if len(before) < 2 or not after:
        return None
    return max(0.0, max(after) - statistics.median(before))


def stalls(history: History) -> list[float]:
    """Of every stream that the run's first fault found in mid-generation."""
    if not history.faults:
        return []
    found = (stall(call, history.faults[0]) for call in history.calls)
    return [seconds for seconds in found if seconds is not None]


def gaps_before_and_during(history: History) -> tuple[list[float], list[float]]:
    """Seconds between tokens of one stream: before the run's first fault, and while the nemesis acted."""
    if not history.faults:
        return [], []
    struck, healed = history.faults[0].struck, history.faults[-1].healed
    before, during = [], []
    for call in history.calls:
        for a, b in pairwise(arrival.time for arrival in call.arrivals):
            if b <= struck:
                before.append(b - a)
            elif a < healed:
                during.append(b - a)
    return before, during


def first_token_seconds(history: History) -> list[float]:
    """Of every call that was sent after the run's first fault struck."""
    if not history.faults:
        return []
    struck = history.faults[0].struck
    return [call.arrivals[0].time - call.sent for call in history.calls if call.arrivals and call.sent >= struck]


def _check_call(call: Call, reference: Reference) -> Iterator[Violation]:
    place = 0
    for arrival in call.arrivals:
        if arrival.index != place:
            verb = "came again" if arrival.index < place else "is missing"
            yield Violation("order", call.request_id, f"token {min(arrival.index, place)} {verb}")
            break
        end = place + len(arrival.token_ids)
        wanted, logprobs = reference.token_ids[place:end], reference.logprobs[place:end]
        if arrival.token_ids != wanted:
            yield Violation("token", call.request_id, f"at {place}: {arrival.token_ids}, not {wanted}")
            break
        if arrival.logprobs != logprobs:
            yield Violation("logprob", call.request_id, f"at {place}: {arrival.logprobs}, not {logprobs}")
            break
        place = end
    else:
        if call.ended is not None and call.error is None and place != len(reference.token_ids):
            yield Violation("order", call.request_id, f"ended after {place} of {len(reference.token_ids)} tokens")
    if call.error is not None:
        yield Violation("failed", call.request_id, call.error)
    if call.ended is None:
        yield Violation("unfinished", call.request_id, "it never ended")
    elif call.ended > call.deadline + DEADLINE_GRACE_SECONDS:
        yield Violation("late", call.request_id, f"it ended {call.ended - call.deadline:.1f} s after its deadline")


def _check_descriptors(history: History) -> Iterator[Violation]:
    for member, (before, after) in history.descriptors.items():
        if after - before > DESCRIPTOR_GRACE:
            yield Violation("left over", member, f"it has {after} open descriptors, {before} before the run")


def _check_counters(history: History) -> Iterator[Violation]:
    for member, figures in history.counters.items():
        for name in _MUST_BE_ZERO:
            if figures.get(name):
                yield Violation("left over", member, f"{name} is {figures[name]:g} when every call is over")
