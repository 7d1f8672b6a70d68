"""Who still wants a deployment, by a clock made of numbers."""

from __future__ import annotations

from deepseek_ray.control.lease import Leases

TIMEOUT = 30.0


def leases() -> Leases:
    return Leases(TIMEOUT, started=0.0)


def asked_every_second(state: Leases, start: int, stop: int) -> list[bool]:
    return [state.orphaned(float(now)) for now in range(start, stop)]


def test_an_owner_that_renews_keeps_it() -> None:
    state = leases()
    for now in range(100):
        state.renew("a", float(now))
        assert not state.orphaned(float(now))


def test_silent_owners_lose_it_after_the_time_out() -> None:
    state = leases()
    assert not any(asked_every_second(state, 0, 10))
    state.renew("a", 10.0)
    state.renew("b", 20.0)
    assert not any(asked_every_second(state, 10, 51))
    assert state.orphaned(51.0)


def test_nobody_ever_came() -> None:
    state = leases()
    assert not any(asked_every_second(state, 0, 31))
    assert state.orphaned(31.0)


def test_the_last_release_ends_it_at_once() -> None:
    state = leases()
    state.renew("a", 1.0)
    state.renew("b", 1.0)
    state.release("a")
    assert not state.orphaned(2.0)
    state.release("b")
    assert state.orphaned(3.0)


def test_an_unknown_release_changes_nothing() -> None:
    state = leases()
    state.release("a")
    assert not state.orphaned(1.0)


def test_time_in_which_the_router_was_away_does_not_count() -> None:
    """It was stopped, or cut off: owners could not reach it, and one that lives renews soon after."""
    state = leases()
    assert not any(asked_every_second(state, 0, 10))
    state.renew("a", 9.0)
    assert not any(asked_every_second(state, 10, 12))
    assert not state.orphaned(100.0)
    assert not any(asked_every_second(state, 101, 128))
    assert state.orphaned(129.0), "thirty seconds, of which two were before"


def test_a_router_that_was_away_before_its_first_owner_came() -> None:
    state = leases()
    assert not state.orphaned(60.0)
    assert not any(asked_every_second(state, 60, 91))
    assert state.orphaned(92.0)
