"""What weights of fewer bits cost: loss of the quickstart model on its held-out text, per quantization.

    python -m benchmarks.quantization [runs/quickstart/model] [--tokens 50000]

The inference decoder computes it, in bfloat16, 256 tokens at a time; the text is the same for all.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

import torch

from benchmarks.results_file import write_results
from deepseek_ray.engine.offline import tokenizer_beside
from deepseek_ray.kernels.quantize import QUANTIZATIONS, Quantization
from deepseek_ray.models.checkpoint import CheckpointReader
from deepseek_ray.models.expert_store import ExpertStore, LocalExperts
from deepseek_ray.models.paged_decoder import PagedDecoder
from deepseek_ray.nn.paged import PagedBatch

_LENGTH, _BLOCK = 256, 16
_TEXTS = "test"
"""Part of the standard library that quickstart does not train on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path, nargs="?", default=Path("runs/quickstart/model"))
    parser.add_argument("--tokens", type=int, default=50_000)
    options = parser.parse_args()
    if not options.model_dir.exists():
        sys.exit(f"{options.model_dir} is not there; `make quickstart` trains it, or name another checkpoint")
    windows = held_out(options.model_dir, options.tokens)
    rows = []
    kinds: list[Quantization | None] = [None, *QUANTIZATIONS]
    for kind in kinds:
        nats = loss(options.model_dir, kind, windows)
        rows.append({"quantization": kind or "none", "nats_per_token": nats, "against_none": 0.0})
        rows[-1]["against_none"] = nats / float(rows[0]["nats_per_token"]) - 1
        print(f"{kind or 'none':>6}  {nats:.5f} nats per token, {100 * float(rows[-1]['against_none']):+.3f} %")
    write_results("quantization", {"tokens": windows.numel(), "rows": rows})


def held_out(model_dir: Path, tokens: int) -> torch.Tensor:
    """Token ids [windows, 256] of source files."""
    tokenizer = tokenizer_beside(str(model_dir))
    assert tokenizer is not None
    ids: list[int] = []
    for path in sorted((Path(sysconfig.get_path("stdlib")) / _TEXTS).rglob("*.py")):
        ids += tokenizer.encode(path.read_text(errors="ignore")[:20_000])
        if len(ids) >= tokens:
            break
    return torch.tensor(ids[: len(ids) // _LENGTH * _LENGTH]).view(-1, _LENGTH)


def loss(model_dir: Path, quantization: Quantization | None, windows: torch.Tensor) -> float:
    """Mean negative log-likelihood of every token but the first of its window."""
    reader = CheckpointReader(model_dir)
    held = {layer: range(reader.config.n_routed_experts) for layer in reader.config.moe_layers}
    store = ExpertStore(reader, held, torch.bfloat16, quantization=quantization)
    decoder = PagedDecoder(reader, torch.bfloat16, LocalExperts(store), quantization=quantization)
    cache = decoder.new_cache(_LENGTH // _BLOCK, _BLOCK)
    places = torch.arange(_LENGTH)
    total = 0.0
    for ids in windows:
        batch = PagedBatch(
            token_ids=ids,
            positions=places,
            slots=places,
            sequence_rows=torch.zeros(_LENGTH, dtype=torch.int32),
            block_tables=torch.arange(_LENGTH // _BLOCK, dtype=torch.int32).view(1, -1),
            logit_rows=places[:-1],
        )
        logits = decoder.forward(batch, cache)
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    return total / (len(windows) * (_LENGTH - 1))


if __name__ == "__main__":
    main()
