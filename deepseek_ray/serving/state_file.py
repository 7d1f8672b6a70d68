"""Where a served model can be found: a small file, readable by its user only, for as long as its server runs.

Its existence also claims the deployment's name on this machine. A file whose process is gone counts for nothing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec
import psutil

from deepseek_ray.errors import DeploymentError


class ServerState(msgspec.Struct, kw_only=True, frozen=True):
    """What `deepseek-ray status` needs to find a deployment."""

    name: str
    pid: int
    process_started: float
    """Unix seconds: with `pid` it names one process for good, pids alone come round again."""
    host: str
    port: int
    address: str | None = None
    """host:port of the Ray cluster; None while the server starts."""
    auth_mode: str = "disabled"
    """RAY_AUTH_MODE of the cluster."""

    @property
    def is_alive(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.process_started) < 1
        except psutil.Error:
            return False


class StateFile:
    """The file of this process's server."""

    def __init__(self, state: ServerState, path: Path) -> None:
        self._state = state
        self._path = path

    @classmethod
    def claim(cls, name: str, host: str, port: int) -> StateFile:
        """Claim `name`; DeploymentError when a live process of this user on this machine has it."""
        me = psutil.Process()
        state = ServerState(name=name, pid=me.pid, process_started=me.create_time(), host=host, port=port)
        path = state_directory() / f"{name}.json"
        while not _write(path, state, replace=False):
            other = _read(path)
            if other is not None and other.is_alive:
                raise DeploymentError(
                    f"a deployment named {name!r} is being served already (process {other.pid}, "
                    f"http://{other.host}:{other.port}/v1); stop that one, or choose another --name"
                )
            path.unlink(missing_ok=True)
        return cls(state, path)

    def publish(self, address: str, auth_mode: str) -> None:
        """Add what is known once the cluster runs."""
        self._state = msgspec.structs.replace(self._state, address=address, auth_mode=auth_mode)
        _write(self._path, self._state, replace=True)

    def remove(self) -> None:
        if _read(self._path) == self._state:
            self._path.unlink(missing_ok=True)


def live_servers() -> list[ServerState]:
    """Servers of this user on this machine whose process runs, by name."""
    states = (_read(path) for path in sorted(state_directory().glob("*.json")))
    return [state for state in states if state is not None and state.is_alive]


def state_directory() -> Path:
    """A directory of this user alone: `$XDG_RUNTIME_DIR/deepseek_ray`, else one under `$XDG_CACHE_HOME` or ~/.cache."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = Path(runtime) / "deepseek_ray" if runtime else cache / "deepseek_ray" / "servers"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DeploymentError(
            f"cannot make {directory} ({error.strerror}); set XDG_RUNTIME_DIR to a directory that you can write"
        ) from None
    return directory


def _write(path: Path, state: ServerState, replace: bool) -> bool:
    """Write all or nothing, mode 0600; False when the file exists and is not to be replaced."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(state))
        if replace:
            os.replace(scratch, path)
        else:
            os.link(scratch, path)
    except FileExistsError:
        return False
    finally:
        Path(scratch).unlink(missing_ok=True)
    return True


def _read(path: Path) -> ServerState | None:
    """None for a file that is gone or that nobody here wrote."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServerState)
    except (OSError, msgspec.MsgspecError):
        return None
