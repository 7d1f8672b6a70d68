"""Who holds which replica, and what that means for each shard: slots in use and time per step.

Letters: L MoE layers, E routed experts per layer, S shards. A replica is one copy of one expert of one layer; it takes
one slot of the shard that holds it. Slots are counted over all layers, because a shard's memory is.

The time of a shard in a layer is the work it is given over its speed. The replicas of an expert are given tokens in
proportion to the speed of their shards, so each takes the time load / (sum of the speeds of its holders).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepseek_ray.errors import DeploymentError
from deepseek_ray.expert_parallel.placement import Placement


class ShardCapacity(msgspec.Struct, frozen=True):
    """What a shard can take: `slots` experts over all layers, `speed` relative to the other shards."""

    id: int
    speed: float
    slots: int


class ReplicaMove(msgspec.Struct, frozen=True):
    """One replica that appears on a shard or goes from it."""

    layer: int
    expert: int
    shard: int
    kind: Literal["add", "drop"]


class PlacementChange(msgspec.Struct, frozen=True):
    """A new placement, and how it differs from the old one: by layer and expert, adds before drops.

    A drop may name a shard that is no longer there. Whoever adds a replica before dropping another needs one slot more
    on the shard for as long as both exist.
    """

    placement: Placement
    moves: tuple[ReplicaMove, ...]

    @property
    def num_adds(self) -> int:
        """Experts whose weights a shard has to load."""
        return sum(move.kind == "add" for move in self.moves)


@dataclass
class ReplicaGrid:
    """The same as arrays, to be changed in place. Shards stand in order of their ids."""

    layers: tuple[int, ...]
    shards: tuple[ShardCapacity, ...]
    held: NDArray[np.bool_]  # [L, E, S]
    loads: NDArray[np.float64]  # [L, E]

    @property
    def speeds(self) -> NDArray[np.float64]:
        """[S]"""
        return np.array([shard.speed for shard in self.shards])

    def free_slots(self) -> NDArray[np.int64]:
        """[S]; negative where a shard holds too many."""
        return np.array([shard.slots for shard in self.shards]) - self.held.sum(axis=(0, 1))

    def column(self, shard: int) -> int:
        """Place of a shard in the arrays."""
        for column, known in enumerate(self.shards):
            if known.id == shard:
                return column
        raise DeploymentError(f"shard {shard} is not one of {[known.id for known in self.shards]}; name one of those")

    def times(self, row: int) -> NDArray[np.float64]:
        """[S]: time of each shard in the layer at `row`."""
        return shard_times(self.held[row], self.loads[row], self.speeds)

    def placement(self) -> Placement:
        ids = np.array([shard.id for shard in self.shards])
        return {
            layer: [tuple(ids[holders].tolist()) for holders in self.held[row]] for row, layer in enumerate(self.layers)
        }


def grid_of(
    placement: Placement,
    shards: Sequence[ShardCapacity],
    loads: Mapping[int, ArrayLike] | None = None,
) -> ReplicaGrid:
    """Arrays of a placement. Replicas on shards that are not in `shards` are left out; without loads all are 1.

    Raises DeploymentError for shards or loads that make no sense.
    """
    ordered = _checked_shards(shards)
    column = {shard.id: index for index, shard in enumerate(ordered)}
    layers = tuple(placement)
    sizes = {len(placement[layer]) for layer in layers}
    if len(sizes) != 1:
        raise DeploymentError(f"layers with {sorted(sizes)} experts in one placement; give every layer the same number")
    held = np.zeros((len(layers), sizes.pop(), len(ordered)), dtype=np.bool_)
    for row, layer in enumerate(layers):
        for expert, holders in enumerate(placement[layer]):
            held[row, expert, [column[shard] for shard in holders if shard in column]] = True
    return ReplicaGrid(layers, ordered, held, _checked_loads(layers, held.shape[1], loads))


def change_between(before: Placement, after: Placement) -> PlacementChange:
    moves: list[ReplicaMove] = []
    placement: Placement = {}
    for layer, experts in after.items():
        placement[layer] = [tuple(sorted(holders)) for holders in experts]
        for expert, (old, new) in enumerate(zip(before[layer], experts, strict=True)):
            moves += [ReplicaMove(layer, expert, shard, "add") for shard in sorted(set(new) - set(old))]
            moves += [ReplicaMove(layer, expert, shard, "drop") for shard in sorted(set(old) - set(new))]
    return PlacementChange(placement, tuple(moves))


def shard_times(
    held: NDArray[np.bool_], loads: NDArray[np.float64], speeds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Time of each shard in one layer, [S]. held: [E, S]; loads: [E], tokens; speeds: [S], tokens per time."""
    holding_speed = held @ speeds
    replica_times = np.divide(loads, holding_speed, out=np.zeros_like(loads), where=holding_speed > 0)
    return replica_times @ held


def balancedness(
    placement: Placement, loads: Mapping[int, ArrayLike], shards: Sequence[ShardCapacity]
) -> dict[int, float]:
    """layer -> mean time over largest time of a shard: 1 is even, 1/S is all on one shard. 1 where there is no load.

    The mean is what every shard would take if work could be divided at will: all loads over all speeds.
    """
    grid = grid_of(placement, shards, loads)
    result = {}
    for row, layer in enumerate(grid.layers):
        largest = grid.times(row).max()
        result[layer] = float(grid.loads[row].sum() / grid.speeds.sum() / largest) if largest else 1.0
    return result


def _checked_shards(shards: Sequence[ShardCapacity]) -> tuple[ShardCapacity, ...]:
    if not shards:
        raise DeploymentError("no expert shards to place experts on; give at least 1")
    ordered = tuple(sorted(shards, key=lambda shard: shard.id))
    for before, shard in zip((None, *ordered), ordered, strict=False):
        if before and before.id == shard.id:
            raise DeploymentError(f"shard {shard.id} is named twice; name each shard once")
        if not (np.isfinite(shard.speed) and shard.speed > 0):
            raise DeploymentError(f"shard {shard.id} has speed {shard.speed}; use a positive number, 1 for an equal")
        if shard.slots < 0:
            raise DeploymentError(f"shard {shard.id} has {shard.slots} slots; use at least 0")
    return ordered


def _checked_loads(
    layers: tuple[int, ...], num_experts: int, loads: Mapping[int, ArrayLike] | None
) -> NDArray[np.float64]:
    matrix = np.ones((len(layers), num_experts))
    for row, layer in enumerate(layers if loads is not None else ()):
        if layer not in loads:  # type: ignore[operator]
            raise DeploymentError(f"no loads for layer {layer}; give one row for each of {list(layers)}")
        values = np.asarray(loads[layer], dtype=np.float64)  # type: ignore[index]
        if values.shape != (num_experts,):
            raise DeploymentError(
                f"loads of shape {values.shape} for layer {layer}; give one number for each of {num_experts} experts"
            )
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(wrong):
            raise DeploymentError(
                f"load {values[wrong[0]]} of layer {layer}, expert {wrong[0]}; a load is a finite number, at least 0"
            )
        matrix[row] = values
    return matrix
