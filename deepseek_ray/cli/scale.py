"""`deepseek-ray scale`, `drain`, `rebalance`, `replicate` and `move`: changes of a deployment while it serves."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deepseek_ray.cli.running import Address, AsJson, Name, running_deployment
from deepseek_ray.cli.status import show_status

Layer = Annotated[int, typer.Argument(help="Decoder layer, as `deepseek-ray experts --json` numbers them.", min=0)]
Expert = Annotated[int, typer.Argument(help="Routed expert of that layer.", min=0)]
Wait = Annotated[float, typer.Option(help="Seconds to wait until the change is complete; 0 returns at once.", min=0)]


def scale(
    expert_shards: Annotated[
        int | None, typer.Option(help="Expert shards there shall be.", show_default="as now")
    ] = None,
    attention_workers: Annotated[
        int | None, typer.Option(help="Attention workers there shall be.", show_default="as now")
    ] = None,
    name: Name = None,
    address: Address = None,
    wait: Wait = 120.0,
    as_json: AsJson = False,
) -> None:
    """Change the number of expert shards or attention workers while the model is served.

    New shards take experts from the busiest ones; shards and workers that go hand over what they have first. No request
    fails, and no token changes.

    [bold]Examples[/bold]

      deepseek-ray scale --expert-shards 3\n
      deepseek-ray scale --expert-shards 2 --attention-workers 2 --wait 0
    """
    if expert_shards is None and attention_workers is None:
        raise typer.BadParameter("give --expert-shards, --attention-workers or both")
    _change(name, address, wait, as_json, "scale", attention_workers, expert_shards)


def drain(
    role: Annotated[str, typer.Argument(help="attention_worker or expert_shard.")],
    id: Annotated[int, typer.Argument(help="Its id, as `deepseek-ray status` shows it.", min=0)],
    name: Name = None,
    address: Address = None,
    wait: Wait = 120.0,
    as_json: AsJson = False,
) -> None:
    """Empty one process and end it, for example before its node goes away.

    An expert shard's experts are loaded elsewhere first; an attention worker finishes what it has, up to the
    deployment's drain_seconds, then its sequences go on elsewhere.

    [bold]Examples[/bold]

      deepseek-ray drain expert_shard 1\n
      deepseek-ray drain attention_worker 0 --name second
    """
    _change(name, address, wait, as_json, "drain", role, id)


def rebalance(
    extra_replicas: Annotated[
        int, typer.Option(help="Replicas a layer may have beyond one of each expert, for the hottest ones.", min=0)
    ] = 0,
    min_replicas: Annotated[int, typer.Option(help="Replicas each expert shall have, on different shards.", min=1)] = 1,
    name: Name = None,
    address: Address = None,
    wait: Wait = 120.0,
    as_json: AsJson = False,
) -> None:
    """Move and replicate experts so that the busiest shard is less busy, by the load of the last minute.

    With --min-replicas 2 the loss of any one shard costs no token's time: the other replica answers at once.

    [bold]Examples[/bold]

      deepseek-ray rebalance\n
      deepseek-ray rebalance --extra-replicas 8\n
      deepseek-ray rebalance --min-replicas 2
    """
    _change(name, address, wait, as_json, "rebalance", extra_replicas, min_replicas)


def replicate(
    layer: Layer,
    expert: Expert,
    shard: Annotated[int, typer.Argument(help="Expert shard that shall hold it as well.", min=0)],
    name: Name = None,
    address: Address = None,
    wait: Wait = 120.0,
    as_json: AsJson = False,
) -> None:
    """Put one more replica of an expert on a shard. The next rebalance may take it away again.

    [bold]Examples[/bold]

      deepseek-ray replicate 3 17 1\n
      deepseek-ray replicate 3 17 1 --wait 0 --json
    """
    _change(name, address, wait, as_json, "replicate", layer, expert, shard)


def move(
    layer: Layer,
    expert: Expert,
    source: Annotated[int, typer.Argument(help="Expert shard that holds it.", min=0)],
    destination: Annotated[int, typer.Argument(help="Expert shard that shall hold it instead.", min=0)],
    name: Name = None,
    address: Address = None,
    wait: Wait = 120.0,
    as_json: AsJson = False,
) -> None:
    """Move an expert from one shard to another: loaded there first, dropped here last.

    [bold]Examples[/bold]

      deepseek-ray move 3 17 0 1
    """
    _change(name, address, wait, as_json, "move", layer, expert, source, destination)


def _change(name: str | None, address: str | None, wait: float, as_json: bool, command: str, *wish: Any) -> None:
    with running_deployment(name, address) as found:
        from deepseek_ray.actors.deployment import change_deployment

        show_status(change_deployment(found, command, *wish, wait_seconds=wait), as_json)
