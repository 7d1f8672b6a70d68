"""The next token of one sequence, from its row of logits.

Rows are handled one by one in float64, so a choice depends on nothing but the row, the request and the place in the
output. The steps and their order are those of vLLM's V1 sampler (vllm/v1/sample/sampler.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from deepseek_ray.engine.philox import uniform
from deepseek_ray.errors import GenerationError
from deepseek_ray.messages import SamplingParams, TokenLogprob

Floats = NDArray[np.float64]
_FIRST_NUCLEUS = 256
"""Most likely tokens that top-p sorts at first; mostly enough, and sorting a whole vocabulary takes 10 ms."""


def choose_token(
    logits: NDArray[np.float32],
    params: SamplingParams,
    seed: int,
    token_ids: list[int],
    num_prompt_tokens: int,
    forbidden_token_ids: Collection[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Choose what follows `token_ids` (prompt, then output). `logits` [vocab_size] float32.

    `allowed` [vocab_size] is the token mask of a structured output, None for a free one. GenerationError when a logit
    is not finite or every token is forbidden. Where the temperature alone decides, `Kernels.draw` is the faster way.
    """
    check_finite(logits, len(token_ids))
    scores = adjust_logits(logits, params, token_ids, num_prompt_tokens, forbidden_token_ids, allowed)
    best = int(scores.argmax())  # the lowest id among equals
    if scores[best] == -np.inf:
        raise GenerationError(
            "min_tokens, with the structure of the output if it has one, forbids every token of the vocabulary; lower "
            "it or list fewer stop ids"
        )
    if params.temperature == 0:
        return best
    return draw(token_weights(scores, params), uniform(seed, len(token_ids) - num_prompt_tokens))


def is_plain(params: SamplingParams) -> bool:
    """Whether nothing but the temperature changes the model's distribution."""
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    cuts = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    return not (penalties or cuts or params.logit_bias)


def check_finite(logits: NDArray[np.float32], place: int) -> None:
    """GenerationError unless every logit of the token at `place` is finite."""
    if not np.isfinite(logits).all():
        raise GenerationError(
            f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are NaN or infinite at token {place}; "
            "the model's weights or its dtype's range are at fault"
        )


def adjust_logits(
    logits: NDArray[np.float32],
    params: SamplingParams,
    token_ids: list[int],
    num_prompt_tokens: int,
    forbidden_token_ids: Iterable[int],
    allowed: NDArray[np.bool_] | None = None,
) -> Floats:
    """Logits after the mask, `min_tokens`, `logit_bias` and the penalties, in this order; [vocab_size] float64.

    What the first two forbid stays forbidden: no bias or penalty lifts minus infinity.
    """
    scores = logits.astype(np.float64)
    if allowed is not None:
        scores[~allowed] = -np.inf
    for token_id in forbidden_token_ids:
        scores[token_id] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        scores[token_id] += bias
    if params.repetition_penalty != 1:
        # CTRL (Keskar et al. 2019, arXiv:1909.05858, section 4.1) as transformers has it: by sign, prompt included.
        seen = np.unique(token_ids)
        scores[seen] *= np.where(scores[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        produced, counts = np.unique(np.array(token_ids[num_prompt_tokens:], dtype=np.int64), return_counts=True)
        scores[produced] -= params.frequency_penalty * counts + params.presence_penalty
    return scores


def token_weights(scores: Floats, params: SamplingParams) -> Floats:
    """Unnormalised probabilities after temperature, min-p, top-k and top-p, in this order; excluded tokens have 0.

    `scores` and the result [vocab_size] float64.
    """
    with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf, which is what it means
        weights = np.exp((scores - scores.max()) / params.temperature)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0.0  # the most likely token has weight 1
    if 0 < params.top_k < weights.size:
        weights[weights < np.partition(weights, -params.top_k)[-params.top_k]] = 0.0  # equals of the last one stay
    if params.top_p < 1:
        weights = _nucleus(weights, params.top_p)
    return weights


def draw(weights: Floats, number: float) -> int:
    """The token at `number` in [0, 1) of the cumulative distribution in id order."""
    cumulative = np.cumsum(weights)
    token_id = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    # number * total can round up to the total, which lies past the last token.
    return token_id if token_id < weights.size else int(np.flatnonzero(weights)[-1])


def describe_choice(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprob:
    """Log-probabilities of the model itself, before any sampling parameter. Equals are ordered by id."""
    exact = logits.astype(np.float64)
    highest = exact.max()
    log_total = highest + np.log(np.exp(exact - highest).sum())
    top = _largest(exact, num_top)
    return TokenLogprob(
        token_id=token_id,
        logprob=float(exact[token_id] - log_total),
        top=[(int(other), float(exact[other] - log_total)) for other in top],
        rank=1 + int(np.count_nonzero(exact > exact[token_id])),
    )


def _nucleus(weights: Floats, top_p: float) -> Floats:
    """Keep the most likely tokens until they hold `top_p` of the weight (the one that reaches it included)."""
    wanted = top_p * weights.sum()
    num_sorted = _FIRST_NUCLEUS
    while True:
        order = _largest(weights, num_sorted)
        cumulative = np.cumsum(weights[order])
        if cumulative[-1] >= wanted or num_sorted >= weights.size:
            break
        num_sorted *= 8
    kept = order[: 1 + np.count_nonzero(cumulative < wanted)]
    nucleus = np.zeros_like(weights)
    nucleus[kept] = weights[kept]
    return nucleus


def _largest(values: Floats, count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest values, largest first, the lower id first among equals."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    count = min(count, values.size)
    candidates = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
