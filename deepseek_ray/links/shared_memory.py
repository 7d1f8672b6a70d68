"""A link on one node (Linux): records over a UNIX socket, payloads in slots of shared memory.

Each side owns the slots that it sends with (arena.py) and passes their memfd over with its first large payload. The
socket carries records: who, which slot, which slots of yours are free again - and with that the wake-ups and the end of
file. A record is

    kind, number of released slots, slot, bytes | released slots, 1 byte each | frame header | inline payload

with a frame header in INLINE and SLOT records only. A payload of up to `inline_bytes` rides inline; one of up to a slot
is read where it lies; a larger one goes through the slots piece by piece (a SLOT record, then CHUNK records) and is
copied together by the reader, while slots become free again.
"""

from __future__ import annotations

import os
import socket
import struct
import time

from deepseek_ray.errors import LinkClosedError, LinkError
from deepseek_ray.links.arena import Arena, create_arena, map_arena
from deepseek_ray.links.base import LinkLimits
from deepseek_ray.links.channel import Channel, ReadBuffer
from deepseek_ray.links.frame import (
    HEADER_BYTES,
    Frame,
    check_payload_bytes,
    decode_header,
    encode_header,
    flatten_payload,
)
from deepseek_ray.links.handshake import Identity
from deepseek_ray.links.slots import ReceiveSlots, SendSlots
from deepseek_ray.links.stream import StreamLink

_RECORD = struct.Struct("<BBHI")
_INLINE, _SLOT, _CHUNK, _RELEASE, _ARENA = range(1, 6)
_BUFFER_BYTES = 1 << 16  # holds the largest record: MAX_INLINE_BYTES, MAX_SLOTS and the headers


class SharedMemoryLink(StreamLink):
    """See the module. The payload of a received frame may lie in the peer's slot: release it soon."""

    def __init__(self, sock: socket.socket, peer: Identity, limits: LinkLimits) -> None:
        super().__init__(Channel(sock), peer, "shared memory", limits)
        self._own: Arena | None = None  # made with the first payload that needs it
        self._own_slots = SendSlots(limits.num_slots)  # under the link's lock
        self._theirs: Arena | None = None
        self._their_slots = ReceiveSlots()
        self._descriptors: list[int] = []  # came over the socket, not yet claimed by an ARENA record
        self._buffer = ReadBuffer(_BUFFER_BYTES)
        self._split: tuple[Frame, memoryview, int] | None = None  # frame on its way in, its payload, bytes so far

    def send(self, frame: Frame) -> None:
        parts, payload_bytes = flatten_payload(frame.payload)
        check_payload_bytes(payload_bytes, self._limits.max_payload_bytes)
        header = encode_header(frame, payload_bytes)
        with self._send_lock:
            self._raise_failure()
            if payload_bytes <= self._limits.inline_bytes:
                self._write_record(_INLINE, 0, payload_bytes, header, parts)
            else:
                self._send_through_slots(header, parts)

    def _send_through_slots(self, header: bytes, parts: list[memoryview]) -> None:
        arena = self._own or self._open_arena()
        kind = _SLOT
        while parts:
            piece, parts, num_bytes = _cut(parts, arena.slot_bytes)
            slot = self._take_slot()
            arena.fill(slot, piece)
            self._write_record(kind, slot, num_bytes, header)
            kind, header = _CHUNK, b""

    def _open_arena(self) -> Arena:
        arena, descriptor = create_arena(self._limits.num_slots, self._limits.slot_bytes)
        try:
            with self._write_lock:
                self._write([_RECORD.pack(_ARENA, 0, arena.num_slots, arena.slot_bytes)], [descriptor])
        finally:
            os.close(descriptor)
        self._own = arena
        return arena

    def _take_slot(self) -> int:
        with self._lock:
            if not self._own_slots:
                deadline = time.monotonic() + self._limits.send_timeout_seconds
                while not self._own_slots:
                    self._raise_failure()
                    if not self._advance_sender(deadline) and not self._own_slots:
                        raise self._suspect(f"gave none of {self._limits.num_slots} slots back")
            return self._own_slots.take()

    def _write_record(
        self, kind: int, slot: int, num_bytes: int, header: bytes = b"", parts: list[memoryview] | None = None
    ) -> None:
        with self._write_lock:
            notice = self._their_slots.take_notice()
            self._write([_RECORD.pack(kind, len(notice), slot, num_bytes) + notice + header, *(parts or ())])
        self._announce_releases()

    def _release(self, slot: int) -> None:
        self._their_slots.release(slot)
        self._announce_releases()

    def _announce_releases(self) -> None:
        """Tell the peer now which slots it has back. Whoever writes at this moment does it afterwards instead.

        Never waits: when there is no room in the socket, the thread that reads does it once there is.
        """
        while self._their_slots.due and self._failure is None and self._write_lock.acquire(blocking=False):
            try:
                if self._failure is not None:  # closing takes the write lock, so the socket is open from here on
                    return
                notice = self._their_slots.take_notice()
                # a UNIX socket takes a record this small whole or not at all
                if not self._channel.write([_RECORD.pack(_RELEASE, len(notice), 0, 0) + notice]):
                    self._their_slots.restore(notice)
                    self._socket_wait.watch_output(True)
                    return
            except LinkClosedError:
                return  # whoever reads finds the end of the link, after the frames that came before it
            finally:
                self._write_lock.release()

    def _on_writable(self) -> None:
        super()._on_writable()
        self._announce_releases()

    def _read(self) -> None:
        count, descriptors = self._channel.read_with_descriptors(self._buffer.room)
        self._descriptors += descriptors
        self._buffer.filled += count
        start = 0
        while self._buffer.filled - start >= _RECORD.size and (size := self._read_record(start)):
            start += size
        self._buffer.drop(start)

    def _read_record(self, start: int) -> int:
        """Handle the record whose prefix is at `start` of the buffer; its size, or 0 when it is not all there yet."""
        view, available = self._buffer.view, self._buffer.filled - start
        kind, num_released, slot, num_bytes = _RECORD.unpack_from(view, start)
        with_header = kind in (_INLINE, _SLOT)
        payload_start = _RECORD.size + num_released + (HEADER_BYTES if with_header else 0)
        size = payload_start + (num_bytes if kind == _INLINE else 0)
        if size > _BUFFER_BYTES:
            raise LinkError(f"the peer sent a record of {size} bytes, the limit is {_BUFFER_BYTES}; it is out of step")
        if available < size:
            return 0
        if num_released:
            with self._lock:
                self._own_slots.give_back(view[start + _RECORD.size : start + _RECORD.size + num_released])
        if with_header:
            frame, payload_bytes = decode_header(
                view, start + payload_start - HEADER_BYTES, self._limits.max_payload_bytes
            )
            if self._split is not None or num_bytes > payload_bytes:
                raise LinkError(f"the peer sent {num_bytes} bytes where they cannot belong; the link is out of step")
            if kind == _SLOT:
                self._read_slot(frame, payload_bytes, slot, num_bytes)
            elif num_bytes == payload_bytes:
                frame.payload = memoryview(bytearray(view[start + payload_start : start + size]))
                self._deliver(frame, num_bytes)
            else:
                raise LinkError(f"the peer sent {num_bytes} inline bytes of {payload_bytes}; the link is out of step")
        elif kind == _CHUNK:
            self._read_chunk(slot, num_bytes)
        elif kind == _ARENA:
            self._read_arena(slot, num_bytes)
        elif kind != _RELEASE:
            raise LinkError(f"the peer sent a record of kind {kind}; known are 1 to {_ARENA}: the link is out of step")
        return size

    def _read_slot(self, frame: Frame, payload_bytes: int, slot: int, num_bytes: int) -> None:
        if num_bytes == payload_bytes:
            frame.payload = self._claim(slot, num_bytes)
            frame.on_release = lambda: self._release(slot)
            self._deliver(frame, 0)
        else:
            self._split = (frame, memoryview(bytearray(payload_bytes)), 0)
            self._read_chunk(slot, num_bytes)

    def _read_chunk(self, slot: int, num_bytes: int) -> None:
        piece = self._claim(slot, num_bytes)
        if self._split is None or self._split[2] + num_bytes > len(self._split[1]):
            raise LinkError(f"the peer sent {num_bytes} bytes beyond the end of a frame; the link is out of step")
        frame, payload, done = self._split
        end = done + num_bytes
        payload[done:end] = piece
        self._split = (frame, payload, end)
        if end == len(payload):
            self._split = None
            frame.payload = payload
            self._deliver(frame, end)
        self._release(slot)

    def _claim(self, slot: int, num_bytes: int) -> memoryview:
        if self._theirs is None or not 0 < num_bytes <= self._theirs.slot_bytes:
            raise LinkError(f"the peer announced {num_bytes} bytes in slot {slot}, more than a slot of its has")
        self._their_slots.receive(slot)
        return self._theirs.slot(slot, num_bytes)

    def _read_arena(self, num_slots: int, slot_bytes: int) -> None:
        if self._theirs is not None or len(self._descriptors) != 1:
            raise LinkError(f"the peer announced slots with {len(self._descriptors)} descriptors; a link has them once")
        self._theirs = map_arena(self._descriptors.pop(), num_slots, slot_bytes)
        self._their_slots.open(num_slots)

    def _free(self) -> None:
        for arena in (self._own, self._theirs):
            if arena is not None:
                arena.close()
        self._own = self._theirs = self._split = None
        while self._descriptors:
            os.close(self._descriptors.pop())


def _cut(parts: list[memoryview], num_bytes: int) -> tuple[list[memoryview], list[memoryview], int]:
    """The first `num_bytes` of `parts` (or all, if fewer), the rest, and the bytes of the first."""
    taken = 0
    for index, part in enumerate(parts):
        room = num_bytes - taken
        if part.nbytes > room:
            return [*parts[:index], part[:room]], [part[room:], *parts[index + 1 :]], num_bytes
        taken += part.nbytes
    return parts, [], taken
