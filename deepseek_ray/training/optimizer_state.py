"""AdamW's state as named tensors: what a checkpoint keeps of the optimiser, whatever strategy trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from deepseek_ray.errors import CheckpointError
from deepseek_ray.models.safetensors_file import open_safetensors

STATE_KINDS = ("exp_avg", "exp_avg_sq", "step")
"""First moment, second moment (both shaped like the parameter), and the number of updates (a float32 scalar)."""

Shape = tuple[int, ...]


def state_name(kind: str, parameter_name: str) -> str:
    return f"{kind}:{parameter_name}"


def state_shapes(trained: Mapping[str, Shape]) -> dict[str, Shape]:
    """Name and shape of every tensor of the optimiser's state; a parameter that had no gradient yet has zeros."""
    kinds = [(name, shape, kind) for name, shape in trained.items() for kind in STATE_KINDS]
    return {state_name(kind, name): () if kind == "step" else shape for name, shape, kind in kinds}


class OptimizerFile:
    """The optimiser's state in a checkpoint, memory-mapped: a worker reads the pages of its own part."""

    def __init__(self, path: Path, trained: Mapping[str, Shape]) -> None:
        """Raises CheckpointError, before any tensor is read, naming one that does not fit the trained parameters."""
        self._tensors = open_safetensors(path)
        self._names = set(self._tensors.keys())
        expected = state_shapes(trained)
        if left := self._names - expected.keys():
            raise CheckpointError(
                f"{path}: optimiser state {min(left)!r} belongs to no trained parameter of this model; the run was "
                "started with another model section: use that one, or start a new run under another name"
            )
        for name in sorted(self._names):
            found = tuple(self._tensors.get_slice(name).get_shape())
            if found != expected[name]:
                raise CheckpointError(
                    f"{path}: optimiser state {name!r} has shape {found}, this model needs {expected[name]}; resume "
                    "with the model section the run was started with"
                )

    def state(self, parameter_name: str) -> dict[str, Tensor]:
        """Kind -> whole tensor; empty for a parameter that the file does not know."""
        names = {kind: state_name(kind, parameter_name) for kind in STATE_KINDS}
        return {kind: self._tensors.get_tensor(name) for kind, name in names.items() if name in self._names}
