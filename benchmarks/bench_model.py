"""`bench-mini`: the DeepSeek-V3 architecture at V2-Lite widths cut to 5 layers, random bfloat16 weights N(0, 0.02); and
a model of its kind that costs next to nothing."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from deepseek_ray.config.model import ModelConfig
from deepseek_ray.data.tokenizer_training import save_tokenizer, train_tokenizer
from deepseek_ray.models.checkpoint import INDEX_FILE
from deepseek_ray.models.save import save_checkpoint
from deepseek_ray.models.shapes import CORRECTION_BIAS, parameter_shapes

BENCH_MINI = ModelConfig.parse(
    {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 4096,
    }
)


BENCH_SMALL = BENCH_MINI.model_copy(
    update={
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
)
"""With the vocabulary of bench-mini, so that one tokenizer and one set of prompts serve both."""


def bench_mini_dir(root: Path = Path(".cache/bench")) -> Path:
    """The checkpoint (5.1 GB) and a tokenizer of the standard library's source, written at the first call."""
    directory = root / "bench-mini"
    _write_model(directory, BENCH_MINI)
    if not (directory / "tokenizer.json").exists():
        texts = (path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")))
        save_tokenizer(train_tokenizer(texts, BENCH_MINI.vocab_size), directory)
    return directory


def uneven_bench_mini_dir(strength: float, root: Path = Path(".cache/bench")) -> Path:
    """bench-mini whose gates favour some experts: the expert of rank r, another one in each layer, has the correction
    bias -strength * ln(1 + r). Everything else is read where bench-mini has it."""
    even = bench_mini_dir(root)
    directory = root / f"bench-mini-uneven-{strength:g}"
    directory.mkdir(exist_ok=True)
    for path in even.iterdir():
        if path.name != INDEX_FILE and not (directory / path.name).exists():
            (directory / path.name).symlink_to(path.resolve())
    generator = torch.Generator().manual_seed(0)
    biases = {}
    for layer in BENCH_MINI.moe_layers:
        ranks = torch.randperm(BENCH_MINI.n_routed_experts, generator=generator)
        biases[f"model.layers.{layer}.{CORRECTION_BIAS}"] = -strength * (1 + ranks).log()
    save_file(biases, directory / "biases.safetensors")
    index = json.loads((even / INDEX_FILE).read_text())
    index["weight_map"] |= dict.fromkeys(biases, "biases.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps(index))
    return directory


def bench_small_dir(root: Path = Path(".cache/bench")) -> Path:
    """A model that costs next to nothing, with the tokenizer of bench-mini."""
    directory = root / "bench-small"
    _write_model(directory, BENCH_SMALL)
    shutil.copy(bench_mini_dir(root) / "tokenizer.json", directory)
    return directory


def _write_model(directory: Path, config: ModelConfig) -> None:
    if not (directory / "config.json").exists():
        print(f"writing {directory} ({config.num_parameters / 1e6:,.0f} M parameters) ...", flush=True)
        save_checkpoint(directory, config, _random_tensors(config))


def _random_tensors(config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where it takes a minute less
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in parameter_shapes(config).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        elif name.endswith("e_score_correction_bias"):
            yield name, torch.zeros(shape)
        else:
            yield name, (torch.randn(shape, generator=generator, device=device) * 0.02).bfloat16().cpu()
