"""What clients and the nemesis write down during a run. Times are seconds of one monotonic clock."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Arrival(msgspec.Struct, frozen=True):
    """Tokens of one event, as they came."""

    time: float
    index: int
    """Place in the output of the first of them, as the event says."""
    token_ids: list[int]
    logprobs: list[float]
    """Of the same tokens, bit for bit as computed."""


class Call(msgspec.Struct):
    """One request from its sending to its end."""

    request_id: str
    case: int
    """Which of the run's cases it is: the place of its reference."""
    sent: float
    deadline: float
    """When it must be over."""
    arrivals: list[Arrival] = []
    ended: float | None = None
    """None: it never ended."""
    finish_reason: str | None = None
    error: str | None = None


class Fault(msgspec.Struct):
    """One thing that the nemesis did."""

    name: str
    target: str
    struck: float
    healed: float
    """When the nemesis was done with it; equal to `struck` for what happens at once."""


class Reference(msgspec.Struct, frozen=True):
    """What a case must give: computed by one process that nobody disturbs."""

    token_ids: list[int]
    logprobs: list[float]


class History(msgspec.Struct):
    """Everything that one run was seen to do."""

    seed: int
    calls: list[Call] = []
    faults: list[Fault] = []
    counters: dict[str, dict[str, float]] = {}
    """`role/id` -> figures of each member when all calls were over."""
    descriptors: dict[str, tuple[int, int]] = {}
    """`role/id` -> open descriptors of each member's process before the run and after it; of those that live on."""
    strays: list[str] = []
    """Processes that a fault left behind: members' by name, and not the members."""

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))


def read_history(path: Path) -> History:
    return msgspec.json.decode(path.read_bytes(), type=History)
