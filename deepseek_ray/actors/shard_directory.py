"""What an attention worker knows of the expert shards: the newest routing table and where its shards listen."""

from __future__ import annotations

import threading

from deepseek_ray.control.reports import ShardAddress
from deepseek_ray.expert_parallel.dispatch import LayerRoutes
from deepseek_ray.expert_parallel.table import RoutingTable


class ShardDirectory:
    """Written by the report loop, read by the engine's and the reconnecting thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._table: RoutingTable | None = None
        self._shards: dict[int, ShardAddress] = {}
        self._routes: dict[int, LayerRoutes] = {}

    def update(self, table: RoutingTable, shards: dict[int, ShardAddress]) -> None:
        """Take in a table unless a newer one is here."""
        routes = {layer: LayerRoutes(replicas) for layer, replicas in table.replicas.items()}
        with self._changed:
            if self._table is not None and table.version < self._table.version:
                return
            self._table, self._shards, self._routes = table, shards, routes
            self._changed.notify_all()

    @property
    def version(self) -> tuple[int, int]:
        with self._changed:
            return self._table.version if self._table else (0, 0)

    def routes(self, layer: int) -> LayerRoutes:
        with self._changed:
            return self._routes[layer]

    def address(self, shard: int) -> ShardAddress | None:
        """Of the shard's present process; None while it has none that answers."""
        with self._changed:
            return self._shards.get(shard)

    def wait_newer(self, version: tuple[int, int], seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: self._table is not None and self._table.version > version, timeout=seconds
            )
