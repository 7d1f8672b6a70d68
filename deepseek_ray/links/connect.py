"""How two processes find each other and choose a medium.

    listener = listen(node_id, host, deployment, secret)          link = connect(listener.endpoints, node_id, ...)
    link = listener.accept(timeout)

A listener takes both media at once; the one who connects chooses: shared memory on the same Ray node if the handshake
works there (two containers of one machine do not share abstract sockets), else TCP.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
import time

from deepseek_ray.errors import LinkError
from deepseek_ray.links.arena import SUPPORTED as SHARED_MEMORY_SUPPORTED
from deepseek_ray.links.base import Endpoints, Link, LinkLimits, TensorWay, Transport
from deepseek_ray.links.handshake import Identity, check_secret, prove_as_client
from deepseek_ray.links.listener import Listener, finish
from deepseek_ray.links.tcp import shake_tls, tls_context, tune, wrap

logger = logging.getLogger(__name__)

_BACKLOG = 128


def listen(
    node_id: str,
    tcp_host: str,
    deployment: str,
    secret: bytes,
    transport: Transport = "auto",
    incarnation: int | None = None,
    limits: LinkLimits | None = None,
    tensors: TensorWay | None = None,
) -> Listener:
    """Wait for peers of `deployment`. `tcp_host` is this node's address, on which TCP listens (a free port) and which
    the endpoints carry. `incarnation` says which life of the process this is; None draws one. `tensors`: the way to
    this process's device, if links are to carry tensors.

    Raises LinkError: the address cannot be used, or shared memory is demanded where there is none.
    """
    check_secret(secret)
    if transport == "shared_memory" and not SHARED_MEMORY_SUPPORTED:
        raise LinkError("transport is 'shared_memory', which needs Linux; use 'auto' or 'tcp'")
    unix = tcp = tls = None
    try:
        if transport != "tcp" and SHARED_MEMORY_SUPPORTED:
            unix = _listen_unix(deployment)
        if transport != "shared_memory":
            tls = tls_context(server=True)
            tcp = _listen_tcp(tcp_host)
        endpoints = Endpoints(
            node_id=node_id,
            unix_name=unix.getsockname()[1:].decode() if unix else None,
            tcp_host=tcp_host if tcp else None,
            tcp_port=tcp.getsockname()[1] if tcp else 0,
            incarnation=secrets.randbits(63) if incarnation is None else incarnation,
            tensors=tensors.name if tensors else "",
        )
        return Listener(endpoints, unix, tcp, tls, deployment, secret, limits or LinkLimits(), tensors)
    except BaseException:
        for sock in (unix, tcp):
            if sock is not None:
                sock.close()
        raise


def connect(
    endpoints: Endpoints,
    node_id: str,
    deployment: str,
    secret: bytes,
    transport: Transport = "auto",
    timeout: float = 10.0,
    incarnation: int = 0,
    limits: LinkLimits | None = None,
    tensors: TensorWay | None = None,
) -> Link:
    """Open a link to a listener within `timeout` seconds. `node_id` and `incarnation` are those of this process.

    With `tensors` (see `listen`) it carries tensors where the listener offers the same backend from another place; if
    their channels fail, it is a link without.

    Raises LinkError: nobody there, time-out, another secret, or another incarnation than the endpoints say.
    """
    check_secret(secret)
    limits = limits or LinkLimits()
    start, problems = time.monotonic(), []
    media = _media(endpoints, node_id, transport)
    backend = _common_backend(tensors.name, endpoints.tensors) if tensors else ""
    attempts = [(medium, wanted) for wanted in ([backend, ""] if backend else [""]) for medium in media]
    for index, (medium, backend) in enumerate(attempts):
        share = timeout * (index + 1) / len(attempts)  # a silent first medium leaves time for the second
        identity = Identity(node_id=node_id, pid=os.getpid(), incarnation=incarnation, tensors=backend)
        try:
            link = _open(medium, endpoints, deployment, secret, identity, start + share, limits)
            return tensors.join(link, False, limits) if tensors and backend else link
        except LinkError as error:
            problems.append(f"{medium}: {error.message}")
            if backend:
                logger.warning("%s", error)
    raise LinkError(f"no link to {_describe(endpoints)} within {timeout:g} s. " + "; ".join(problems))


def _media(endpoints: Endpoints, node_id: str, transport: Transport) -> list[str]:
    """The media to try, best first."""
    media = []
    if transport != "tcp" and endpoints.unix_name and SHARED_MEMORY_SUPPORTED and node_id == endpoints.node_id:
        media.append("shared_memory")
    if transport != "shared_memory" and endpoints.tcp_host:
        media.append("tcp")
    if not media:
        raise LinkError(
            f"transport {transport!r} from node {node_id[:12]} cannot reach {_describe(endpoints)}: shared memory "
            "needs one node and a listener that takes it, TCP a listener that takes it; use 'auto' at both ends"
        )
    return media


def _common_backend(ours: str, theirs: str) -> str:
    """What both places can send tensors by. One place (a GPU that two processes share) needs no way to itself, and NCCL
    refuses to make one."""
    backend = ours.partition(":")[0]
    return backend if backend == theirs.partition(":")[0] and ours != theirs else ""


def _open(
    medium: str,
    endpoints: Endpoints,
    deployment: str,
    secret: bytes,
    identity: Identity,
    deadline: float,
    limits: LinkLimits,
) -> Link:
    sock = _dial(medium, endpoints, deadline)
    try:
        if medium == "tcp":
            sock = wrap(sock, tls_context(server=False), server=False)
            shake_tls(sock, deadline)
        peer = prove_as_client(
            sock, secret=secret, deployment=deployment, medium=medium, identity=identity, deadline=deadline
        )
        if peer.incarnation != endpoints.incarnation:
            raise LinkError(
                f"the listener is incarnation {peer.incarnation}, not {endpoints.incarnation}: the process was "
                "restarted; ask for its new endpoints"
            )
        return finish(sock, medium, peer, limits)
    except BaseException:
        sock.close()
        raise


def _dial(medium: str, endpoints: Endpoints, deadline: float) -> socket.socket:
    try:
        if medium == "tcp":
            sock = socket.create_connection((endpoints.tcp_host, endpoints.tcp_port), _remaining(deadline))
            tune(sock)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # settimeout() would not wait for a place in a full backlog: connect() on a UNIX socket then fails at once
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_remaining(deadline)))
            sock.connect(f"\0{endpoints.unix_name}")
            return sock
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise LinkError(f"cannot connect: {error}") from None


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise LinkError("no time left to connect; raise the time-out")
    return remaining


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) + 1)


def _listen_unix(deployment: str) -> socket.socket:
    """An abstract socket: it has no file, and it is gone with the process."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(f"\0deepseek_ray/{deployment[:40]}/{os.getpid()}/{secrets.token_hex(8)}")
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise LinkError(f"cannot listen on a UNIX socket: {error}; use transport 'tcp'") from None
    return sock


def _listen_tcp(host: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise LinkError(f"cannot listen on {host!r}: {error}; give an address of this machine") from None


def _describe(endpoints: Endpoints) -> str:
    places = []
    if endpoints.unix_name:
        places.append(f"@{endpoints.unix_name}")
    if endpoints.tcp_host:
        places.append(f"{endpoints.tcp_host}:{endpoints.tcp_port}")
    return f"{' / '.join(places)} on node {endpoints.node_id[:12]}"
