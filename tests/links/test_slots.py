from __future__ import annotations

import random

import pytest

from deepseek_ray.errors import LinkError
from deepseek_ray.links.slots import ReceiveSlots, SendSlots


def test_the_last_slot_back_is_the_next_one_used() -> None:
    slots = SendSlots(3)
    assert [slots.take(), slots.take()] == [0, 1]
    slots.give_back([0])
    assert slots.take() == 0
    assert slots.take() == 2
    assert not slots


def test_a_slot_that_is_not_away_cannot_come_back() -> None:
    slots = SendSlots(2)
    slots.take()
    slots.give_back(b"\0")
    for slot in (0, 1, 7):
        with pytest.raises(LinkError, match=f"released slot {slot}"):
            slots.give_back([slot])


def test_a_notice_is_due_once_half_of_the_slots_are_here() -> None:
    slots = ReceiveSlots()
    slots.open(4)
    slots.receive(0)
    slots.release(0)
    assert not slots.due  # one of four: it rides on the next record
    slots.receive(1)
    assert slots.due
    assert slots.take_notice() == b"\0"
    assert not slots.due
    assert slots.take_notice() == b""


@pytest.mark.parametrize("slot", [-1, 4, 2])
def test_a_slot_that_the_peer_cannot_mean_is_refused(slot: int) -> None:
    slots = ReceiveSlots()
    slots.open(4)
    slots.receive(2)
    with pytest.raises(LinkError, match=f"sent slot {slot}"):
        slots.receive(slot)


def test_a_notice_that_was_not_sent_is_due_again() -> None:
    slots = ReceiveSlots()
    slots.open(2)
    slots.receive(1)
    slots.release(1)
    slots.restore(slots.take_notice())
    assert slots.due
    with pytest.raises(LinkError):
        slots.receive(1)  # the peer has not heard of the release, so it cannot reuse the slot
    assert slots.take_notice() == b"\1"


def test_a_sender_out_of_slots_hears_of_every_release() -> None:
    """Both ends against each other: whenever no slot is free and the reader has released one, a notice is due."""
    chance = random.Random(3)
    for num_slots in (1, 2, 3, 8):
        sender, reader, held = SendSlots(num_slots), ReceiveSlots(), []
        reader.open(num_slots)
        for _ in range(500):
            if sender and chance.random() < 0.6:
                held.append(sender.take())
                reader.receive(held[-1])
            elif held:
                reader.release(held.pop(chance.randrange(len(held))))
                if not sender:
                    assert reader.due
            if reader.due or chance.random() < 0.1:
                sender.give_back(reader.take_notice())
