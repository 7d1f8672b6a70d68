"""Is the HTTP port free? Asked before anything expensive starts, and kept until the server itself has it."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import socket
from pathlib import Path

import psutil

from deepseek_ray.errors import DeploymentError

_ANY = ("0.0.0.0", "::")


class ReservedPort:
    """A port that is free, and that no other server of this user will take while this one has it.

    Ray Serve's proxies bind with SO_REUSEPORT: a second server of the same user on the same port would start without
    an error and get half of the connections. So binding alone does not tell; listeners are looked up, and a lock file
    in `directory` covers the time until a server listens.
    """

    def __init__(self, host: str, port: int, directory: Path) -> None:
        """DeploymentError when the port is in use, not allowed, or the host is not an address of this machine."""
        self._path = directory / f"port-{port}.lock"
        self._lock = _try_lock(self._path)
        if self._lock is None:
            raise _in_use(host, port, "by a server that is starting")
        try:
            _check_bind(host, port)
            _check_listeners(host, port)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Harmless to call twice."""
        if self._lock is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_host(host: str) -> str:
    """`host` as it stands in a URL that reaches it from here."""
    if host == "0.0.0.0":
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock on the file of this name; None while another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        os.close(handle)  # its last holder removed the file between our opening and locking it


def _check_bind(host: str, port: int) -> None:
    """Bind as Serve's proxy will."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise DeploymentError(
                f"--host {host!r} cannot be resolved ({error.strerror}); give an IP address"
            ) from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(host, port, "by another process") from None
            if error.errno == errno.EACCES:
                raise DeploymentError(
                    f"port {port} is reserved for the system; choose a --port of 1024 or above"
                ) from None
            raise DeploymentError(
                f"port {port} on {host} cannot be bound ({error.strerror}); --host must be an address of this machine"
            ) from None


def _check_listeners(host: str, port: int) -> None:
    address = socket.gethostbyname(host) if ":" not in host else host
    for connection in psutil.net_connections("tcp"):
        local = connection.laddr
        if connection.status != psutil.CONN_LISTEN or not local or local.port != port:
            continue
        if address in _ANY or local.ip in (address, *_ANY):
            raise _in_use(host, port, f"by process {connection.pid}" if connection.pid else "by another process")


def _in_use(host: str, port: int, by: str) -> DeploymentError:
    return DeploymentError(f"port {port} on {host} is in use {by}; stop that, or choose another --port")
