"""Is the HTTP port free? Asked before anything expensive starts, and kept until the server itself has it."""

from __future__ import annotations

import errno
import ipaddress
import socket

from deepseek_ray.errors import DeploymentError


class ReservedPort:
    """Holds host:port against other checks like this one, while Ray Serve's proxies can still bind it.

    Proxies share ports (SO_REUSEPORT): without this a second server on the same port would start without an error and
    take half of the connections. A bound socket that does not listen gets none.
    """

    def __init__(self, host: str, port: int) -> None:
        """DeploymentError when the port is in use, not allowed, or the host is not an address of this machine."""
        with _socket(host) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not count
            _bind(probe, host, port)
        self._socket = _socket(host)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(self._socket, host, port)

    def release(self) -> None:
        self._socket.close()


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_host(host: str) -> str:
    """`host` as it stands in a URL that reaches it from here."""
    if host in ("0.0.0.0", ""):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def _bind(bound: socket.socket, host: str, port: int) -> None:
    try:
        bound.bind((host, port))
    except socket.gaierror as error:
        raise DeploymentError(f"--host {host!r} cannot be resolved ({error.strerror}); give an IP address") from None
    except OverflowError:
        raise DeploymentError(f"--port is {port}; it must be between 1 and 65535") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "is in use by another process; stop it, or choose another --port"
        elif error.errno == errno.EACCES:
            reason = "is reserved for the system; choose a --port of 1024 or above"
        else:
            reason = f"cannot be bound ({error.strerror}); --host must be an address of this machine"
        raise DeploymentError(f"port {port} on {host} {reason}") from None
