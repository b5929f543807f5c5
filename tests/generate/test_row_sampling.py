"""Rules per row against the same rules in a batch of one kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from glm_edge.generate.row_sampling import (
    MAX_LOGPROBS,
    RowRules,
    RowText,
    draw_rows,
    row_key,
)
from glm_edge.generate.sampling import Sampling, sample

VOCABULARY, LENGTH, PROMPT = 40, 30, 12
SAMPLINGS = (
    Sampling(),
    Sampling(0.7),
    Sampling(1.3, top_k=5),
    Sampling(1.0, top_k=1000, top_p=0.8),
    Sampling(2.0, top_p=1e-9),
    Sampling(1.5, min_p=0.2),
    Sampling(0.0, repetition_penalty=1.7, frequency_penalty=0.4),
    Sampling(0.9, presence_penalty=1.5, logit_bias={3: 4.0, 17: -100.0}),
    Sampling(1.1, 7, 0.9, 0.8, -0.3, 0.2, 0.05, {0: 1.0}),
)
EVERYTHING = np.full((len(SAMPLINGS), 2), 0xFFFFFFFF, np.uint32)
_draw = jax.jit(draw_rows)


def rows_of(seed, allowed=EVERYTHING):
    """Scores and texts of as many rows as there are rules."""
    rng, count = np.random.default_rng(seed), len(SAMPLINGS)
    logits = rng.normal(scale=3, size=(count, VOCABULARY)).astype(np.float32)
    lengths = rng.integers(PROMPT, LENGTH + 1, count).astype(np.int32)
    text = RowText(
        tokens=rng.integers(0, VOCABULARY, (count, LENGTH)).astype(np.int32),
        prompt_lengths=np.full(count, PROMPT, np.int32),
        lengths=lengths,
        seeds=rng.integers(0, 2**32, count, np.uint32),
        allowed=allowed,
    )
    return logits, text


def alone(logits, text, row, allowed):
    """The token of one row by `sample`."""
    written = text.tokens[row, : text.lengths[row]]
    in_prompt = np.bincount(written[:PROMPT], minlength=VOCABULARY)[None] > 0
    counts = np.bincount(written[PROMPT:], minlength=VOCABULARY)[None]
    scores = jnp.where(allowed[row], logits[row], -jnp.inf)[None]
    key = jax.random.fold_in(row_key(text.seeds[row]), text.lengths[row] - PROMPT)
    return int(sample(scores, SAMPLINGS[row], key[None], in_prompt, counts)[0])


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_different_rules_draw_the_tokens_that_they_draw_alone(seed):
    logits, text = rows_of(seed)
    drawn = _draw(logits, RowRules.of(SAMPLINGS), text, False)
    allowed = np.ones(logits.shape, bool)
    assert drawn.tokens.tolist() == [
        alone(logits, text, row, allowed) for row in range(len(SAMPLINGS))
    ]


def test_only_allowed_tokens_are_drawn():
    words = np.random.default_rng(0).integers(0, 2**32, EVERYTHING.shape, np.uint32)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    allowed = bits[:, :VOCABULARY].astype(bool)
    logits, text = rows_of(5, words)
    tokens = np.asarray(_draw(logits, RowRules.of(SAMPLINGS), text, False).tokens)
    assert allowed[np.arange(len(tokens)), tokens].all()
    # A bias and a penalty move scores of single tokens, the mask hides them first or last alike.
    plain = [row for row, sampling in enumerate(SAMPLINGS) if not sampling.logit_bias]
    assert [tokens[row] for row in plain] == [alone(logits, text, row, allowed) for row in plain]


def test_log_probabilities_are_those_before_any_rule():
    logits, text = rows_of(6)
    drawn = _draw(logits, RowRules.of(SAMPLINGS), text, True)
    expected = scipy.special.log_softmax(logits, axis=1)
    chosen = np.take_along_axis(expected, np.asarray(drawn.tokens)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(drawn.logprobs, chosen, atol=1e-5)
    order = np.argsort(-expected, axis=1)[:, :MAX_LOGPROBS]
    assert drawn.top_tokens.tolist() == order.tolist()
    without = _draw(logits, RowRules.of(SAMPLINGS), text, False)
    assert not without.logprobs.any()
    assert without.tokens.tolist() == drawn.tokens.tolist()


def test_damaged_scores_are_reported_by_row():
    logits, text = rows_of(7)
    logits[2, 5], logits[4, 0] = np.nan, np.inf
    finite = _draw(logits, RowRules.of(SAMPLINGS), text, False).finite
    assert np.flatnonzero(~np.asarray(finite)).tolist() == [2, 4]
