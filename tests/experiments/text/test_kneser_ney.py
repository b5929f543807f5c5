from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.text import kneser_ney
from glm_edge.errors import DataError


def grams(tokens, k):
    return [tuple(tokens[i : i + k]) for i in range(len(tokens) - k + 1)]


def reference_counts(tokens, order):
    """Counts by order, from the definition: distinct left neighbours below the highest order."""
    counts = {order: Counter(grams(tokens, order))}
    for k in range(1, order):
        left = {(gram[1:], gram[0]) for gram in grams(tokens, k + 1)}
        counts[k] = Counter(gram for gram, _ in left)
    return counts


def reference_discounts(counts):
    n = [sum(1 for c in counts.values() if c == i) for i in range(5)]
    if 0 in n[1:]:
        return [0.0, *kneser_ney.FALLBACK_DISCOUNTS]
    y = n[1] / (n[1] + 2 * n[2])
    found = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
    usable = all(0 <= d <= i for i, d in enumerate(found, start=1))
    return [0.0, *(found if usable else kneser_ney.FALLBACK_DISCOUNTS)]


def reference_probability(counts, discounts, vocab_size, context, token):
    if context is None:
        return 1.0 / vocab_size
    k = len(context) + 1
    lower = reference_probability(
        counts, discounts, vocab_size, context[1:] if context else None, token
    )
    followers = [c for gram, c in counts[k].items() if gram[:-1] == context]
    if not sum(followers):
        return lower
    d = discounts[k]
    count = counts[k][(*context, token)]
    freed = sum(d[min(c, 3)] for c in followers)
    return (count - d[min(count, 3)] + freed * lower) / sum(followers)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(8, 120), st.integers(0, 2**32 - 1))
def test_equals_plain_python(order, vocab_size, length, seed):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(vocab_size, 0.5))
    tokens = rng.choice(vocab_size, length, p=weights)
    held_out = np.concatenate(
        [rng.choice(vocab_size, 20, p=weights), rng.integers(0, vocab_size, 9)]
    )
    model = kneser_ney.train(tokens, vocab_size, order)

    counts = reference_counts(tokens.tolist(), order)
    discounts = {k: reference_discounts(counts[k]) for k in counts}
    expected = [
        reference_probability(
            counts,
            discounts,
            vocab_size,
            tuple(held_out[max(0, i - order + 1) : i].tolist()),
            token,
        )
        for i, token in enumerate(held_out.tolist())
    ]
    np.testing.assert_allclose(np.exp(model.log_probs(held_out)), expected, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(2, 40), st.integers(8, 2000), st.integers(0, 2**32 - 1))
def test_distributions_sum_to_one(order, vocab_size, length, seed):
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.geometric(0.2, length), vocab_size) - 1
    model = kneser_ney.train(tokens, vocab_size, order)
    seen = tokens[length // 2 : length // 2 + order + 2]
    for context in ([], seen, seen[-1:], rng.integers(0, vocab_size, order), tokens[-order:]):
        probability = model.distribution(context)
        assert probability.min() > 0
        assert probability.sum() == pytest.approx(1.0, abs=1e-12)
        following = [model.log_probs(np.array([*context, w]))[-1] for w in range(vocab_size)]
        np.testing.assert_allclose(np.log(probability), following, rtol=1e-9)


def test_discounts_are_estimated_where_the_text_allows():
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.3, 20000), 500) - 1
    model = kneser_ney.train(tokens, 500, 3)
    assert model.order == 3
    assert model.discounts.shape == (3, 3)
    assert tuple(model.discounts[2]) != kneser_ney.FALLBACK_DISCOUNTS
    assert np.all(model.discounts >= 0)
    assert np.all(model.discounts <= [1, 2, 3])


def test_longer_contexts_predict_a_repeating_text_better():
    rng = np.random.default_rng(1)
    tokens = np.cumsum(rng.choice([1, 2, 7], 6000, p=[0.8, 0.15, 0.05])) % 50
    losses = [
        -kneser_ney.train(tokens[:5000], 50, order).log_probs(tokens[5000:]).mean()
        for order in (1, 2)
    ]
    assert losses[1] < losses[0] - 1.0


def test_bad_tokens():
    model = kneser_ney.train(np.arange(9) % 3, 3, 2)
    for bad in ([0, 3], [-1]):
        with pytest.raises(DataError, match="vocabulary of 3"):
            model.log_probs(np.array(bad))
        with pytest.raises(DataError, match="vocabulary of 3"):
            kneser_ney.train(np.array([0, 1, *bad]), 3, 2)
    with pytest.raises(DataError, match="too few"):
        kneser_ney.train(np.array([1]), 3, 2)
    assert len(model.log_probs(np.array([], int))) == 0
