"""Which vision tokens stay, and taking them in their order."""

import functools

import jax
import numpy as np
import pytest

from glm_edge.kernels import token_pruning


@pytest.fixture
def prompt():
    rng = np.random.default_rng(0)
    placeholder = np.zeros((2, 12), bool)
    placeholder[0, 2:8] = True
    placeholder[1, 5:10] = True
    return rng.normal(size=(2, 12, 6)).astype(np.float32), placeholder


@functools.partial(jax.jit, static_argnames="room")
def keep_highest(x, placeholder, keep, positions, room):
    best = token_pruning.top_scores(token_pruning.norm_scores(x), placeholder, keep)
    stays = best | ~placeholder
    retained = token_pruning.kept_indices(stays, room)
    moved = token_pruning.gather_tokens(positions, retained, axis=2)
    return stays, retained, moved, token_pruning.gather_tokens(x, retained)


@pytest.mark.parametrize("keep", [(6, 5), (4, 1), (0, 9)])
def test_the_lowest_go_and_the_rest_stays_in_order(prompt, keep):
    x, placeholder = prompt
    positions = np.arange(3 * 2 * 12).reshape(3, 2, 12)
    outputs = keep_highest(x, placeholder, np.array(keep), positions, room=12)
    stays, retained, moved, taken = map(np.asarray, outputs)
    for row in range(2):
        norms = np.linalg.norm(x[row], axis=1)
        vision = np.flatnonzero(placeholder[row])
        gone = vision[np.argsort(norms[vision])][: max(0, len(vision) - keep[row])]
        expected = np.setdiff1d(np.arange(12), gone)
        np.testing.assert_array_equal(np.flatnonzero(stays[row]), expected)
        np.testing.assert_array_equal(retained[row, : len(expected)], expected)
        np.testing.assert_array_equal(taken[row], x[row][retained[row]])
        np.testing.assert_array_equal(moved[:, row], positions[:, row][:, retained[row]])
    room = int(stays.sum(1).max())
    places = jax.jit(token_pruning.kept_indices, static_argnums=1)
    np.testing.assert_array_equal(places(stays, room), retained[:, :room])


def test_of_equals_the_first_stay():
    placeholder = np.array([[False, True, True, True, True]])
    highest = jax.jit(token_pruning.top_scores)
    best = highest(np.ones((1, 5), np.float32), placeholder, np.array([2]))
    assert best.tolist() == [[False, True, True, False, False]]


def test_attention_counts_what_is_asked_for(prompt):
    _, placeholder = prompt
    weights = np.random.default_rng(1).random((2, 2, 3, 12, 12)).astype(np.float32)
    asks = ~placeholder & (np.arange(12) < 11)
    actual = jax.jit(token_pruning.attention_scores)(weights, asks)
    for row in range(2):
        expected = weights[row].reshape(6, 12, 12)[:, np.asarray(asks[row])].mean((0, 1))
        np.testing.assert_allclose(actual[row], expected, rtol=1e-5)


def test_what_repeats_an_earlier_token_is_not_new(prompt):
    x, placeholder = prompt
    x[0, 6] = 3.0 * x[0, 4]
    x[0, 9] = x[0, 4]
    result = np.asarray(jax.jit(token_pruning.novelty_scores)(x, placeholder))
    assert result[0, 6] == pytest.approx(0.0, abs=1e-5)
    assert result[0, 4] > 0.1
    assert result[0, 9] == result[0, 2] == 2.0
    unit = x[1] / np.linalg.norm(x[1], axis=1, keepdims=True)
    assert result[1, 8] == pytest.approx(1 - (unit[5:8] @ unit[8]).max(), rel=1e-4)
