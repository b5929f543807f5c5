"""Dropping vision tokens: which go, what stays in order, static shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress.prune import vision_tokens
from glm_edge.errors import DataError, RecipeError


@pytest.fixture
def prompt():
    rng = np.random.default_rng(0)
    placeholder = np.zeros((2, 12), bool)
    placeholder[0, 2:8] = True
    placeholder[1, 5:11] = True
    return rng.normal(size=(2, 12, 6)).astype(np.float32), jnp.asarray(placeholder)


@pytest.mark.parametrize("drop", [0, 2, 6])
def test_the_lowest_go_and_the_rest_stays_in_order(prompt, drop):
    x, placeholder = prompt
    scores = vision_tokens.norm_scores(x)
    kept = jax.jit(functools.partial(vision_tokens.kept_tokens, drop=drop))(scores, placeholder)
    assert kept.shape == (2, 12 - drop)
    for row in range(2):
        norms = np.linalg.norm(x[row], axis=1)
        vision = np.flatnonzero(placeholder[row])
        gone = vision[np.argsort(norms[vision])][:drop]
        np.testing.assert_array_equal(kept[row], np.setdiff1d(np.arange(12), gone))
    np.testing.assert_array_equal(vision_tokens.take(x, kept)[1], x[1][kept[1]])
    positions = np.arange(3 * 2 * 12).reshape(3, 2, 12)
    found = vision_tokens.take(positions, kept, axis=2)
    np.testing.assert_array_equal(found[:, 1], positions[:, 1][:, kept[1]])


def test_attention_counts_what_the_text_asks_for(prompt):
    _, placeholder = prompt
    weights = np.random.default_rng(1).random((2, 2, 3, 12, 12)).astype(np.float32)
    found = vision_tokens.attention_scores(weights, placeholder)
    for row in range(2):
        text = ~np.asarray(placeholder[row])
        expected = weights[row].reshape(6, 12, 12)[:, text].mean((0, 1))
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_what_repeats_an_earlier_token_is_not_new(prompt):
    x, placeholder = prompt
    x[0, 6] = 3.0 * x[0, 4]
    x[0, 9] = x[0, 4]
    found = np.asarray(vision_tokens.novelty_scores(x, placeholder))
    assert found[0, 6] == pytest.approx(0.0, abs=1e-5)
    assert found[0, 4] > 0.1
    assert found[0, 9] == found[0, 2] == 2.0
    unit = x[1] / np.linalg.norm(x[1], axis=1, keepdims=True)
    assert found[1, 8] == pytest.approx(1 - (unit[5:8] @ unit[8]).max(), rel=1e-4)


def test_a_decoder_runs_on_what_is_left(small):
    model, params = small
    tokens = np.random.default_rng(0).integers(10, 40, (2, 12)).astype(np.int32)
    x = params["embed"]["weight"][tokens]
    placeholder = jnp.zeros((2, 12), bool).at[:, 3:9].set(True)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    kept = vision_tokens.kept_tokens(vision_tokens.norm_scores(x), placeholder, 4)

    @jax.jit
    def run(x, positions, mask):
        return model.apply({"params": params}, x, positions, mask, method=decode)

    causal = jnp.tril(jnp.ones((12, 12), bool))[None, None]
    short = run(
        vision_tokens.take(x, kept), vision_tokens.take(positions, kept), causal[..., :8, :8]
    )
    # Hiding the dropped tokens from a whole run leaves the same for those that stay.
    seen = jnp.zeros((2, 12), bool).at[jnp.arange(2)[:, None], kept].set(True)
    whole = run(x, positions, causal & seen[:, None, None])
    np.testing.assert_allclose(short, vision_tokens.take(whole, kept), atol=1e-5)


def decode(model, x, positions, mask):
    return model.decoder(x, positions, mask)[0]


@pytest.mark.parametrize("drop", [-1, 12, 1.5, True])
def test_numbers_without_meaning_are_refused(prompt, drop):
    x, placeholder = prompt
    with pytest.raises(RecipeError, match="drop must be a whole number below 12"):
        vision_tokens.kept_tokens(vision_tokens.norm_scores(x), placeholder, drop)


def test_a_row_with_too_few_is_refused(prompt):
    x, placeholder = prompt
    with pytest.raises(DataError, match="a row has 6, so 7 cannot go"):
        vision_tokens.kept_tokens(vision_tokens.norm_scores(x), placeholder, 7)
