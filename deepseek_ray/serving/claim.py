"""What a server takes for itself on this machine before it starts anything: a deployment's name and a port."""

from __future__ import annotations

import os

from deepseek_ray.serving.port import ReservedPort, is_loopback
from deepseek_ray.serving.state_file import StateFile, state_directory


class ServerClaim:
    """The name `name` and, as far as it can be known here, host:port."""

    def __init__(self, name: str, host: str, port: int, address: str | None = None) -> None:
        """DeploymentError when the name or the port is taken. `address` None means RAY_ADDRESS, else a new cluster."""
        self.host, self.port = host, port
        self.address = address or os.environ.get("RAY_ADDRESS")
        self._reserved: ReservedPort | None = None
        self._state_file = StateFile.claim(name, host, port)
        try:
            if not self.address:  # on a cluster that runs already the port may belong to its own Serve
                self.reserve_port()
        except BaseException:
            self.release()
            raise

    def reserve_port(self) -> None:
        """Once it is clear that Serve is to be started; of a joined cluster only a loopback address is surely ours."""
        if self._reserved is None and (not self.address or is_loopback(self.host)):
            self._reserved = ReservedPort(self.host, self.port, state_directory())

    def publish(self, address: str, auth_mode: str) -> None:
        """Let other commands find the cluster at `address`."""
        self._state_file.publish(address, auth_mode)

    def release(self) -> None:
        """Give everything back. Harmless to call twice."""
        if self._reserved is not None:
            self._reserved.release()
        self._state_file.remove()
