"""The routing table: where each expert of each layer is, and under which command it was published."""

from __future__ import annotations

import msgspec


class RoutingTable(msgspec.Struct, frozen=True):
    """`(layer, logical expert) -> shard`, published by the router.

    A table is newer than another if its `(generation, epoch)` is larger: the generation counts router starts, the epoch
    the changes one router made.
    """

    generation: int
    epoch: int
    owners: dict[int, list[int]]
    """layer -> shard of each logical expert."""

    @property
    def version(self) -> tuple[int, int]:
        return (self.generation, self.epoch)
