"""The bigram baseline against counting by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ray.data.kneser_ney import KneserNeyBigram, estimate_discount
from deepseek_ray.errors import DataError

VOCAB = 7
documents_strategy = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=6)


def laid_out(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(token, number) for number, document in enumerate(documents) for token in document]
    return np.array([token for token, _ in pairs]), np.array([number for _, number in pairs])


def slow_probability(documents: list[list[int]], history: int, word: int, discount: float) -> float:
    """The formula of Chen & Goodman, one dictionary at a time."""
    bigrams = Counter(pair for document in documents for pair in pairwise(document))
    before = Counter(w for _, w in bigrams)
    lower_discount = slow_discount(before)
    types = sum(before.values())
    low = max(before[word] - lower_discount, 0) / types + lower_discount * len(before) / types / VOCAB
    total = sum(count for (h, _), count in bigrams.items() if h == history)
    if total == 0:
        return low
    followers = sum(1 for h, _ in bigrams if h == history)
    return max(bigrams[history, word] - discount, 0) / total + discount * followers / total * low


def slow_discount(counts: Counter) -> float:
    once, twice = sum(c == 1 for c in counts.values()), sum(c == 2 for c in counts.values())
    return once / (once + 2 * twice) if once else 0.5


@given(documents=documents_strategy)
def test_equals_the_dictionary_version_and_sums_to_one(documents: list[list[int]]) -> None:
    tokens, document_ids = laid_out(documents)
    if all(len(document) == 1 for document in documents):
        with pytest.raises(DataError, match="no two tokens"):
            KneserNeyBigram.fit(tokens, document_ids, VOCAB)
        return
    model = KneserNeyBigram.fit(tokens, document_ids, VOCAB)
    bigrams = Counter(pair for document in documents for pair in pairwise(document))
    assert model.discount == slow_discount(bigrams)
    histories, words = (grid.ravel() for grid in np.meshgrid(np.arange(VOCAB), np.arange(VOCAB), indexing="ij"))
    probabilities = model.probabilities(histories, words)
    expected = [slow_probability(documents, h, w, model.discount) for h, w in zip(histories, words, strict=True)]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-12)
    np.testing.assert_allclose(probabilities.reshape(VOCAB, VOCAB).sum(axis=1), 1, rtol=1e-12)
    assert (probabilities > 0).all()


def test_by_hand() -> None:
    """Documents `0 1 2` and `0 1`: bigrams 01 twice, 12 once. D = 1 / (1 + 2) = 1/3.

    Words before: N(., 1) = 1, N(., 2) = 1, so D' = 2 / 2 = 1 and p_low is uniform: 1/3 each over 3 ids.
    p(1 | 0) = (2 - 1/3) / 2 + (1/3 * 1 / 2) * 1/3 = 5/6 + 1/18 = 8/9.
    """
    model = KneserNeyBigram.fit(*laid_out([[0, 1, 2], [0, 1]]), vocab_size=3)
    assert model.discount == pytest.approx(1 / 3)
    assert model.probabilities(np.array([0, 2]), np.array([1, 0])) == pytest.approx([8 / 9, 1 / 3])
    tokens, document_ids = laid_out([[0, 1]])
    assert model.nats_per_token(tokens, document_ids) == pytest.approx(-math.log(8 / 9))
    assert model.bits_per_byte(tokens, document_ids, 4.0) == pytest.approx(-math.log2(8 / 9) / 4)


def test_a_given_discount_and_rows_of_samples() -> None:
    """Windows that share one token count every bigram of the stream once."""
    tokens, document_ids = laid_out([[0, 1, 2, 3, 0, 1, 4], [0, 3, 3]])
    stream = KneserNeyBigram.fit(tokens, document_ids, VOCAB, discount=0.25)
    windows = np.stack([np.arange(start, start + 4) for start in (0, 3, 6)])
    rows = KneserNeyBigram.fit(tokens[windows], document_ids[windows], VOCAB, discount=0.25)
    assert stream.discount == 0.25
    assert np.array_equal(stream.bigrams, rows.bigrams)
    assert np.array_equal(stream.counts, rows.counts)
    assert estimate_discount(np.array([3, 4])) == 0.5
    with pytest.raises(DataError, match="validation tokens hold no bigram"):
        stream.nats_per_token(np.array([1, 2]), np.array([0, 1]))
