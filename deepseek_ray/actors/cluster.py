"""Joining the Ray cluster there is, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

logger = logging.getLogger(__name__)


class Cluster:
    """This process's connection. `leave` takes back exactly what joining did."""

    def __init__(self, connected_here: bool) -> None:
        self._connected_here = connected_here

    @property
    def address(self) -> str:
        """host:port of the cluster's GCS, for other processes to join."""
        return ray.get_runtime_context().gcs_address

    def leave(self) -> None:
        """Disconnect if this process connected for us; a cluster started here ends with that."""
        if self._connected_here and ray.is_initialized():
            ray.shutdown()
        self._connected_here = False


def join_or_start(address: str | None = None) -> Cluster:
    """Join `address`, else `RAY_ADDRESS`, else start a cluster of this machine (with Ray's token authentication).

    An already connected process stays as it is. Raises ConnectionError when there is no cluster at the address.
    """
    if ray.is_initialized():
        return Cluster(connected_here=False)
    wanted = address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": False}
    with _own_sigterm_handler():
        if wanted:
            ray.init(address=wanted, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, _temp_dir=_temp_dir(), **quiet)
    return Cluster(connected_here=True)


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keep the handler that the process has, if it has one: Ray's ends it at once, and nothing is cleared away."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _temp_dir() -> str | None:
    """Ray keeps its session files here; None is Ray's default. UNIX socket paths must stay short."""
    return os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray")
