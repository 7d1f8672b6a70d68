"""`deepseek-ray status`: the processes of a deployment."""

from __future__ import annotations

import json
from typing import Any

from deepseek_ray.cli.running import Address, AsJson, Name, running_deployment


def status(name: Name = None, address: Address = None, as_json: AsJson = False) -> None:
    """Show the router, attention workers and expert shards of a deployment.

    [bold]Examples[/bold]

      deepseek-ray status\n
      deepseek-ray status --name second --json\n
      deepseek-ray status --address 10.0.0.1:6379
    """
    with running_deployment(name, address) as found:
        from deepseek_ray.actors.deployment import deployment_status

        show_status(deployment_status(found), as_json)


def show_status(shown: dict[str, Any], as_json: bool) -> None:
    """Print what the router says of its members."""
    if as_json:
        print(json.dumps(shown))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"epoch {shown['epoch']}", title_justify="left")
    for column in ("role", "id", "pid", "state", "restarts", "node"):
        table.add_column(column, justify="right" if column in ("id", "pid", "restarts") else "left")
    for actor in shown["actors"]:
        values = (actor[key] for key in ("role", "id", "pid", "state", "restarts"))
        table.add_row(*map(str, values), actor["node_id"][:8])
    Console().print(table)
