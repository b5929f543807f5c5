"""Seconds per step of a compression."""

import jax.numpy as jnp

from glm_edge.compress.timing import recorded, timed


def test_timed_adds_seconds_only_while_recorded():
    assert timed("sum", jnp.add, 1, 2) == 3
    with recorded() as seconds:
        assert timed("sum", jnp.add, 1, 2) == 3
        first = seconds["sum"]
        timed("sum", jnp.add, 1, 2)
    assert 0 < first < seconds["sum"]
    before = dict(seconds)
    timed("sum", jnp.add, 1, 2)
    assert seconds == before
