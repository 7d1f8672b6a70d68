"""Which running deployment a command is about, and joining its cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from deepseek_ray.errors import DeploymentError

if TYPE_CHECKING:
    from deepseek_ray.serving.state_file import ServerState

Name = Annotated[str | None, typer.Option(help="Deployment to ask about.", show_default="the only one there is")]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster it runs on.", show_default="that of the server on this machine")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def running_deployment(name: str | None, address: str | None) -> Iterator[str]:
    """Join the deployment's cluster for the while; gives its name. DeploymentError when there is none, or several."""
    if address is None:
        server = _find_server(name)
        name, address = server.name, server.address
        os.environ.setdefault("RAY_AUTH_MODE", server.auth_mode)  # before ray is imported, which reads it
    import ray

    from deepseek_ray.actors.cluster import join_or_start
    from deepseek_ray.actors.record import list_deployments

    try:
        cluster = join_or_start(address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise DeploymentError(f"cannot join the Ray cluster at {address}: {error}") from None
    try:
        if name is None:
            running = list_deployments()
            if len(running) > 1:
                raise DeploymentError(f"several deployments run there: {', '.join(running)}; choose one with --name")
            name = running[0] if running else "default"
        yield name
    finally:
        cluster.leave()


def _find_server(name: str | None) -> ServerState:
    """The server to ask about, by its state file."""
    from deepseek_ray.serving.state_file import live_servers

    servers = live_servers()
    chosen = [server for server in servers if name in (None, server.name)]
    if len(chosen) == 1:
        if chosen[0].address is None:
            raise DeploymentError(f"the server of {chosen[0].name!r} is starting its cluster; ask again in a moment")
        return chosen[0]
    running = ", ".join(server.name for server in servers) or "none"
    if chosen:
        raise DeploymentError(f"several deployments are served on this machine: {running}; choose one with --name")
    wanted = "any deployment" if name is None else f"a deployment named {name!r}"
    raise DeploymentError(
        f"no server of {wanted} runs here (running: {running}); start one with `deepseek-ray serve`, or give the "
        "--address of its Ray cluster"
    )
