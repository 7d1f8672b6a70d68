"""llama.cpp under test: `python benchmarks/peers/llama_cpp_driver.py GGUF THREADS` in its own environment.

Speaks as `benchmarks.generation_drivers`. Sequences are fed random tokens, so no sampling is in its times.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from typing import Any

import llama_cpp

_TOKENS = 1024
"""Of one batch, as in the other systems."""
_VOCABULARY = 32000


class Context:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        self._keep = silent
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        assert model, f"{path} was not loaded"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = 32 * 256, 32
        params.n_batch = params.n_ubatch = _TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        assert self._context, "no context"
        self._batch = llama_cpp.llama_batch_init(_TOKENS, 0, 1)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) of each; reads the last logits."""
        for begin in range(0, len(tokens), _TOKENS):
            part = tokens[begin : begin + _TOKENS]
            self._batch.n_tokens = len(part)
            for place, (token, position, sequence, wanted) in enumerate(part):
                self._batch.token[place] = token
                self._batch.pos[place] = position
                self._batch.n_seq_id[place] = 1
                self._batch.seq_id[place][0] = sequence
                self._batch.logits[place] = wanted
            status = llama_cpp.llama_decode(self._context, self._batch)
            assert status == 0, f"llama_decode gave {status}"
        assert llama_cpp.llama_get_logits_ith(self._context, -1)  # waits for what was computed


def measure(context: Context, request: dict[str, Any]) -> dict[str, Any]:
    chance = random.Random(request["seed"])
    sequences, prompt = request["sequences"], request["prompt"]
    context.forget()
    tokens = [
        (chance.randrange(_VOCABULARY), place, sequence, place == prompt - 1)
        for sequence in range(sequences)
        for place in range(prompt)
    ]
    seconds = []
    for step in range(request["tokens"]):
        if step:
            tokens = [(chance.randrange(_VOCABULARY), prompt + step - 1, own, True) for own in range(sequences)]
        started = time.perf_counter()
        context.run(tokens)
        seconds.append(time.perf_counter() - started)
    return {"prefill": seconds[0], "steps": seconds[1:]}


def main() -> None:
    context = Context(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"ready": "llama.cpp"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(context, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
