"""An interpolated Kneser-Ney bigram model: the figure a neural model has to beat on the same tokens.

With counts c(h, w) of training bigrams, N(h, .) distinct words after h, N(., w) distinct words before w and N(., .)
distinct bigrams (Chen & Goodman 1999, "An empirical study of smoothing techniques", section 3 and equation 23):

    p(w | h) = max(c(h, w) - D, 0) / c(h) + D * N(h, .) / c(h) * p_low(w)
    p_low(w) = max(N(., w) - D', 0) / N(., .) + D' * |{w: N(., w) > 0}| / N(., .) / V

After an unseen h, p(w | h) = p_low(w). D = n1 / (n1 + 2 n2), from the numbers of bigrams seen once and twice; D' the
same from the counts N(., w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deepseek_ray.errors import DataError


@dataclass(frozen=True)
class KneserNeyBigram:
    """A fitted model. Histories and words are token ids below `vocab_size`."""

    vocab_size: int
    bigrams: np.ndarray
    """[distinct bigrams] int64, `history * vocab_size + word`, ascending."""
    counts: np.ndarray
    """[distinct bigrams] int64."""
    history_counts: np.ndarray
    """[vocab_size] int64: c(h), training bigrams that begin with h."""
    history_types: np.ndarray
    """[vocab_size] int64: N(h, .)."""
    lower: np.ndarray
    """[vocab_size] float64: p_low."""
    discount: float

    @classmethod
    def fit(
        cls, tokens: np.ndarray, document_ids: np.ndarray, vocab_size: int, discount: float | None = None
    ) -> KneserNeyBigram:
        """Count the bigrams of `tokens` within documents.

        `tokens` and `document_ids`: [tokens] (a stream) or [samples, tokens] (rows are separate), integers, as
        `TokenBlocks.stream()` and `.samples()` give them. `discount` in [0, 1]; None estimates it from the counts.
        """
        histories, words = _bigrams(tokens, document_ids)
        if not len(words):
            raise DataError("no two tokens of one document follow each other; a bigram model needs training text")
        bigrams, counts = np.unique(histories * vocab_size + words, return_counts=True)
        history_types = np.bincount(bigrams // vocab_size, minlength=vocab_size)
        word_types = np.bincount(bigrams % vocab_size, minlength=vocab_size)
        lower_discount = estimate_discount(word_types)
        num_types = len(bigrams)
        spared = lower_discount * np.count_nonzero(word_types) / num_types
        lower = np.maximum(word_types - lower_discount, 0) / num_types + spared / vocab_size
        return cls(
            vocab_size=vocab_size,
            bigrams=bigrams,
            counts=counts,
            history_counts=np.bincount(histories, minlength=vocab_size),
            history_types=history_types,
            lower=lower,
            discount=estimate_discount(counts) if discount is None else discount,
        )

    def probabilities(self, histories: np.ndarray, words: np.ndarray) -> np.ndarray:
        """p(word | history) of each pair: two [pairs] integer arrays in, [pairs] float64 out, all above 0."""
        keys = histories * self.vocab_size + words
        places = np.minimum(np.searchsorted(self.bigrams, keys), len(self.bigrams) - 1)
        counts = np.where(self.bigrams[places] == keys, self.counts[places], 0)
        totals = self.history_counts[histories]
        seen = np.maximum(totals, 1)
        high = np.maximum(counts - self.discount, 0) / seen
        weight = np.where(totals > 0, self.discount * self.history_types[histories] / seen, 1.0)
        return high + weight * self.lower[words]

    def nats_per_token(self, tokens: np.ndarray, document_ids: np.ndarray) -> float:
        """Mean negative log-likelihood of the predicted tokens; arguments as for `fit`."""
        histories, words = _bigrams(tokens, document_ids)
        if not len(words):
            raise DataError("the validation tokens hold no bigram; raise validation_fraction or add text")
        return float(-np.log(self.probabilities(histories, words)).mean())

    def bits_per_byte(self, tokens: np.ndarray, document_ids: np.ndarray, bytes_per_token: float) -> float:
        """Bits per UTF-8 byte of text; `bytes_per_token` is that of the blocks the tokens are from."""
        return self.nats_per_token(tokens, document_ids) / (math.log(2) * bytes_per_token)


def estimate_discount(counts: np.ndarray) -> float:
    """n1 / (n1 + 2 n2) (Ney, Essen & Kneser 1994); 0.5 when nothing was seen once or twice."""
    once, twice = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    return once / (once + 2 * twice) if once else 0.5


def _bigrams(tokens: np.ndarray, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(histories, words), both [pairs] int64: neighbours within one document."""
    together = document_ids[..., :-1] == document_ids[..., 1:]
    return tokens[..., :-1][together].astype(np.int64), tokens[..., 1:][together].astype(np.int64)
