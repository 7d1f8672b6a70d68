"""AdamW's state as named tensors: what a checkpoint keeps of the optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from deepseek_ray.errors import CheckpointError

_KINDS = ("exp_avg", "exp_avg_sq", "step")
"""First moment, second moment (both shaped like the parameter), and the number of updates (a float32 scalar)."""


def optimizer_tensors(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """State by `<kind>:<parameter name>`; parameters that never had a gradient have none."""
    tensors = {}
    for name, parameter in named_parameters:
        if state := optimizer.state.get(parameter):
            tensors.update({f"{kind}:{name}": state[kind].detach() for kind in _KINDS})
    return tensors


def restore_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    source: str,
) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError naming a tensor that fits no parameter."""
    left = set(tensors)
    for name, parameter in named_parameters:
        state = {kind: tensors[f"{kind}:{name}"] for kind in _KINDS if f"{kind}:{name}" in tensors}
        if not state:
            continue
        _check(name, parameter, state, source)
        left -= {f"{kind}:{name}" for kind in _KINDS}
        optimizer.state[parameter] = {kind: value.to(parameter.device, copy=True) for kind, value in state.items()}
    if left:
        raise CheckpointError(
            f"{source}: optimiser state {min(left)!r} belongs to no parameter of this model; the run was started with "
            "another model section: use that one, or start a new run under another name"
        )


def _check(name: str, parameter: nn.Parameter, state: Mapping[str, Tensor], source: str) -> None:
    for kind in _KINDS:
        expected = () if kind == "step" else tuple(parameter.shape)
        found = tuple(state[kind].shape) if kind in state else None
        if found != expected:
            raise CheckpointError(
                f"{source}: optimiser state '{kind}:{name}' has shape {found}, this model needs {expected}; resume "
                "with the model section the run was started with"
            )
