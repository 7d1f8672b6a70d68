"""How long one token takes: measured with the engine on random weights of an architecture, not estimated."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from deepseek_ray.config.engine import DeploymentConfig, EngineConfig
from deepseek_ray.config.model import ModelConfig
from deepseek_ray.engine.offline import LocalBackend
from deepseek_ray.messages import GenerateRequest, SamplingParams
from deepseek_ray.models.save import save_checkpoint
from deepseek_ray.models.shapes import parameter_shapes

_PROMPT_TOKENS, _OUTPUT_TOKENS, _ROUNDS = 16, 33, 3
_MOST_CONTEXT = 256


def measure_decode_latency(model: ModelConfig, dtype: str = "bfloat16") -> float:
    """Milliseconds from one token to the next for a single sequence on one thread; the median of three rounds of 32.

    Writes a checkpoint with random weights to a temporary directory and decodes with the engine that serves. Whatever
    runs beside it on the machine disturbs the figure; medians keep short disturbances out.
    """
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="deepseek-ray-latency-") as directory:
            save_checkpoint(Path(directory), model, _random_tensors(model))
            context = min(_MOST_CONTEXT, model.max_position_embeddings)
            engine = EngineConfig(max_num_seqs=1, max_model_len=context)
            config = DeploymentConfig(model_dir=directory, dtype=dtype, threads=1, engine=engine)  # type: ignore[arg-type]
            backend = LocalBackend(config)
            seconds = [_decode(backend, seed, context) for seed in range(_ROUNDS + 1)][1:]  # the first warms up
            backend.shutdown()
    finally:
        torch.set_num_threads(threads)
    return 1000 * statistics.median(itertools.chain.from_iterable(seconds))


def _decode(backend: LocalBackend, seed: int, context: int) -> list[float]:
    """Seconds between tokens. Samples at temperature 1: greedy decoding of a random model stays with few experts."""
    prompt_tokens = min(_PROMPT_TOKENS, context // 2)
    generator = torch.Generator().manual_seed(seed)
    request = GenerateRequest(
        request_id=f"latency-{seed}",
        prompt_token_ids=torch.randint(backend.vocab_size, (prompt_tokens,), generator=generator).tolist(),
        params=SamplingParams(max_tokens=min(_OUTPUT_TOKENS, context - prompt_tokens), seed=seed, ignore_eos=True),
    )
    times = [time.perf_counter() for event in backend.run([request]) if event.token_ids]
    return [after - before for before, after in itertools.pairwise(times)]


def _random_tensors(model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in parameter_shapes(model).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16)
        elif name.endswith("e_score_correction_bias"):
            yield name, torch.zeros(shape)
        else:
            yield name, (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
