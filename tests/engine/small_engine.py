"""An engine over a fake decoder, and requests for it."""

from __future__ import annotations

from fakes import Collected, FakeDecoder, byte_tokenizer, run_to_end

from deepseek_ray.config.engine import EngineConfig
from deepseek_ray.engine.engine import Engine
from deepseek_ray.messages import GenerateRequest, SamplingParams

TOKENIZER = byte_tokenizer()
BYTES_PER_TOKEN = 2 * 6 * 4  # layers, width, float32


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_engine(
    num_blocks: int = 200, decoder: FakeDecoder | None = None, clock: Clock | None = None, **config: int
) -> Engine:
    config = {"block_size": 4, "max_num_batched_tokens": 16, **config}
    kv_cache_bytes = num_blocks * config["block_size"] * BYTES_PER_TOKEN
    return Engine(
        decoder or FakeDecoder(), TOKENIZER, EngineConfig(kv_cache_bytes=kv_cache_bytes, **config), clock or Clock()
    )


def make_request(name: str, num_prompt: int = 5, output: list[int] | None = None, **params: object) -> GenerateRequest:
    """A prompt that differs with the name; greedy, 20 tokens, without end-of-sequence unless told otherwise."""
    params = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, **params}
    prompt = [(sum(map(ord, name)) * 37 + 11 * place) % 256 for place in range(num_prompt)]
    return GenerateRequest(
        request_id=name, prompt_token_ids=prompt, output_token_ids=output or [], params=SamplingParams(**params)
    )


def alone(request: GenerateRequest) -> Collected:
    """Its output from a roomy engine that runs nothing else and computes the prompt at once."""
    return run_to_end(make_engine(max_num_batched_tokens=256), [request])[request.request_id]
