"""Both ends of a new connection prove that they hold the deployment's secret, before any frame is read.

    client -> server   HELLO(nonce, identity)
    server -> client   HELLO(nonce, identity), HMAC-SHA256(secret, "server" + transcript)
    client -> server   HMAC-SHA256(secret, "client" + transcript)
    server -> client   ACCEPTED

The transcript binds protocol version, deployment, medium, both nonces and both identities; the role in front keeps a
proof from being reflected. The whole exchange runs against one deadline, so a peer that drips bytes gains nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time

import msgspec

from deepseek_ray.errors import LinkError

SECRET_BYTES = 32
NONCE_BYTES = 32
MAC_BYTES = 32
MAX_IDENTITY_BYTES = 512
_ACCEPTED = b"\x06"
_HELLO = struct.Struct(f"<8s{NONCE_BYTES}sH")  # magic with version, nonce, bytes of the identity that follows
_MAGIC = b"DSRLINK1"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who an end of a link says (and, by the MAC, proves) to be."""

    node_id: str
    pid: int
    incarnation: int
    tensors: str = ""
    """Of a client: by which backend the link is to carry tensors."""

    def __str__(self) -> str:
        return f"pid {self.pid} on node {self.node_id[:12]}"


def new_secret() -> bytes:
    """A fresh 256-bit secret for a deployment."""
    return secrets.token_bytes(SECRET_BYTES)


def check_secret(secret: bytes) -> None:
    """Raise LinkError unless the secret has 256 bits."""
    if len(secret) != SECRET_BYTES:
        raise LinkError(f"the link secret has {len(secret)} bytes, it must have {SECRET_BYTES}; use new_secret()")


def prove_as_client(
    sock: socket.socket, *, secret: bytes, deployment: str, medium: str, identity: Identity, deadline: float
) -> Identity:
    """Run the connecting side on a blocking socket until `deadline` (time.monotonic()); returns who the server is.

    Raises LinkError: time-out, garbage, another secret or deployment. The caller closes the socket.
    """
    mine = _hello(identity)
    _send(sock, mine, deadline)
    theirs, peer = _receive_hello(sock, deadline)
    transcript = _transcript(deployment, medium, mine, theirs)
    _check_mac(_receive(sock, MAC_BYTES, deadline), _mac(secret, b"server", transcript), deployment)
    _send(sock, _mac(secret, b"client", transcript), deadline)
    if _receive(sock, len(_ACCEPTED), deadline) != _ACCEPTED:
        raise LinkError("the peer ended the handshake with an unknown byte; it does not speak this protocol")
    return peer


def prove_as_server(
    sock: socket.socket, *, secret: bytes, deployment: str, medium: str, identity: Identity, deadline: float
) -> Identity:
    """The accepting side of `prove_as_client`; returns who the client is."""
    theirs, peer = _receive_hello(sock, deadline)
    mine = _hello(identity)
    transcript = _transcript(deployment, medium, theirs, mine)
    _send(sock, mine + _mac(secret, b"server", transcript), deadline)
    _check_mac(_receive(sock, MAC_BYTES, deadline), _mac(secret, b"client", transcript), deployment)
    _send(sock, _ACCEPTED, deadline)
    return peer


def _hello(identity: Identity) -> bytes:
    encoded = msgspec.msgpack.encode(identity)
    if len(encoded) > MAX_IDENTITY_BYTES:
        raise LinkError(f"node id {identity.node_id[:40]!r}... is too long for a handshake; use at most 256 bytes")
    return _HELLO.pack(_MAGIC, secrets.token_bytes(NONCE_BYTES), len(encoded)) + encoded


def _receive_hello(sock: socket.socket, deadline: float) -> tuple[bytes, Identity]:
    head = _receive(sock, _HELLO.size, deadline)
    magic, _, identity_bytes = _HELLO.unpack(head)
    if magic != _MAGIC or identity_bytes > MAX_IDENTITY_BYTES:
        raise LinkError(
            f"the peer's hello starts with {magic!r} (expected {_MAGIC!r}) and announces {identity_bytes} bytes (limit "
            f"{MAX_IDENTITY_BYTES}); it is no link of this release"
        )
    encoded = _receive(sock, identity_bytes, deadline)
    try:
        return head + encoded, msgspec.msgpack.decode(encoded, type=Identity)
    except msgspec.DecodeError as error:
        raise LinkError(f"the peer's hello cannot be understood: {error}") from None


def _transcript(deployment: str, medium: str, client_hello: bytes, server_hello: bytes) -> bytes:
    fields = (deployment.encode(), medium.encode(), client_hello, server_hello)
    return b"".join(struct.pack("<I", len(field)) + field for field in fields)


def _mac(secret: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, role + b"\x00" + transcript, hashlib.sha256)


def _check_mac(received: bytes, expected: bytes, deployment: str) -> None:
    if not hmac.compare_digest(received, expected):
        raise LinkError(
            f"the peer does not hold the secret of deployment {deployment!r}; it belongs to another deployment, or to "
            "an earlier one of the same name"
        )


def _receive(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        _arm(sock, deadline)
        try:
            part = sock.recv(count - len(data))
        except TimeoutError:
            raise _timed_out() from None
        except OSError as error:
            raise LinkError(f"the connection broke during the handshake: {error}") from None
        if not part:
            raise LinkError("the peer closed the connection during the handshake; it may hold another secret")
        data += part
    return bytes(data)


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    _arm(sock, deadline)
    try:
        sock.sendall(data)
    except TimeoutError:
        raise _timed_out() from None
    except OSError as error:
        raise LinkError(f"the connection broke during the handshake: {error}") from None


def _arm(sock: socket.socket, deadline: float) -> None:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise _timed_out()
    try:
        sock.settimeout(remaining)
    except OSError as error:
        raise LinkError(f"the connection was dropped during the handshake: {error}") from None


def _timed_out() -> LinkError:
    return LinkError("the peer did not finish the handshake in time; raise the time-out if it is only slow")
