"""From one vector per token to one per text, as the files of sentence-transformers beside an encoder say.

`modules.json` lists the steps; the pooling step has a directory with a `config.json`. Without these files the mean over
the tokens is taken, as sentence-transformers does for a bare encoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from deepseek_ray.errors import CheckpointError

Mode = Literal["mean", "cls", "max"]
_MODES: dict[str, Mode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Pooling:
    """How token vectors become a text's vector."""

    mode: Mode = "mean"
    normalize: bool = False
    """Divide by the L2 norm."""

    @classmethod
    def from_dir(cls, model_dir: Path) -> Pooling:
        """CheckpointError for a step or a mode that is not known here: another result would be a silent mistake."""
        file = model_dir / "modules.json"
        if not file.is_file():
            return cls()
        mode: Mode = "mean"
        normalize = False
        for module in _read_json(file):
            match str(module.get("type", "")).rpartition(".")[2]:
                case "Transformer":
                    continue
                case "Pooling":
                    mode = _read_mode(model_dir / str(module.get("path", "")) / "config.json")
                case "Normalize":
                    normalize = True
                case other:
                    raise CheckpointError(
                        f"{file} has the step {other!r}; Transformer, Pooling and Normalize are known: choose a model "
                        "without it"
                    )
        return cls(mode, normalize)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden: [texts, tokens, width], mask: [texts, tokens], 1 for tokens and 0 for padding -> [texts, width]."""
        keep = mask.unsqueeze(-1).to(hidden.dtype)
        match self.mode:
            case "cls":
                pooled = hidden[:, 0]
            case "max":
                pooled = hidden.masked_fill(keep == 0, float("-inf")).amax(1)
            case "mean":
                pooled = (hidden * keep).sum(1) / keep.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def _read_mode(file: Path) -> Mode:
    values = _read_json(file)
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if "pooling_mode" in values and values["pooling_mode"] in _MODES.values():  # how newer versions write it
        return values["pooling_mode"]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise CheckpointError(
            f"{file} pools by {', '.join(chosen) or values.get('pooling_mode')}; exactly one of {', '.join(_MODES)} is "
            "possible: choose another model"
        )
    return _MODES[chosen[0]]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy the model's directory again") from None
