"""Packing of codes into bytes, against a loop that knows only the documented layout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.kernels import packing

RANGES = {
    "int8": (-128, 127),
    "int6": (-32, 31),
    "int5": (-16, 15),
    "int4": (-8, 7),
    "nf4": (0, 15),
    "int3": (-4, 3),
    "int2": (-2, 1),
    "ternary": (-1, 1),
}
WIDTHS = {"int6": 6, "int4": 4, "nf4": 4, "int3": 3, "int2": 2}


def draw(shape, qtype, seed=0):
    """Random codes; of ternary34, one zero in each four and at most one in what is left."""
    rng = np.random.default_rng(seed)
    if qtype != "ternary34":
        low, high = RANGES[qtype]
        return rng.integers(low, high + 1, shape).astype(np.int8)
    columns = shape[-1]
    codes = rng.choice([-1, 1], (*shape[:-1], -(-columns // 4), 4))
    np.put_along_axis(codes, rng.integers(0, 4, (*codes.shape[:-1], 1)), 0, axis=-1)
    return codes.reshape(*shape[:-1], -1)[..., :columns].astype(np.int8)


def pack_row(row, qtype):
    """Bytes of one row, by Python integers."""
    if qtype in WIDTHS:
        width = WIDTHS[qtype]
        stream = sum((int(code) % 2**width) << (width * i) for i, code in enumerate(row))
        return np.frombuffer(
            stream.to_bytes(packing.packed_columns(len(row), qtype), "little"), np.uint8
        )
    if qtype == "ternary":
        results = []
        for start in range(0, len(row), 5):
            digits = [int(code) + 1 for code in row[start : start + 5]]
            number = int("".join(map(str, digits + [1] * (5 - len(digits)))), 3)
            results.append(-(-number * 256 // 243))
        return np.array(results, np.uint8)
    if qtype == "int5":
        fields = [int(code) % 32 for code in row] + [0] * (-len(row) % 8)
    else:
        fields = [_place_and_signs(row[start : start + 4]) for start in range(0, len(row), 4)]
    units = [fields[i : i + 8] for i in range(0, len(fields), 8)]
    results = []
    for unit in units:
        results += [(unit[i] & 15) | (unit[i + 1] & 15) << 4 for i in range(0, 8, 2)]
        results.append(sum((field >> 4) << i for i, field in enumerate(unit)))
    return np.array(results, np.uint8)


def _place_and_signs(four):
    codes = [int(code) for code in four]
    signs = [code > 0 for code in codes if code]
    return codes.index(0) * 8 + sum(sign << i for i, sign in enumerate(signs))


@pytest.mark.parametrize("qtype", [q for q in packing.QTYPES if q != "int8"])
def test_bytes_match_a_loop(qtype):
    columns = 64 if qtype == "ternary34" else 43
    codes = draw((5, columns), qtype)
    result = np.asarray(packing.pack(codes, qtype))
    np.testing.assert_array_equal(result, [pack_row(row, qtype) for row in codes])


@pytest.mark.parametrize("qtype", packing.QTYPES)
@settings(max_examples=12, deadline=None)
@given(shape=st.sampled_from([(1,), (2, 3, 70)]), seed=st.integers(0, 2**31))
def test_unpacking_undoes_packing(qtype, shape, seed):
    *leading, columns = shape
    codes = draw(shape, qtype, seed)
    packed = packing.pack(codes, qtype)
    assert packed.dtype == packing.stored_dtype(qtype)
    assert packed.shape == (*leading, packing.packed_columns(columns, qtype))
    result = packing.unpack(packed, columns, qtype)
    assert result.dtype == jnp.int8
    np.testing.assert_array_equal(result, codes)


# Complete units, of a type in each form of units.
COMPLETE = [(64, qtype) for qtype in ("int5", "int4", "int3", "ternary34")]
MORE = [(columns, qtype) for columns in (64, 160) for qtype in packing.QTYPES]


@pytest.mark.parametrize(
    ("columns", "qtype"),
    [
        *((37, qtype) for qtype in packing.QTYPES),
        *COMPLETE,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in COMPLETE),
    ],
)
def test_planes_hold_every_nth_column(columns, qtype):
    columns -= columns % 4 if qtype == "ternary34" else 0
    codes = draw((3, columns), qtype)

    @jax.jit
    def run(codes):
        return packing.planes(packing.pack(codes, qtype), columns, qtype)

    planes = run(codes)
    together = np.stack(planes, axis=-1).reshape(3, -1)
    assert together.shape[1] - columns < len(planes)
    np.testing.assert_array_equal(together[:, :columns], codes)
    np.testing.assert_array_equal(together[:, columns:], 0)


@pytest.mark.parametrize("qtype", packing.QTYPES)
def test_rows_cut_at_units_are_packed_by_themselves(qtype):
    unit = packing.unit(qtype)
    codes = draw((2, 4 * unit), qtype)
    complete = np.asarray(packing.pack(codes, qtype))
    cut = packing.packed_columns(unit, qtype)
    for part in range(4):
        alone = packing.pack(codes[:, part * unit : (part + 1) * unit], qtype)
        np.testing.assert_array_equal(complete[:, part * cut : (part + 1) * cut], alone)


@pytest.mark.parametrize("qtype", packing.QTYPES)
def test_packing_works_under_jit_and_vmap(qtype):
    codes = draw((3, 2, 20), qtype)
    unpack = jax.vmap(jax.vmap(lambda row: packing.unpack(row, 20, qtype)))

    @jax.jit
    def run(codes):
        packed = jax.vmap(lambda c: packing.pack(c, qtype))(codes)
        return packed, packing.pack(codes, qtype), unpack(packed)

    packed, plain, unpacked = run(codes)
    np.testing.assert_array_equal(packed, plain)
    np.testing.assert_array_equal(unpacked, codes)


def test_every_byte_of_trits_is_one_of_243():
    digits = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5)
    packed = np.asarray(packing.pack(np.int8(digits), "ternary"))
    assert len(np.unique(packed)) == 243
    np.testing.assert_array_equal(packing.unpack(packed, 5, "ternary"), digits)


def test_levels_of_nf4_split_a_normal_distribution_evenly():
    levels = np.array(packing.NF4_LEVELS)
    assert (len(levels), levels[0], levels[7], levels[-1]) == (16, -1.0, 0.0, 1.0)
    assert np.all(np.diff(levels) > 0)
    quantiles = np.vectorize(_normal_cdf)(levels * 1.8481)
    np.testing.assert_allclose(np.diff(quantiles[:8]), np.diff(quantiles[:8]).mean(), atol=2e-3)
    np.testing.assert_allclose(np.diff(quantiles[7:]), np.diff(quantiles[7:]).mean(), atol=2e-3)


def _normal_cdf(x):
    return 0.5 * (1 + math.erf(x / 2**0.5))
