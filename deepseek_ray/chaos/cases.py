"""The requests of a run, and what they must give."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path

from deepseek_ray.chaos.clients import Case
from deepseek_ray.chaos.history import Reference
from deepseek_ray.config.engine import InferenceDtype
from deepseek_ray.llm import LLM
from deepseek_ray.messages import SamplingParams

_SHORT_PROMPT = 32
_STEP = 5
"""The next prompt has as many tokens more, until the longest; then it begins anew."""


def make_cases(model_dir: Path, count: int, longest_prompt: int, num_tokens: int) -> list[Case]:
    """Prompts of several lengths from the standard library's source, greedy and sampled with a seed in turn.

    Of a long prompt's length the shortest has two thirds.
    """
    from deepseek_ray.engine.offline import tokenizer_beside

    tokenizer = tokenizer_beside(str(model_dir))
    text = inspect.getsource(textwrap)
    ids = tokenizer.encode(text) if tokenizer else [byte % 200 for byte in text.encode()]
    shortest = 1 if longest_prompt <= _SHORT_PROMPT else longest_prompt * 2 // 3
    cases = []
    for number in range(count):
        length = shortest + number * _STEP % (longest_prompt - shortest + 1)
        start = number * 37 % (len(ids) - longest_prompt)
        params = SamplingParams(
            temperature=0.0 if number % 2 == 0 else 0.8,
            seed=number,
            max_tokens=num_tokens,
            ignore_eos=True,
            logprobs=0,
        )
        cases.append(Case(ids[start : start + length], params))
    return cases


def make_references(model_dir: Path, dtype: InferenceDtype, cases: Sequence[Case]) -> list[Reference]:
    """What each case gives in one process, alone in its batch."""
    references = []
    with LLM(model_dir, dtype=dtype) as llm:
        for case in cases:
            (output,) = llm.generate([case.prompt_token_ids], case.params, use_tqdm=False)
            ids, entries = output.outputs[0].token_ids, output.outputs[0].logprobs or []
            chosen = [entry[token_id].logprob for token_id, entry in zip(ids, entries, strict=True)]
            references.append(Reference(list(ids), chosen))
    return references
