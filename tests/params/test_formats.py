"""Every format: bytes told in advance, stored and loaded, and alive under jax's transformations."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.compress.quantize import quantize_leaf
from glm_edge.errors import BoxError
from glm_edge.kernels import packing, quantization
from glm_edge.params import Format, formats
from glm_edge.params.formats import QTYPES

FORMATS = [
    Format("int8"),
    Format("int8", "tensor"),
    Format("int4", 16, scale_dtype="float16"),
    Format("int4", 8, False, "bfloat16"),
    Format("int6", 16),
    Format("int5", 8, False),
    Format("int3", 8),
    Format("int3", None, False, zero_dtype="bfloat16"),
    Format("int2", 16, False),
    Format("int2"),
    Format("ternary", 16, scale_dtype="bfloat16"),
    Format("ternary", "tensor"),
    Format("ternary34", 16),
    Format("nf4", 16, scale_dtype="bfloat16"),
    Format("ternary", 16, False, "bfloat16", "bfloat16"),
]


# Code that is the same for all types: groups, rows and tensors, with zero points and without.
BRANCHES = (FORMATS[1], FORMATS[2], FORMATS[7], FORMATS[12], FORMATS[13])
FEW = [f if f in BRANCHES else pytest.param(f, marks=pytest.mark.slow) for f in FORMATS]


# Each type once, and each branch; for tests that compile a program for every format.
OTHERS = (FORMATS[3], FORMATS[6], FORMATS[9], FORMATS[11])
MOST = [pytest.param(f, marks=pytest.mark.slow) if f in OTHERS else f for f in FORMATS]
dense = jax.jit(boxes.dense)


def weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantize(leaf, format):
    return quantize_leaf("weight", leaf, format, "mse")[0]


@functools.cache
def box_of(format, seed=0):
    """`weight(10, 48, seed)` in a format."""
    return quantize(weight(10, 48, seed=seed), format)


@pytest.mark.parametrize("format", MOST, ids=repr)
def test_bytes_told_are_bytes_held_and_bytes_in_the_file(format, tmp_path):
    box = box_of(format)
    arrays, spec = boxes.to_flat({"w": box})
    write_safetensors(tmp_path / "w.safetensors", arrays)
    file = SafetensorsFile(tmp_path / "w.safetensors")
    assert sum(info.bytes for info in file.tensors.values()) == boxes.stored_bytes({"w": box})
    assert format.stored_bytes((10, 48)) == boxes.stored_bytes({"w": box})
    read = boxes.from_flat({name: jnp.asarray(file.read(name)) for name in file.tensors}, spec)
    np.testing.assert_array_equal(dense(read["w"]), dense(box))


@pytest.mark.parametrize("format", MOST, ids=repr)
def test_dense_is_scale_times_level_less_zero(format):
    box, values = box_of(format), dense(box_of(format))
    codes = np.asarray(packing.unpack(box.data, 48, format.qtype))
    levels = np.array(packing.NF4_LEVELS)[codes] if format.qtype == "nf4" else np.float64(codes)
    groups = box.scale.shape[-1]
    scale = np.repeat(np.float64(box.scale), 48 // groups, axis=1)
    zero = 0.0 if box.zero is None else np.repeat(np.float64(box.zero), 48 // groups, axis=1)
    np.testing.assert_allclose(values, scale * (levels - zero), rtol=1e-6, atol=1e-7)
    low, high = quantization.code_range(format.qtype)
    assert low <= codes.min() <= codes.max() <= high


SOME = [format for format in FORMATS if str(format) in ("int8-channel", "int2-g16-affine")]


@pytest.mark.parametrize(
    "format",
    [*SOME, *(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS if f not in SOME)],
    ids=repr,
)
def test_dense_outside_jit_is_the_same(format):
    box = box_of(format)
    values = np.asarray(dense(box))
    np.testing.assert_array_equal(boxes.dense(box), values)
    np.testing.assert_array_equal(box.codes(), packing.unpack(box.data, 48, format.qtype))
    levels = np.asarray(quantization.levels(box.codes(), format.qtype), np.float64)
    grid = np.array(packing.NF4_LEVELS) if format.qtype == "nf4" else None
    codes = np.asarray(box.codes())
    np.testing.assert_array_equal(levels, codes if grid is None else np.float32(grid)[codes])
    fake = boxes.fake_quantized(weight(10, 48), box.scale, box.zero, format)
    np.testing.assert_array_equal(boxes.dense(fake), values)


@pytest.mark.parametrize("format", FEW, ids=repr)
def test_jit_vmap_and_scan_see_the_same_weight(format):
    stack = [box_of(format, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *stack)
    expected = np.stack([dense(box) for box in stack])
    assert stacked.shape == expected.shape

    @jax.jit
    def transformed(stacked):
        scanned = jax.lax.scan(lambda carry, box: (carry, boxes.dense(box)), 0, stacked)[1]
        return boxes.dense(stacked), jax.vmap(boxes.dense)(stacked), scanned

    for values in transformed(stacked):
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("format", FEW, ids=repr)
def test_scales_train_through_partition(format):
    box, x = box_of(format), weight(3, 48, seed=1)
    trainable, frozen = boxes.partition({"w": box}, scales=True)
    assert boxes.partition({"w": box})[0]["w"].scale is None

    @jax.jit
    @jax.value_and_grad
    def run(trainable):
        return jnp.sum(boxes.linear(x, boxes.combine(trainable, frozen)["w"]) ** 2)

    gradient = run(trainable)[1]["w"]
    assert gradient.scale.shape == box.scale.shape
    scale = np.float32(box.scale)
    # The loss is quadratic in the scale, so the difference is exact whatever the step.
    step = 0.1 * np.abs(scale).max()
    first = np.zeros_like(scale)
    first[0, 0] = step
    bumps = [
        run({"w": trainable["w"].replace(scale=jnp.asarray(scale + sign * first))})[0]
        for sign in (1, -1)
    ]
    difference = (bumps[0] - bumps[1]) / (2 * step)
    slope = np.asarray(gradient.scale)[0, 0]
    np.testing.assert_allclose(slope, difference, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("format", MOST, ids=repr)
def test_products_and_lookups_are_those_of_the_dense_weight(format):
    box, tokens = box_of(format), np.array([[0, 9, 3]])
    few, many = (weight(rows, 48, seed=1) for rows in (1, 40))
    plain = np.asarray(dense(box))

    @jax.jit
    def run(box):
        return boxes.linear(few, box), boxes.linear(many, box), boxes.lookup(box, tokens)

    *products, looked_up = run(box)
    for x, product in zip((few, many), products, strict=True):
        np.testing.assert_allclose(product, x @ plain.T, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(looked_up, plain[tokens])


@pytest.mark.parametrize("format", MOST, ids=repr)
def test_fake_quantized_reads_as_its_packed_form(format):
    plain, box = weight(10, 48), box_of(format)
    fake = boxes.fake_quantized(plain, box.scale, box.zero, format)

    @jax.jit
    def run(fake):
        gradient = jax.grad(lambda value: boxes.dense(fake.replace(value=value)).sum())
        return boxes.dense(fake), fake.finalize(), gradient(fake.value)

    values, final, gradient = run(fake)
    np.testing.assert_array_equal(values, dense(box))
    np.testing.assert_array_equal(final.data, box.data)
    np.testing.assert_array_equal(final.scale, box.scale)
    assert set(np.unique(np.round(np.asarray(gradient), 4))) <= {0.0, 0.5, 1.0}
    assert np.mean(gradient) > 0.2


@pytest.mark.parametrize("format", MOST, ids=repr)
def test_shards_hold_whole_bytes(format):
    mesh = jax.make_mesh((1,), ("model",))
    path = "decoder/layers/0/mlp/down_proj/weight"
    box = box_of(format)
    placed = ge.params.sharding.named_sharding(path, box, mesh)
    moved = jax.device_put(box, placed)
    jax.tree.map(np.testing.assert_array_equal, moved, box)


INTEGERS = [f for f in QTYPES if f not in ("float16", "bfloat16")]
GROUPS = [None, "tensor", 4, 8, 32]
UNITS = [(1, 1), (5, 3), (2, 6)]


def check_grouping(qtype, group_size, shape):
    rows, units = shape
    columns = units * (group_size if isinstance(group_size, int) else 4)
    format = Format(qtype, group_size)
    box = quantize_leaf("weight", weight(rows, columns, seed=rows), format, "max")[0]
    codes = packing.unpack(box.data, columns, qtype)
    again = boxes.quantized(codes, box.scale, box.zero, format)
    np.testing.assert_array_equal(again.data, box.data)
    assert box.data.shape[-1] == packing.packed_columns(columns, qtype)
    assert format.stored_bytes((rows, columns)) == boxes.stored_bytes({"w": box})


@pytest.mark.parametrize(
    ("qtype", "group_size", "shape"),
    [(qtype, GROUPS[i % 5], UNITS[i % 3]) for i, qtype in enumerate(INTEGERS)],
)
def test_grouping_of_each_type_survives_packing(qtype, group_size, shape):
    check_grouping(qtype, group_size, shape)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.sampled_from(INTEGERS), st.sampled_from(GROUPS), st.sampled_from(UNITS))
def test_any_grouping_survives_packing(qtype, group_size, shape):
    check_grouping(qtype, group_size, shape)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_str_of_a_format_is_read_back(format):
    assert Format.parse(str(format)) == format


def test_examples_in_the_docstring_of_format_run():
    results = doctest.testmod(formats, optionflags=doctest.ELLIPSIS)
    assert results.failed == 0
    assert results.attempted >= 6


@pytest.mark.parametrize(
    "text",
    [
        *("int8-channel", "int4-g32", "int4-g32-affine", "ternary-tensor", "nf4-g64", "bfloat16"),
        *("ternary-g32-affine", "ternary-g32-affine-zero=int8", "ternary-channel-affine"),
    ],
)
def test_formats_are_read_from_their_names(text):
    assert str(Format.parse(text)) == text
    assert Format.parse("int8") == Format("int8")
    assert Format.parse("int4-g32").scale_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Format("int7"), "qtype 'int7' is unknown"),
        (lambda: Format("int4", 0), "group_size must be positive"),
        (lambda: Format("int4", "row"), "group_size must be positive"),
        (lambda: Format("nf4", symmetric=False), "nf4 is symmetric"),
        (lambda: Format("bfloat16", 32), "no scales"),
        (lambda: Format("ternary34", 6), "must be a multiple of 4"),
        (lambda: Format("int8", zero_dtype="int4"), "zero_dtype"),
        (lambda: Format.parse("int4-32"), "format 'int4-32': '32' is not a part; .* g32; affine"),
        (lambda: Format.parse("int7-g32"), "format 'int7-g32': 'int7' is not a type; types: int8"),
        (lambda: Format.parse("int4-g32-channel"), "'channel' repeats"),
        (lambda: Format.parse("int4-g0"), "'g0' is not a part"),
        (
            lambda: Format.parse("int4-scale=int8"),
            "'int8' is not a scale type; types: float32",
        ),
        (lambda: Format.parse("nf4-affine"), "format 'nf4-affine': nf4 is symmetric"),
        (lambda: Format.parse("ternary34-affine"), "only integers and ternary have zero points"),
        (lambda: Format.parse("ternary34-g6"), "of ternary34 must be a multiple of 4, not 6"),
        (lambda: Format.parse(4), "a format is a string"),
        (lambda: Format("int4", 32).num_groups(48), "48 columns do not divide into groups of 32"),
        (lambda: Format("ternary34").num_groups(10), "not a multiple of 4"),
    ],
)
def test_formats_without_a_meaning_are_refused(build, message):
    with pytest.raises(BoxError, match=message):
        build()


@pytest.mark.parametrize(
    "qtype",
    [
        *("int8", "ternary34", "nf4"),
        *(pytest.param(qtype, marks=pytest.mark.slow) for qtype in ("int2", "ternary")),
    ],
)
def test_channels_of_zeros_stay_zero_and_constants_are_exact(qtype):
    values = np.stack([np.zeros(32, np.float32), np.full(32, 3.0, np.float32)])
    box = quantize(values, Format(qtype))
    actual = np.asarray(dense(box))
    assert np.isfinite(actual).all()
    if qtype != "ternary34":
        np.testing.assert_array_equal(actual[0], 0.0)
        np.testing.assert_allclose(actual[1], 3.0, rtol=0.05)
