"""Training speed against transformers: the same 109 M parameter model, weights, batches and trainer, one worker.

    python -m benchmarks.training [--steps 12] [--threads 2]

Both models are trained by `TrainStep` in one process and take turns, step by step, so whatever slows the machine slows
both. Sums of losses are in another order, so the curves agree up to rounding.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.results_file import write_results
from benchmarks.training_profile import product_rate, time_by_kind
from deepseek_ray.config.run import PretrainConfig
from deepseek_ray.data.loader import Batch
from deepseek_ray.data.tokenizer_training import train_tokenizer
from deepseek_ray.models.decoder import DeepSeekForCausalLM, ModelOutput
from deepseek_ray.models.load import save_model
from deepseek_ray.training.ranks import Ranks
from deepseek_ray.training.step import TrainStep
from deepseek_ray.training.strategies import parallelism_for

MODEL = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "moe_intermediate_size": 256,
    "num_hidden_layers": 8, "num_attention_heads": 8, "n_shared_experts": 1, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "kv_lora_rank": 128, "q_lora_rank": 192,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
CONFIG = PretrainConfig.parse(
    {
        "name": "training-speed",
        "model": MODEL,
        "data": {"sequence_length": 256, "vocab_size": 8192},
        "schedule": {"warmup_steps": 4},
        "balance": {"sequence_loss_alpha": 0.0, "bias_update_speed": 0.0},  # transformers has neither
        "training": {"steps": 1000, "global_batch_size": 8, "micro_batch_size": 4},
    }
)
_WARM_UP_STEPS = 2


class TransformersModel(nn.Module):
    """A transformers model with the face of our decoder, as far as the trainer looks at it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.moe_modules: list[nn.Module] = []

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None, with_mtp: bool = False) -> ModelOutput:
        assert document_ids is None and not with_mtp
        logits = self.inner(input_ids, use_cache=False).logits
        return ModelOutput(logits, hidden=logits, gates=())  # nobody reads `hidden` without prediction layers


def trainers(directory: Path) -> dict[str, TrainStep]:
    """One per model, from the same weights."""
    torch.manual_seed(0)
    own = DeepSeekForCausalLM(CONFIG.model)
    save_model(own, directory)
    made = {}
    for name, model in {"deepseek_ray": own, "transformers": TransformersModel(directory)}.items():
        parallelism = parallelism_for(CONFIG, Ranks(0, 1))
        parallelism.prepare(model)  # type: ignore[arg-type]
        made[name] = TrainStep(parallelism)
    return made


class Text:
    """Batches of Python's standard library, each sample from one place of it."""

    def __init__(self) -> None:
        texts = [path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
        tokenizer = train_tokenizer(texts, CONFIG.model.vocab_size)
        self._tokens = torch.tensor(tokenizer.encode("".join(texts)).ids)

    def batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        length, training = CONFIG.data.sequence_length + 1, CONFIG.training
        starts = torch.randint(len(self._tokens) - length, (training.global_batch_size, 1), generator=generator)
        tokens = self._tokens[starts + torch.arange(length)]
        parts = tokens.split(training.micro_batch_size)
        return [{"tokens": part, "document_ids": torch.zeros_like(part)} for part in parts]


def measure(steps: int) -> dict[str, dict[str, Any]]:
    """Of each model: seconds and loss of every step, and where the time of one more goes."""
    text = Text()
    with tempfile.TemporaryDirectory() as directory:
        made = trainers(Path(directory))
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in made}
    for step in range(1, steps + 1):
        batches = text.batches(step)
        for name, trainer in made.items():
            started = time.perf_counter()
            found[name]["losses"].append(trainer.run(step, batches).loss)
            found[name]["seconds"].append(time.perf_counter() - started)
        print(
            f"step {step}: " + ", ".join(f"{name} {own['seconds'][-1]:.2f} s" for name, own in found.items()),
            flush=True,
        )
    last = text.batches(steps + 1)
    for name, trainer in made.items():
        found[name]["profile"] = time_by_kind(lambda trainer=trainer: trainer.run(steps + 1, last))  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.steps)
    multiplied = CONFIG.model.num_active_parameters - CONFIG.model.vocab_size * CONFIG.model.hidden_size
    rows: list[dict[str, Any]] = [
        {
            "system": name,
            "tokens_per_second": CONFIG.tokens_per_step / statistics.median(own["seconds"][_WARM_UP_STEPS:]),
            "losses": own["losses"],
            "profile": own["profile"],
        }
        for name, own in found.items()
    ]
    pairs = zip(*(row["losses"] for row in rows), strict=True)
    result = {
        "question": "tokens per second of training against transformers, same trainer, float32",
        "threads": options.threads,
        "parameters": CONFIG.model.num_parameters,
        "active_parameters": CONFIG.model.num_active_parameters,
        "tokens_per_step": CONFIG.tokens_per_step,
        "product_flop_per_step": 6 * multiplied * CONFIG.tokens_per_step,
        "product_flop_per_second": product_rate(),
        "steps": options.steps,
        "max_loss_difference": max(abs(a - b) for a, b in pairs),
        "rows": rows,
    }
    for row in rows:
        print(f"{row['system']:>12}  {row['tokens_per_second']:7.1f} tokens/s  last loss {row['losses'][-1]:.4f}")
        print(", ".join(f"{kind} {spent:.0f} ms" for kind, spent in row["profile"].items()))
    write_results("training", result)


if __name__ == "__main__":
    main()
