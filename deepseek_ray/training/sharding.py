"""Between a tensor that is spread over workers and the whole of it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`; for a DTensor every worker of its mesh has to call."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach()


def like(owner: Tensor, value: Tensor) -> Tensor:
    """This worker's part of a whole tensor, spread and placed as `owner`; nothing is exchanged."""
    if isinstance(owner, DTensor):
        local = value.to(owner.to_local().device)
        return distribute_tensor(local, owner.device_mesh, owner.placements, src_data_rank=None)
    return value.to(owner.device, copy=True)
