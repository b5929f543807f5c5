"""Products, dense and low-bit, against float64 ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.kernels import matmul, packing, quantization

FEW, MANY = 1, matmul.FEW_ROWS + 1
quantized_matmul = jax.jit(matmul.quantized_matmul, static_argnums=4)
dynamic_int8_matmul = jax.jit(matmul.dynamic_int8_matmul, static_argnums=4)
static_int8_matmul = jax.jit(matmul.static_int8_matmul, static_argnums=6)


def product_loop(x, weight):
    out = np.zeros((x.shape[0], weight.shape[0]))
    for r, o in np.ndindex(out.shape):
        out[r, o] = sum(x[r, i] * weight[o, i] for i in range(x.shape[1]))
    return out


def test_dense_matches_a_loop():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(3, 9)), rng.normal(size=(5, 9))
    result = jax.jit(matmul.dense)(np.float32(x), np.float32(weight))
    np.testing.assert_allclose(result, product_loop(x, weight), atol=2e-6)


def test_bfloat16_matmul_and_gradients_within_rounding():
    """Bfloat16 product and gradients are within their rounding."""
    rng = np.random.default_rng(1)
    x, weight = np.float32(rng.normal(size=(4, 64))), np.float32(rng.normal(size=(8, 64)))
    # Each of 64 products carries at most 2 roundings of 2^-9 of its magnitude.
    bound = 64 * 2 * 2.0**-9 * float(np.abs(x).max() * np.abs(weight).max())

    def output_and_gradients(product):
        def loss(x, weight):
            out = product(x, weight)
            return jnp.sum(out**2), out

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))

    actual, out = output_and_gradients(matmul.dense_bf16)(x, weight)
    expected, exact = output_and_gradients(matmul.dense)(x, weight)
    np.testing.assert_allclose(out, exact, atol=bound)
    assert out.dtype == jnp.float32
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == jnp.float32
        one, other = np.asarray(one), np.asarray(other)
        assert np.linalg.norm(one - other) / np.linalg.norm(other) < 0.02


def random_codes(qtype, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    if qtype == "ternary34":
        codes = rng.choice([-1, 1], (rows, columns // 4, 4))
        np.put_along_axis(codes, rng.integers(0, 4, (*codes.shape[:2], 1)), 0, axis=-1)
        return codes.reshape(rows, columns).astype(np.int8)
    low, high = quantization.code_range(qtype)
    return rng.integers(low, high + 1, (rows, columns)).astype(np.int8)


def case(qtype, groups, affine=False, rows=6, columns=60, zero_dtype=np.int8):
    """Arguments of the kernels, and the dense weight in float64."""
    rng = np.random.default_rng(1)
    codes = random_codes(qtype, rows, columns)
    scale = rng.uniform(0.01, 0.2, (rows, groups)).astype(np.float32)
    if qtype == "ternary":
        zero_dtype = np.float32
    zero = rng.uniform(-3, 4, (rows, groups)).astype(zero_dtype) if affine else None
    levels = np.array(packing.NF4_LEVELS)[codes] if qtype == "nf4" else codes.astype(np.float64)
    weight = np.zeros(codes.shape)
    for r, c in np.ndindex(codes.shape):
        g = c // (columns // groups)
        offset = 0 if zero is None else float(zero[r, g])
        weight[r, c] = float(scale[r, g]) * (levels[r, c] - offset)
    return (packing.pack(codes, qtype), scale, zero, qtype), weight


CASES = [
    *((qtype, groups, False) for qtype in packing.QTYPES for groups in (1, 5)),
    *(
        (qtype, groups, True)
        for qtype in ("int8", "int6", "int5", "int4", "int3", "int2")
        for groups in (1, 5)
    ),
    ("ternary", 5, True),
    ("ternary", 1, True),
    # Groups that end within a byte.
    ("int4", 20, False),
    ("int2", 10, True),
    ("ternary", 15, False),
]


def relative(actual, expected):
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


def rows_of(count, columns=60, seed=2):
    return np.float32(np.random.default_rng(seed).normal(size=(count, columns)) + 0.3)


# One case per type and per branch; the full product is slow.
FIRST_CASES = [
    *((qtype, 5, qtype.startswith("int")) for qtype in packing.QTYPES),
    ("int8", 1, False),
    ("int4", 1, False),
    ("ternary", 1, False),
    ("ternary", 5, True),
    *CASES[-3:-1],
]
OTHER_CASES = [pytest.param(*c, marks=pytest.mark.slow) for c in CASES if c not in FIRST_CASES]


@pytest.mark.parametrize(("qtype", "groups", "affine"), FIRST_CASES + OTHER_CASES)
def test_low_bit_matches_a_float64_product(qtype, groups, affine):
    packed, weight = case(qtype, groups, affine)

    @jax.jit
    def products(few, many, data, scale, zero):
        return [
            matmul.quantized_matmul(x, data, scale, zero, qtype, inputs)
            for inputs in ("float32", "bfloat16")
            for x in (few, many)
        ]

    rows = rows_of(FEW), rows_of(MANY)
    tolerances = (1e-6, 1e-6, 0.02, 0.02)
    for x, result, tolerance in zip(
        rows * 2, products(*rows, *packed[:3]), tolerances, strict=True
    ):
        assert relative(result, np.asarray(x, np.float64) @ weight.T) < tolerance


# Types that differ in their packing only are unpacked above.
ALIKE = ("int6", "int5", "int3", "ternary")
INT8_CASES = [
    pytest.param(*c, marks=pytest.mark.slow) if c[0] in ALIKE and c[1] == 5 else c
    for c in FIRST_CASES
]


@pytest.mark.parametrize(("qtype", "groups", "affine"), INT8_CASES + OTHER_CASES)
def test_int8_products_match_float64_of_rounded_rows(qtype, groups, affine):
    packed, weight = case(qtype, groups, affine)
    step, zero = np.float32(0.021), -40

    def products(x, data, scale, weight_zero):
        static = matmul.static_int8_matmul(x, data, scale, weight_zero, step, jnp.int8(zero), qtype)
        dynamic = matmul.dynamic_int8_matmul(x, data, scale, weight_zero, qtype)
        return matmul.round_rows_to_int8(x), dynamic, static

    both = jax.jit(lambda few, many, *weight: (products(few, *weight), products(many, *weight)))
    for x, results in zip(
        (rows_of(FEW), rows_of(MANY)), both(rows_of(FEW), rows_of(MANY), *packed[:3]), strict=True
    ):
        rounded, dynamic, static = results
        assert relative(dynamic, np.asarray(rounded, np.float64) @ weight.T) < 1e-6
        rounded = np.clip(np.round(x / step) + zero, -128, 127) - zero
        assert np.abs(rounded).max() == 127 - zero or rounded.min() == -128 - zero, "nothing clips"
        assert relative(static, rounded * float(step) @ weight.T) < 1e-6


@pytest.mark.parametrize(("qtype", "groups", "affine"), [("int8", 1, False), ("int4", 1, True)])
@pytest.mark.parametrize("rows", [1, matmul.FEW_ROWS + 1])
def test_static_products_lie_where_a_float64_loop_rounds_them(qtype, groups, affine, rows):
    packed, weight = case(qtype, groups, affine)
    x, step, zero = rows_of(rows), np.float32(0.021), -40
    expected, ties = np.zeros((rows, len(weight))), 0
    steps = np.clip(np.round(np.asarray(x, np.float64) / step) + zero, -128, 127) - zero
    products = steps * np.float64(step) @ weight.T
    out_step, out_zero = np.float32(0.7 * np.ptp(products) / 255), 9
    for i, j in np.ndindex(expected.shape):
        position = products[i, j] / np.float64(out_step)
        ties += abs(position - np.floor(position) - 0.5) < 1e-4
        expected[i, j] = np.clip(np.round(position) + out_zero, -128, 127) - out_zero
    output = out_step, np.int8(out_zero)
    actual = static_int8_matmul(x, *packed[:3], step, np.int8(zero), qtype, *output)
    assert {expected.min(), expected.max()} & {-137.0, 118.0}, "nothing clips"
    assert ties < 3
    wrong = np.abs(np.asarray(actual, np.float64) / out_step - expected) > 1e-3
    assert wrong.sum() <= ties


@pytest.mark.parametrize("zero_dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
def test_int8_products_take_zero_points_between_levels(rows, zero_dtype):
    packed, weight = case("int4", 1, True, zero_dtype=zero_dtype)
    x = rows_of(rows)
    rounded = np.asarray(jax.jit(matmul.round_rows_to_int8)(x), np.float64)
    assert np.any(np.asarray(packed[2], np.float64) % 1)
    assert relative(dynamic_int8_matmul(x, *packed), rounded @ weight.T) < 1e-6


@pytest.mark.parametrize("rows", [1, 9])
def test_integer_sums_are_exact_where_float32_sums_are_not(rows):
    columns = 4096
    x = np.full((rows, columns), 3.0, np.float32)
    x[:, 0], x[:, 1] = 254.0, 0.0
    codes = np.full((3, columns), 127, np.int8)
    codes[1], codes[2, ::2] = -128, -127
    actual = jax.jit(matmul.dynamic_int8_matmul)(x, codes, np.ones((3, 1), np.float32))
    rounded = jax.jit(matmul.rows_to_int8)(x)
    integers, zero, step = (np.asarray(a, np.float64) for a in rounded)
    total = (integers - zero).astype(np.int64) @ codes.astype(np.int64).T
    expected = total.astype(np.float32) * step.astype(np.float32)
    np.testing.assert_array_equal(actual, expected)


def test_int8_dot_matches_int64_at_the_extremes():
    rng = np.random.default_rng(0)
    x = rng.choice([-128, 127], (5, 3000)).astype(np.int8)
    weight = rng.choice([-128, 127], (7, 3000)).astype(np.int8)
    weight[0], x[0] = -128, -128
    result = jax.jit(matmul.dot, static_argnums=2)(x, weight, jnp.int32)
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, x.astype(np.int64) @ weight.astype(np.int64).T)


FIRST_BLOCKS = [(16, 1, "int8"), (19, 5, "int4")]
OTHER_BLOCKS = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product((16, 19), (1, 5), ("int8", "int4", "ternary"))
    if case not in FIRST_BLOCKS
]


@pytest.mark.parametrize(("out", "groups", "qtype"), FIRST_BLOCKS + OTHER_BLOCKS)
def test_a_weight_met_in_blocks_gives_the_same_product(qtype, groups, out, monkeypatch):
    packed = case(qtype, groups, rows=out)[0]
    x = rows_of(3)
    *arrays, qtype = packed

    def products(x, data, scale, zero):
        return [
            product(x, data, scale, zero, qtype)
            for product in (matmul.quantized_matmul, matmul.dynamic_int8_matmul)
        ]

    at_once = jax.jit(products)(x, *arrays)
    monkeypatch.setattr(matmul, "BLOCK", 4 * 60)
    # A function of its own: jit keeps what it traced of the first one.
    by_blocks = jax.jit(lambda *arguments: products(*arguments)).lower(x, *arrays)
    assert by_blocks.as_text().count("stablehlo.while") == 2
    for actual, expected in zip(by_blocks.compile()(x, *arrays), at_once, strict=True):
        # Sums of another order differ in proportion to what is summed, not to what is left of it.
        atol = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


FIRST_GRADIENTS = [(1, None, False), (5, np.float32, True), (5, np.int8, False)]
OTHER_GRADIENTS = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product((1, 5), (None, np.int8, np.float32), (False, True))
    if case not in FIRST_GRADIENTS
]


@pytest.mark.parametrize(("groups", "zero_dtype", "blocks"), FIRST_GRADIENTS + OTHER_GRADIENTS)
def test_gradients_reach_rows_scales_and_float_zero_points(groups, zero_dtype, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(matmul, "BLOCK", 4 * 60)
    affine = zero_dtype is not None
    (data, scale, zero, qtype), _ = case("int4", groups, affine, 18, zero_dtype=zero_dtype)
    x, pull = rows_of(3), np.float32(np.cos(np.arange(54.0))).reshape(3, 18)
    levels = packing.unpack(data, 60, qtype)
    trained = (0, 1, 2) if zero_dtype is np.float32 else (0, 1)

    def dense(x, scale, zero):
        return jnp.sum(pull * matmul.dense(x, quantization.dequantize_levels(levels, scale, zero)))

    reference = jax.jit(jax.grad(dense, trained))
    for product, rows in (
        (matmul.quantized_matmul, x),
        (matmul.dynamic_int8_matmul, jax.jit(matmul.round_rows_to_int8)(x)),
    ):

        def loss(x, scale, zero, product=product):
            return jnp.sum(pull * product(x, data, scale, zero, qtype))

        result = jax.jit(jax.grad(loss, trained))(x, scale, zero)
        for one, other in zip(result, reference(rows, scale, zero), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_static_rounding_passes_gradients_where_it_does_not_clip():
    (data, scale, zero, qtype), weight = case("int8", 1)
    x = rows_of(2)
    x[0, 3] = 99.0
    others = data, scale, zero

    def loss(x, step):
        return jnp.sum(matmul.static_int8_matmul(x, *others, step, jnp.int8(5), qtype))

    step = np.float32(0.03)
    by_row, by_step = jax.jit(jax.grad(loss, (0, 1)))(x, step)
    inside = (np.asarray(x) / step + 5 < 127) & (np.asarray(x) / step + 5 > -128)
    assert not inside.all()
    np.testing.assert_allclose(by_row, np.where(inside, weight.sum(0), 0.0), rtol=1e-4, atol=1e-5)
    # Learned step size quantization, equation 3.
    steps = np.asarray(x, np.float64) / step
    slope = np.where(inside, np.round(steps) - steps, np.clip(np.round(steps), -133, 122))
    np.testing.assert_allclose(by_step, np.sum(slope * weight.sum(0)), rtol=1e-3)


@pytest.mark.parametrize(
    "qtype",
    [
        *("int5", "int4"),
        *(
            pytest.param(q, marks=pytest.mark.slow)
            for q in ("int8", "int6", "int3", "int2", "ternary", "nf4")
        ),
    ],
)
def test_few_rows_never_meet_a_dense_copy_of_the_weight(qtype, optimized):
    out, columns = 4096, 1024
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((1, columns), jnp.float32),
        shape((out, packing.packed_columns(columns, qtype)), packing.stored_dtype(qtype)),
        shape((out, 1), jnp.float32),
    )
    for product in (matmul.quantized_matmul, matmul.dynamic_int8_matmul):
        run = jax.jit(lambda *a, product=product: product(*a, None, qtype))
        memory = run.lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2 * 4 * matmul.BLOCK < out * columns * 4 / 2


def test_quantized_matmul_leading_axes_type_and_vmap():
    """Low bit keeps leading axes and type and works under vmap."""
    packed = case("int4", 5)[0]
    x = rows_of(6).reshape(2, 3, 60)
    result = quantized_matmul(x, *packed)
    assert result.shape == (2, 3, 6)
    narrow = jax.eval_shape(
        quantized_matmul, jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), *packed[:3], "int4"
    )
    assert narrow.dtype == jnp.bfloat16
    stacked = [np.stack([a, a]) for a in packed[:2]]
    each = jax.jit(jax.vmap(lambda x, *weight: matmul.quantized_matmul(x, *weight, None, "int4")))
    np.testing.assert_allclose(each(x, *stacked), result, rtol=1e-5, atol=1e-6)


def test_rows_are_rounded_to_int8_as_a_loop_does():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(6, 16)).astype(np.float32) + np.float32(0.3)
    x[0], x[1] = 0.0, np.abs(x[1])
    expected = np.zeros(x.shape)
    for r in range(len(x)):
        low, high = min(float(x[r].min()), 0.0), max(float(x[r].max()), 0.0)
        step = (high - low) / 255 if high > low else 1.0
        zero = np.clip(np.round(-128 - low / step), -128, 127)
        for c in range(x.shape[1]):
            q = np.clip(np.round(float(x[r, c]) / step + zero), -128, 127)
            expected[r, c] = (q - zero) * step
    actual = np.asarray(jax.jit(matmul.round_rows_to_int8)(x))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert all(len(np.unique(row)) <= 256 for row in actual)


@pytest.mark.parametrize("rows", [1, 3])
def test_matmul_bf16x3_is_as_accurate_as_float32(rows):
    """Rows split in three are as accurate as a float32 product."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(rows, 300)) * 10.0 ** rng.integers(-3, 4, (rows, 300))
    x = x.astype(np.float32)
    weight = rng.normal(size=(40, 300)).astype(jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(weight, np.float64).T
    scale = np.abs(x).astype(np.float64) @ np.abs(np.asarray(weight, np.float64)).T
    result = jax.jit(matmul.matmul_bf16x3)(x, weight)
    assert np.max(np.abs(result - exact) / scale) < 2e-7

    def gradient(product, weight):
        return jax.jit(jax.grad(lambda x: jnp.sum(product(x, weight) ** 2)))(x)

    plain = gradient(matmul.dense, jnp.asarray(weight, jnp.float32))
    split = gradient(matmul.matmul_bf16x3, jnp.asarray(weight))
    np.testing.assert_allclose(split, plain, rtol=1e-4, atol=1e-6 * np.abs(plain).max())
