"""The error function as arithmetic."""

import math

import jax
import numpy as np
import pytest

from glm_edge.export.common.jaxpr import erfc, expand_erf


def primitives(jaxpr):
    results = set()
    for equation in jaxpr.eqns:
        results.add(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            results |= primitives(inner) if inner is not None else set()
    return results


def test_erfc_is_within_a_millionth_of_the_loop():
    x = np.linspace(-12, 12, 4801).astype(np.float32)
    expected = [math.erfc(float(value)) for value in x]
    np.testing.assert_allclose(jax.jit(erfc)(x), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit, jax.checkpoint])
def test_functions_keep_their_values_and_lose_the_error_function(wrapped):
    def function(tree):
        hidden = jax.nn.silu(tree["x"]) + wrapped(jax.lax.erf)(tree["y"])
        return {"z": jax.nn.gelu(hidden, approximate=False), "same": tree["y"]}

    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=(4, 8)).astype(np.float32) for name in "xy"}
    rewritten = expand_erf(function)
    actual, expected = jax.jit(rewritten)(tree), jax.jit(function)(tree)
    np.testing.assert_allclose(actual["z"], expected["z"], atol=1e-6)
    np.testing.assert_array_equal(actual["same"], tree["y"])
    assert {"erf", "erfc"} & primitives(jax.make_jaxpr(function)(tree).jaxpr)
    assert not {"erf", "erfc"} & primitives(jax.make_jaxpr(rewritten)(tree).jaxpr)
