"""NaN and infinity are found when weights are read, by name, not in the text they would produce."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_ray.errors import CheckpointError


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; CheckpointError with the count of bad values if any is NaN or infinite."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise CheckpointError(
            f"{name} holds {bad} non-finite values (NaN or infinity) of {tensor.numel()}; "
            "the checkpoint is damaged or training diverged: use an earlier checkpoint"
        )
    return tensor
