"""A frame: a fixed binary header and raw payload bytes. What two processes say to each other, never pickled.

The header says who computed for whom and under which table (incarnation, generation, epoch, sequence, batch, layer,
attempt) and how to read the payload (counts, dtype). It is 80 bytes, little endian, the same on every medium.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from deepseek_ray.errors import LinkError

MAGIC = b"DSRF"
VERSION = 1


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    EXPERT_CALL = 1
    """Rows for the experts of a shard."""
    EXPERT_REPLY = 2
    """One row per (token, slot) of the call with the same sequence number."""
    STALE = 3
    """The call's epoch can no longer be served: send it again under the new table."""
    MESSAGE = 4
    """A MessagePack payload (`message_frame`, `read_message`)."""
    ERROR = 5
    """The call failed; the payload is one UTF-8 sentence."""
    PING = 6
    PONG = 7
    BYE = 8
    """The sender closes the link on purpose after this frame."""
    KV_BLOCK = 9
    """A copy of a full block of the latent cache. No answer."""


class DtypeCode(enum.IntEnum):
    """Element type of a payload of tensor rows; NONE where the payload is no tensor."""

    NONE = 0
    FLOAT32 = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    FLOAT8_E4M3FN = 4
    INT8 = 5


class Frame(msgspec.Struct):
    """One frame, to be sent or as received.

    To send: `payload` is one C-contiguous buffer or a sequence of them (sent back to back, gathered without a copy in
    between). As received: `payload` is one writable memoryview of bytes that belongs to the reader until `release()`;
    on shared memory it looks straight into the sender's slot, so whoever needs the bytes for longer copies them.
    A frame that is never released keeps its slot: after `num_slots` such frames the sender gets an error.
    """

    kind: FrameKind
    payload: Any = b""
    flags: int = 0
    """16 bits, free for the two ends."""
    incarnation: int = 0
    """Which life of the calling process this belongs to."""
    generation: int = 0
    """Which life of the router published the table in use."""
    epoch: int = 0
    """Which table of that generation."""
    sequence: int = 0
    """Pairs a reply with its call."""
    batch_id: int = 0
    """The batch (engine step, micro-batch) of the caller."""
    layer: int = -1
    """Decoder layer; -1 where there is none."""
    attempt: int = 0
    """0 for the first sending, one more each time."""
    num_rows: int = 0
    """Rows (tokens) in the payload."""
    num_pairs: int = 0
    """(token, expert) pairs in the payload."""
    dtype: DtypeCode = DtypeCode.NONE
    tensor: Any = None
    """A torch tensor [rows, columns] on its way beside the payload; only on links that say `takes_tensors`."""
    tensor_dtype: DtypeCode = DtypeCode.NONE
    """These three are set by the link: what the tensor is that comes with the frame."""
    tensor_columns: int = 0
    tensor_rows: int = 0
    on_release: Callable[[], None] | None = None
    """Set by the link on received frames; called once by `release()`."""

    def release(self) -> None:
        """Give the payload's memory back to the sender. Harmless to call twice; the payload is empty afterwards."""
        hook, self.on_release = self.on_release, None
        self.payload = b""
        if hook is not None:
            hook()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


# magic, version, kind, flags | incarnation, generation, epoch, sequence, batch | layer, attempt, rows, pairs |
# dtype, tensor's dtype, its columns and rows, payload bytes
_HEADER = struct.Struct("<4sBBHQQQQQiIIIBBHIQ")
HEADER_BYTES = _HEADER.size
_KINDS = {int(kind): kind for kind in FrameKind}
_DTYPES = {int(dtype): dtype for dtype in DtypeCode}
_FIELDS = (
    *("flags", "incarnation", "generation", "epoch", "sequence", "batch_id"),
    *("layer", "attempt", "num_rows", "num_pairs", "dtype", "tensor_columns", "tensor_rows"),
)


def encode_header(frame: Frame, payload_bytes: int) -> bytes:
    """The 80 header bytes of a frame. Raises LinkError when a field does not fit its place, and on a tensor."""
    if frame.tensor is not None:
        raise LinkError("a frame carries a tensor, and this link takes none; put its bytes into the payload")
    try:
        # fmt: off
        return _HEADER.pack(
            MAGIC, VERSION, frame.kind, frame.flags,
            frame.incarnation, frame.generation, frame.epoch, frame.sequence, frame.batch_id,
            frame.layer, frame.attempt, frame.num_rows, frame.num_pairs,
            frame.dtype, frame.tensor_dtype, frame.tensor_columns, frame.tensor_rows, payload_bytes,
        )
        # fmt: on
    except struct.error as error:
        values = ", ".join(f"{name}={getattr(frame, name)}" for name in _FIELDS)
        raise LinkError(
            f"a {FrameKind(frame.kind).name} frame has a header field out of range ({error}): {values}; "
            "ids have 64 bits, counts 32, flags and columns 16, and only layer may be negative"
        ) from None


def decode_header(buffer: bytes | bytearray | memoryview, offset: int, max_payload_bytes: int) -> tuple[Frame, int]:
    """A frame without payload, and the number of payload bytes that follow.

    `buffer` holds at least HEADER_BYTES from `offset`. Raises LinkError on a wrong magic, version, kind or dtype and on
    a payload above `max_payload_bytes`.
    """
    # fmt: off
    (magic, version, kind_code, flags,
     incarnation, generation, epoch, sequence, batch_id,
     layer, attempt, num_rows, num_pairs,
     dtype_code, tensor_code, columns, rows, payload_bytes) = _HEADER.unpack_from(buffer, offset)
    # fmt: on
    if magic != MAGIC:
        raise LinkError(f"a frame starts with {magic!r}, not {MAGIC!r}; the peer does not speak this protocol")
    if version != VERSION:
        raise LinkError(f"a frame has version {version}, this side speaks {VERSION}; run one release on every node")
    kind, dtype, tensor_dtype = _KINDS.get(kind_code), _DTYPES.get(dtype_code), _DTYPES.get(tensor_code)
    if kind is None or dtype is None or tensor_dtype is None:
        raise LinkError(
            f"a frame has kind {kind_code} and dtypes {dtype_code} and {tensor_code}; known are kinds {sorted(_KINDS)} "
            f"and dtypes {sorted(_DTYPES)}; run one release on every node"
        )
    check_payload_bytes(payload_bytes, max_payload_bytes)
    # fmt: off
    frame = Frame(kind, b"", flags, incarnation, generation, epoch, sequence, batch_id,
                  layer, attempt, num_rows, num_pairs, dtype, None, tensor_dtype, columns, rows)
    # fmt: on
    return frame, payload_bytes


def check_payload_bytes(payload_bytes: int, max_payload_bytes: int) -> None:
    """Raise LinkError when a payload is above the limit."""
    if payload_bytes > max_payload_bytes:
        raise LinkError(
            f"a frame has a payload of {payload_bytes} bytes, the limit is {max_payload_bytes}; send fewer rows at once"
        )


def flatten_payload(payload: Any) -> tuple[list[memoryview], int]:
    """A payload as flat byte views, empty ones left out, and their bytes together.

    Raises LinkError for something that is no C-contiguous buffer.
    """
    parts: Sequence[Any] = payload if isinstance(payload, (list, tuple)) else (payload,)
    views, total = [], 0
    for part in parts:
        try:
            view = memoryview(part)
            if not view.nbytes:
                continue
            if view.format != "B" or view.ndim != 1 or not view.c_contiguous:
                view = view.cast("B")
        except TypeError as error:
            raise LinkError(
                f"a payload part of type {type(part).__name__} cannot be sent ({error}); give C-contiguous buffers"
            ) from None
        views.append(view)
        total += view.nbytes
    return views, total


Message = TypeVar("Message")
_ENCODER = msgspec.msgpack.Encoder()


def message_frame(message: Any, **fields: Any) -> Frame:
    """A MESSAGE frame holding `message` (a msgspec struct or plain data) as MessagePack; `fields` go in the header."""
    return Frame(FrameKind.MESSAGE, _ENCODER.encode(message), **fields)


def read_message(frame: Frame, decoder: msgspec.msgpack.Decoder[Message]) -> Message:
    """Decode and release a MESSAGE frame. Raises LinkError when it is of another kind or does not validate."""
    with frame:
        if frame.kind is not FrameKind.MESSAGE:
            raise LinkError(f"a {frame.kind.name} frame came where a MESSAGE was expected; run one release everywhere")
        try:
            return decoder.decode(frame.payload)
        except msgspec.DecodeError as error:
            raise LinkError(f"a message cannot be understood: {error}; run one release on every node") from None
