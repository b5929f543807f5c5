"""Half-quadratic steps beside a loop over groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import hqq_solver as hqq
from glm_edge.compress.quantize.solvers import scales as grid
from glm_edge.kernels.packing import NF4_LEVELS
from glm_edge.params import Format

decode = jax.jit(grid.decode, static_argnums=2)


def weights(rows=6, columns=64, seed=0):
    values = np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.05
    values[1] = 0.0
    values[2] += 0.2
    return values.astype(np.float32)


def loop(values, format, stored, exponent=0.7, beta=10.0, growth=1.01, steps=20):
    """Zero points or scales of each group, and its smallest `sum |W - Q|^p`, in float64."""
    rows, groups = stored.scale.shape
    low, high = {"int4": (-8, 7), "int3": (-4, 3), "int2": (-2, 1), "ternary": (-1, 1)}.get(
        format.qtype, (0, 15)
    )
    scales, zeros = np.zeros((rows, groups)), np.zeros((rows, groups))
    losses = np.zeros((rows, groups))
    parts = np.float64(values).reshape(rows, groups, -1)

    def rounded(part, scale, zero):
        if format.qtype == "nf4":
            return np.array(
                [min(NF4_LEVELS, key=lambda level: abs(x / scale - level)) for x in part]
            )
        return np.clip(np.round(part / scale + zero), low, high) - zero

    for r in range(rows):
        for g in range(groups):
            part = parts[r, g]
            scale = float(stored.scale[r, g])
            zero = 0.0 if stored.zero is None else float(stored.zero[r, g])
            best = (np.sum(np.abs(part - scale * rounded(part, scale, zero)) ** exponent),)
            best += (scale, zero)
            weight = beta
            for _ in range(steps):
                level = rounded(part, scale, zero)
                residual = part / scale - level
                size = np.abs(residual)
                limit = np.where(size > 0, size, 1.0) ** (exponent - 1) / weight
                error = np.sign(residual) * np.maximum(size - limit, 0)
                if stored.zero is None:
                    if np.sum(level**2) > 0:
                        target = level + residual - error
                        scale *= np.sum(level * target) / np.sum(level**2)
                else:
                    zero = np.mean(level + zero - (part / scale - error))
                result = np.sum(np.abs(part - scale * rounded(part, scale, zero)) ** exponent)
                if result < best[0]:
                    best = (result, scale, zero)
                weight *= growth
            losses[r, g], scales[r, g], zeros[r, g] = best
    return scales, zeros, losses


@pytest.mark.parametrize(
    ("qtype", "exponent"),
    [
        ("int4", 0.7),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("int4", 1.0), ("int2", 0.7), ("int2", 1.0))
        ),
    ],
)
def test_zero_points_are_those_of_the_loop(qtype, exponent):
    values = weights()
    format = Format(qtype, 16, False, "float32", "float32")
    codes, scale = hqq.solve(values, format, exponent=exponent)
    start = grid.choose(values, format)
    _, zeros, losses = loop(values, format, start, exponent)
    np.testing.assert_array_equal(scale.scale, start.scale)
    if exponent < 1:
        # Where `p` is one, zero points lie on a plateau and only what they lose can be compared.
        np.testing.assert_allclose(scale.zero, zeros, atol=2e-3)
    lost = np.abs(np.float64(decode(codes, scale, format)) - values) ** exponent
    np.testing.assert_allclose(lost.reshape(6, 4, 16).sum(-1), losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "qtype",
    ["int4", "nf4", *(pytest.param(x, marks=pytest.mark.slow) for x in ("int3", "ternary"))],
)
def test_scales_are_those_of_the_loop(qtype):
    values = weights()
    format = Format(qtype, 16, True, "float32")
    codes, scale = hqq.solve(values, format)
    start = grid.choose(values, format)
    scales, _, losses = loop(values, format, start)
    np.testing.assert_allclose(scale.scale, scales, rtol=1e-3)
    lost = np.abs(np.float64(decode(codes, scale, format)) - values) ** 0.7
    np.testing.assert_allclose(lost.reshape(6, 4, 16).sum(-1), losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("int4-channel", marks=pytest.mark.slow),
        "int3-g16-affine",
        "ternary34-g16",
        "int2-tensor",
    ],
)
def test_is_never_worse_than_where_it_started(name):
    values = weights()
    format = Format.parse(name)
    start = grid.choose(values, format)
    before = decode(grid.encode(values, start, format), start, format)
    codes, scale = hqq.solve(values, format)
    after = decode(codes, scale, format)
    lost = [float(np.sum(np.abs(np.float64(x) - values) ** 0.7)) for x in (after, before)]
    # Whole zero points may already be where they should.
    assert lost[0] < lost[1] or (lost[0] == lost[1] and not format.symmetric)
    assert scale.scale.dtype == jnp.dtype(format.scale_dtype)


def test_whole_zero_points_stay_whole():
    values = weights()
    format = Format.parse("int4-g16-affine")
    scale = hqq.solve(values, format)[1]
    assert scale.zero.dtype == jnp.int8
    assert int(scale.zero.min()) >= -8
    assert int(scale.zero.max()) <= 7
