from __future__ import annotations

import array

import msgspec
import pytest

from deepseek_ray.errors import LinkError
from deepseek_ray.links.frame import (
    HEADER_BYTES,
    DtypeCode,
    Frame,
    FrameKind,
    decode_header,
    encode_header,
    flatten_payload,
    message_frame,
    read_message,
)
from deepseek_ray.messages import GenerateRequest, SamplingParams

FULL = Frame(
    FrameKind.EXPERT_REPLY,
    flags=0xFFFF,
    incarnation=2**64 - 1,
    generation=3,
    epoch=2**63,
    sequence=5,
    batch_id=6,
    layer=60,
    attempt=2,
    num_rows=2**32 - 1,
    num_pairs=8,
    dtype=DtypeCode.BFLOAT16,
    tensor_dtype=DtypeCode.FLOAT16,
    tensor_columns=2**16 - 1,
    tensor_rows=2**32 - 1,
)


def test_every_header_field_survives() -> None:
    header = encode_header(FULL, 77)
    assert len(header) == HEADER_BYTES == 80
    assert decode_header(b"xyz" + header, 3, 77) == (FULL, 77)


@pytest.mark.parametrize("kind", FrameKind)
def test_every_kind_survives(kind: FrameKind) -> None:
    frame, _ = decode_header(encode_header(Frame(kind), 0), 0, 0)
    assert frame.kind is kind
    assert frame.layer == -1
    assert frame.dtype is DtypeCode.NONE


@pytest.mark.parametrize(
    ("offset", "value", "text"),
    [
        *[(0, 0, "not b'DSRF'"), (4, 9, "version 9"), (5, 99, "kind 99"), (5, 0, "kind 0")],
        *[(64, 42, "dtypes 42 and 3"), (65, 42, "dtypes 2 and 42")],
    ],
)
def test_a_header_of_something_else_is_refused(offset: int, value: int, text: str) -> None:
    header = bytearray(encode_header(FULL, 0))
    header[offset] = value
    with pytest.raises(LinkError, match=text):
        decode_header(header, 0, 100)


def test_a_payload_above_the_limit_is_refused() -> None:
    with pytest.raises(LinkError, match="101 bytes, the limit is 100"):
        decode_header(encode_header(FULL, 101), 0, 100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("flags", 1 << 16), ("epoch", -1), ("num_rows", 1 << 32), ("layer", 0.5), ("tensor_columns", 1 << 16)],
)
def test_a_field_that_does_not_fit_is_named_with_its_value(field: str, value: float) -> None:
    with pytest.raises(LinkError, match=f"{field}={value}"):
        encode_header(Frame(FrameKind.PING, **{field: value}), 0)


def test_a_tensor_is_no_part_of_a_frame_on_the_wire() -> None:
    with pytest.raises(LinkError, match="takes none"):
        encode_header(Frame(FrameKind.EXPERT_CALL, tensor=object()), 0)


def test_payload_parts_become_bytes_in_order() -> None:
    views, total = flatten_payload([b"ab", array.array("H", [1, 2]), b"", memoryview(b"xyz")[1:]])
    assert b"".join(views) == b"ab" + array.array("H", [1, 2]).tobytes() + b"yz"
    assert total == 8
    assert flatten_payload(b"") == ([], 0)


@pytest.mark.parametrize("part", [memoryview(b"abcdef")[::2], "text", 7], ids=["strided", "str", "int"])
def test_a_part_that_is_no_contiguous_buffer_is_refused(part: object) -> None:
    with pytest.raises(LinkError, match="C-contiguous"):
        flatten_payload([part])


def test_release_calls_back_once_and_empties_the_payload() -> None:
    calls: list[int] = []
    frame = Frame(FrameKind.PING, b"abc", on_release=lambda: calls.append(1))
    with frame:
        assert frame.payload == b"abc"
    frame.release()
    assert (calls, frame.payload) == ([1], b"")


def test_messages_are_message_pack_and_validated() -> None:
    decoder = msgspec.msgpack.Decoder(GenerateRequest)
    request = GenerateRequest(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(stop=["x"]))
    frame = message_frame(request, sequence=4)
    assert (frame.kind, frame.sequence) == (FrameKind.MESSAGE, 4)
    assert read_message(frame, decoder) == request
    with pytest.raises(LinkError, match="prompt_token_ids"):
        read_message(message_frame({"request_id": "r", "prompt_token_ids": "no"}), decoder)
    with pytest.raises(LinkError, match="PING"):
        read_message(Frame(FrameKind.PING), decoder)
