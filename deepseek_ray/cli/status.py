"""`deepseek-ray status`: the processes of a deployment."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepseek_ray.errors import DeploymentError

if TYPE_CHECKING:
    from deepseek_ray.serving.state_file import ServerState


def status(
    name: Annotated[
        str | None, typer.Option(help="Deployment to ask about.", show_default="the only one there is")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster it runs on.", show_default="that of the server on this machine")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the router, attention workers and expert shards of a deployment.

    [bold]Examples[/bold]

      deepseek-ray status\n
      deepseek-ray status --name second --json\n
      deepseek-ray status --address 10.0.0.1:6379
    """
    if address is None:
        server = _find_server(name)
        name, address = server.name, server.address
        os.environ.setdefault("RAY_AUTH_MODE", server.auth_mode)  # before ray is imported, which reads it
    shown = _ask_cluster(address, name)
    if as_json:
        print(json.dumps(shown))
    else:
        _print_table(shown)


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


def _ask_cluster(address: str | None, name: str | None) -> dict[str, Any]:
    import ray

    from deepseek_ray.actors.cluster import join_or_start
    from deepseek_ray.actors.deployment import deployment_status
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
        return deployment_status(name)
    finally:
        cluster.leave()


def _print_table(shown: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"epoch {shown['epoch']}", title_justify="left")
    for column in ("role", "id", "pid", "state", "restarts", "node"):
        table.add_column(column, justify="right" if column in ("id", "pid", "restarts") else "left")
    for actor in shown["actors"]:
        values = (actor[key] for key in ("role", "id", "pid", "state", "restarts"))
        table.add_row(*map(str, values), actor["node_id"][:8])
    Console().print(table)
