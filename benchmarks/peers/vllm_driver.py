"""vLLM on the CPU under test: `python benchmarks/peers/vllm_driver.py MODEL_DIR THREADS` in its own environment.

Speaks as `benchmarks.generation_drivers`; every sequence samples at temperature 1, prefixes are not cached.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from typing import Any

_TOKENS = 1024
"""Of one step, as in the other systems."""
_VOCABULARY = 32000


def engine(model_dir: str) -> Any:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=model_dir,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=64,
            max_num_batched_tokens=_TOKENS,
            max_model_len=1024,
        )
    )


def measure(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    chance = random.Random(request["seed"])
    for index in range(request["sequences"]):
        prompt = [chance.randrange(_VOCABULARY) for _ in range(request["prompt"])]
        params = SamplingParams(
            temperature=1.0, seed=index, max_tokens=request["tokens"], ignore_eos=True, detokenize=False
        )
        engine.add_request(f"{request['seed']}-{index}-{time.monotonic_ns()}", {"prompt_token_ids": prompt}, params)
    counts: dict[str, int] = {}
    started, done, times = time.perf_counter(), 0, []
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        if len(counts) == request["sequences"] and min(counts.values()) > done:
            done = min(counts.values())
            times.append(time.perf_counter())
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {"prefill": times[0] - started, "steps": steps}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    running = engine(sys.argv[1])
    print(json.dumps({"ready": "vllm"}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(running, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
