"""A link between nodes, and on systems without memfd: frame header and payload bytes over TCP, or TLS.

The header carries the payload's length, so a frame needs nothing around it. TLS is Ray's own switch: RAY_USE_TLS=1 with
RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT; both ends must then show a certificate of that CA.
"""

from __future__ import annotations

import os
import socket
import ssl
import time

from deepseek_ray.errors import LinkError
from deepseek_ray.links.base import LinkLimits
from deepseek_ray.links.channel import Buffer, Channel, ReadBuffer, TlsChannel
from deepseek_ray.links.frame import (
    HEADER_BYTES,
    Frame,
    check_payload_bytes,
    decode_header,
    encode_header,
    flatten_payload,
)
from deepseek_ray.links.handshake import Identity
from deepseek_ray.links.stream import StreamLink

_BUFFER_BYTES = 1 << 16
_KEEPALIVE = (
    ("TCP_KEEPIDLE", 2),
    ("TCP_KEEPINTVL", 1),
    ("TCP_KEEPCNT", 4),
    ("TCP_USER_TIMEOUT", 5000),
)
"""A host that vanished or was cut off is noticed in 5 to 6 seconds, whether anything was on its way or not. Without
TCP_USER_TIMEOUT (milliseconds) the kernel would try again at ever longer intervals, for 15 minutes."""


class TcpLink(StreamLink):
    """See the module. The payload of a received frame is memory of its own."""

    def __init__(self, sock: socket.socket, peer: Identity, limits: LinkLimits) -> None:
        if isinstance(sock, ssl.SSLSocket):
            super().__init__(TlsChannel(sock), peer, "TLS", limits)
        else:
            super().__init__(Channel(sock), peer, "TCP", limits)
        self._buffer = ReadBuffer(_BUFFER_BYTES)
        self._frame: Frame | None = None  # header read, payload on its way
        self._payload = memoryview(bytearray())
        self._payload_filled = 0

    def send(self, frame: Frame) -> None:
        parts, payload_bytes = flatten_payload(frame.payload)
        check_payload_bytes(payload_bytes, self._limits.max_payload_bytes)
        pieces: list[Buffer] = [encode_header(frame, payload_bytes), *parts]
        with self._send_lock, self._write_lock:
            self._write(pieces)

    def _read(self) -> None:
        while True:
            if self._frame is not None:
                self._payload_filled += self._channel.read_into(self._payload[self._payload_filled :])
                self._finish_payload()
            else:
                self._buffer.filled += self._channel.read_into(self._buffer.room)
                self._read_buffer()
            if not self._channel.pending:
                return

    def _read_buffer(self) -> None:
        """Take frames out of the buffer; the rest of the last one, if it is large, is read straight into its place."""
        view, filled, start = self._buffer.view, self._buffer.filled, 0
        while self._frame is None and filled - start >= HEADER_BYTES:
            self._frame, payload_bytes = decode_header(view, start, self._limits.max_payload_bytes)
            start += HEADER_BYTES
            here = min(payload_bytes, filled - start)
            self._payload = memoryview(bytearray(payload_bytes))
            self._payload[:here] = view[start : start + here]
            self._payload_filled = here
            start += here
            self._finish_payload()
        self._buffer.drop(start)

    def _finish_payload(self) -> None:
        if self._frame is not None and self._payload_filled == len(self._payload):
            frame, self._frame = self._frame, None
            frame.payload = self._payload
            self._deliver(frame, len(self._payload))


def tune(sock: socket.socket) -> None:
    """No waiting for more bytes (frames are whole), and notice a node that vanished without a word."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def wrap(sock: socket.socket, context: ssl.SSLContext | None, server: bool) -> socket.socket:
    """TLS around a connected socket if there is a context, else the socket itself. `shake_tls` comes next."""
    return context.wrap_socket(sock, server_side=server, do_handshake_on_connect=False) if context else sock


def shake_tls(sock: socket.socket, deadline: float) -> None:
    """The TLS handshake of a wrapped socket, until `deadline` (time.monotonic()); nothing on a plain one."""
    if not isinstance(sock, ssl.SSLSocket):
        return
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.do_handshake()
    except OSError as error:
        raise LinkError(f"TLS with the peer failed: {error}; both ends need RAY_USE_TLS=1 and one CA") from None


def tls_context(server: bool) -> ssl.SSLContext | None:
    """A context from Ray's variables; None when RAY_USE_TLS is not on. Raises LinkError naming what is missing."""
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    paths = {name: os.environ.get(name, "") for name in _TLS_FILES}
    for name, path in paths.items():
        if not os.path.isfile(path):
            raise LinkError(f"RAY_USE_TLS is on but {name} is {path!r}, which is no file; set it to a PEM file")
    certificate, key, authority = (paths[name] for name in _TLS_FILES)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # as in Ray: nodes are known by the CA, their addresses change
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except OSError as error:
        raise LinkError(f"the TLS files {certificate}, {key}, {authority} cannot be used: {error}") from None
    return context


_TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
