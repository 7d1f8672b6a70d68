"""`deepseek-ray admin`: the admin API, until a signal."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from deepseek_ray.cli.running import Address, Name, running_deployment
from deepseek_ray.errors import ConfigError, DeploymentError

KEY_VARIABLE = "DEEPSEEK_RAY_ADMIN_KEY"


def admin(
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the keys that may be used, one a line; or set {KEY_VARIABLE}."),
    ] = None,
    name: Name = None,
    address: Address = None,
) -> None:
    """Offer scale, drain, rebalance, replicate, move, status and experts of all deployments of a cluster over HTTP.

    It asks for a key of its own, never one of the model API's.

    [bold]Examples[/bold]

      DEEPSEEK_RAY_ADMIN_KEY=... deepseek-ray admin\n
      deepseek-ray admin --port 9001 --key-file /etc/deepseek-ray/admin-keys --address 10.0.0.1:6379\n
      curl -H "Authorization: Bearer $KEY" http://127.0.0.1:8001/deployments
    """
    from deepseek_ray.serving.auth import ApiKeys

    given = os.environ.pop(KEY_VARIABLE, None)
    keys = ApiKeys.of([given] if given else [], key_file)
    if not keys:
        raise ConfigError(f"the admin API needs a key; set {KEY_VARIABLE} or give --key-file")
    listener = _listen(host, port)
    with listener, running_deployment(name, address):
        import uvicorn

        from deepseek_ray.serving.admin import admin_app

        server = uvicorn.Server(uvicorn.Config(admin_app(keys), log_level="warning"))
        typer.echo(f"ready http://{host}:{port}/deployments")
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Before Ray is joined: a port that is taken is said at once."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise DeploymentError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from None
