"""The routing table: which shards hold each expert of each layer, and under which command it was published."""

from __future__ import annotations

import msgspec

from deepseek_ray.expert_parallel.placement import Placement


class RoutingTable(msgspec.Struct, frozen=True):
    """`(layer, logical expert) -> shards with a replica`, published by the router.

    A table is newer than another if its `(generation, epoch)` is larger: the generation counts router starts, the epoch
    the changes one router made.
    """

    generation: int
    epoch: int
    replicas: Placement

    @property
    def version(self) -> tuple[int, int]:
        return (self.generation, self.epoch)
