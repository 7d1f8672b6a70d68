"""What a finished run leaves behind, for people and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class PretrainResult:
    """Paths and last figures of a run; also written to `result.json` in the run's directory."""

    run_dir: str
    checkpoint: str
    """Directory of the last checkpoint: serve it, or load it with `transformers`."""
    step: int
    """Optimiser steps of the whole run, those before a resume included."""
    tokens: int
    """Tokens trained on, in all those steps."""
    loss: float
    """Cross-entropy of the last step's batch, nats per token."""
    validation_loss: float
    validation_bits_per_byte: float
    tokens_per_second: float
    """Median over the steps of this start; 0 when there was nothing left to do."""

    def write(self) -> None:
        path = Path(self.run_dir) / RESULT_FILE
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainResult:
        return cls(**values)

    def describe(self) -> str:
        return (
            f"step {self.step}: loss {self.loss:.4f}, validation loss {self.validation_loss:.4f} "
            f"({self.validation_bits_per_byte:.4f} bits per byte), {self.tokens_per_second:,.0f} tokens/s\n"
            f"checkpoint {self.checkpoint}"
        )
