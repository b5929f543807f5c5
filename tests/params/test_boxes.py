"""Boxes: what they hold, that any Linen module runs on them, and the rules they obey."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress.quantize import quantize_leaf
from glm_edge.errors import BoxError
from glm_edge.kernels import matmul, quantization
from glm_edge.models.layers import Embed, Linear
from glm_edge.params import Format
from glm_edge.params.boxes import describe, rebuild
from glm_edge.params.layouts import Layout
from tests.marks import slow_unless
from tests.tiny_models import init

FORMATS = [
    Format("int8"),
    Format("int8", symmetric=False),
    Format("int4"),
    Format("int4", group_size=8, scale_dtype="bfloat16"),
    Format("int4", group_size=8, symmetric=False, scale_dtype="float16"),
]


# Both branches of the code; the others are slow where a case compiles much.
FEW = slow_unless((FORMATS[0], FORMATS[-1]).__contains__, FORMATS)

linear = jax.jit(boxes.linear, static_argnums=2)
dense = jax.jit(boxes.dense)


def weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantize(leaf, format, name="weight"):
    layout = Layout(0, tuple(range(leaf.ndim - 1))) if name == "kernel" else None
    return quantize_leaf(name, leaf, format, layout=layout)[0]


def test_masked_unboxes_to_value_times_mask_and_masks_accumulate():
    value = weight(3, 4)
    number = np.arange(12).reshape(3, 4)
    first = boxes.mask(value, number % 2 == 0)
    both = boxes.mask(first, number % 3 == 0)
    np.testing.assert_array_equal(boxes.dense(first), value * first.mask)
    np.testing.assert_array_equal(both.mask, number % 6 == 0)
    assert first.shape == (3, 4)


def test_boxes_print_on_one_line():
    format = Format("int4", group_size=8)
    box = quantize(weight(6, 16), format)
    assert repr(box) == f"Quantized(6x16, {format})"
    trained = boxes.fake_quantized(weight(6, 16), box.scale, box.zero, format)
    assert repr(trained) == f"FakeQuantized(6x16, {format})"
    keep = jnp.ones((6, 16), bool)
    assert repr(boxes.mask(weight(6, 16), keep)) == "Masked(6x16, float32)"
    assert repr(boxes.mask(trained, keep)) == f"Masked(6x16, {trained!r})"
    stock = quantize(weight(8, 2, 3), format, "kernel")
    assert repr(stock).startswith("Quantized(8x2x3, ")
    assert "?" in repr(jax.tree.map(lambda leaf: None, box))
    assert repr({"w": jax.eval_shape(lambda: box)}).count("\n") == 0


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantized_unboxes_to_scale_times_steps(format):
    box = quantize(weight(6, 16), format)
    integers = np.asarray(box.codes(), np.float64)
    size = format.group_size or 16
    scale = np.repeat(np.asarray(box.scale, np.float64), size, axis=1)
    zero = 0 if box.zero is None else np.repeat(np.asarray(box.zero, np.float64), size, axis=1)
    np.testing.assert_allclose(dense(box), scale * (integers - zero), rtol=1e-6)
    assert box.shape == (6, 16)
    assert box.scale.dtype == jnp.dtype(format.scale_dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bytes_are_the_bytes_stored(format):
    box = quantize(weight(6, 16), format)
    groups = 16 // (format.group_size or 16)
    expected = 6 * 16 * format.bits // 8 + 6 * groups * jnp.dtype(format.scale_dtype).itemsize
    expected += 0 if format.symmetric else 6 * groups
    assert boxes.stored_bytes({"w": box}) == expected
    assert boxes.count({"w": box}) == 96


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Dense(6), (2, 9)),
        (nn.Conv(6, (3, 3)), (2, 5, 5, 4)),
        (nn.DenseGeneral((2, 3)), (2, 9)),
        (nn.MultiHeadDotProductAttention(2), (2, 5, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_stock_modules_run_on_boxes_unchanged(module, shape, bits):
    x = weight(*shape)
    params = init(module, x, seed=1)["params"]

    def box(path, leaf):
        name = path.rsplit("/", 1)[-1]
        return quantize(leaf, Format(f"int{bits}"), name) if name == "kernel" else leaf

    def cover(path, leaf):
        return boxes.mask(leaf, np.abs(leaf) > 0.1) if path.endswith("kernel") else leaf

    @jax.jit
    def run(boxed):
        plain = jax.tree.map(boxes.dense, boxed, is_leaf=boxes.is_box)
        return plain, *(module.apply({"params": tree}, x) for tree in (boxed, plain))

    for convert in (box, cover):
        plain, result, expected = run(boxes.map_with_path(convert, params))
        assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, params)
        np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.parametrize("format", FEW, ids=str)
def test_a_stock_embedding_runs_on_a_box(format):
    module, tokens = nn.Embed(10, 16), np.array([[0, 9, 3]])
    params = init(module, tokens)["params"]
    box = {"embedding": quantize(params["embedding"], format, "embedding")}
    result = jax.jit(module.apply)({"params": box}, tokens)
    np.testing.assert_allclose(result, np.asarray(dense(box["embedding"]))[tokens], atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_our_linear_hands_the_box_to_the_low_bit_kernel(format, rows, monkeypatch):
    called = []
    kernel = matmul.quantized_matmul
    monkeypatch.setattr(matmul, "quantized_matmul", lambda *args: called.append(1) or kernel(*args))
    module, x = Linear(6), weight(rows, 16)
    box = quantize(weight(6, 16, seed=1), format)
    result = jax.jit(module.apply)({"params": {"weight": box}}, x)
    assert called
    np.testing.assert_allclose(result, x @ np.asarray(dense(box)).T, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_our_embedding_dequantizes_only_the_rows_it_reads(format, monkeypatch):
    # Rounding decodes what it stores, to measure it.
    box, tokens = quantize(weight(10, 16), format), np.array([[0, 9, 3]])
    expected = np.asarray(dense(box))[tokens]
    sizes = []
    name, kernel = "dequantize_levels", quantization.dequantize_levels
    monkeypatch.setattr(
        quantization, name, lambda q, *others: sizes.append(q.shape) or kernel(q, *others)
    )
    actual = jax.jit(Embed(10, 16).apply)({"params": {"weight": box}}, tokens)
    assert set(sizes) == {(1, 3, 16)}
    np.testing.assert_array_equal(actual, expected)


def test_our_tied_head_reaches_the_low_bit_kernel(monkeypatch):
    called = []
    kernel = matmul.quantized_matmul
    monkeypatch.setattr(matmul, "quantized_matmul", lambda *args: called.append(1) or kernel(*args))
    box, x = quantize(weight(10, 16), Format("int8")), weight(2, 16)
    attend = functools.partial(Embed(10, 16).apply, method="attend")
    result = jax.jit(attend)({"params": {"weight": box}}, x)
    assert called
    np.testing.assert_allclose(result, x @ np.asarray(dense(box)).T, atol=1e-5)


def test_int8_dynamic_rounds_rows_of_quantized_weights_only():
    """Int8 dynamic rounds activation rows before a quantized weight only."""
    x, plain = weight(3, 16), weight(6, 16, seed=1)
    box = quantize(plain, Format("int8"))
    rounded = np.asarray(jax.jit(matmul.round_rows_to_int8)(x))
    result = linear(x, box, "int8_dynamic")
    np.testing.assert_allclose(result, rounded @ np.asarray(dense(box)).T, atol=1e-5)
    np.testing.assert_allclose(linear(x, plain, "int8_dynamic"), x @ plain.T, atol=1e-5)


@pytest.mark.parametrize("format", FEW, ids=str)
def test_scan_runs_over_stacked_boxes(format):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(16)(nn.silu(Linear(16, name="ours")(x))), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = weight(5, 16)
    params = init(stack, x, None)["params"]

    def box(path, leaf):
        name = path.rsplit("/", 1)[-1]
        return leaf if leaf.ndim == 1 else quantize(leaf, format, name)

    layers = [
        boxes.map_with_path(box, jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], params))
        for i in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *layers)
    expected, block = x, jax.jit(Block().apply)
    for layer in layers:
        expected, _ = block({"params": layer}, expected, None)
    actual, _ = jax.jit(stack.apply)({"params": stacked}, x, None)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    unboxed = np.asarray(dense(stacked["ours"]["weight"]))
    np.testing.assert_allclose(unboxed[1], dense(layers[1]["ours"]["weight"]))


@pytest.mark.parametrize("format", FEW, ids=str)
def test_vmap_runs_over_a_batch_of_boxes(format):
    each = [quantize(weight(6, 16, seed=i), format) for i in range(3)]
    x = weight(3, 2, 16)
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each)

    @jax.jit
    def run(x, stacked):
        return jax.vmap(boxes.linear)(x, stacked), jax.vmap(boxes.dense)(stacked)

    result, unboxed = jax.device_get(run(x, stacked))
    for i, box in enumerate(each):
        np.testing.assert_allclose(result[i], linear(x[i], box), atol=1e-5)
    np.testing.assert_array_equal(unboxed, np.stack([dense(box) for box in each]))


def test_static_fields_are_hashable_so_that_a_box_is_traced_once():
    traces = []

    @jax.jit
    def unbox(box):
        traces.append(1)
        return box.unbox()

    for seed in range(3):
        unbox(quantize(weight(6, 16, seed=seed), Format("int4", 8)))
    assert len(traces) == 1


def test_axis_metadata_is_the_identity_on_axes():
    box = quantize(weight(6, 16), Format("int8"))
    assert box.add_axis(0, {}) is box
    assert box.remove_axis(0, {}) is box


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: boxes.mask(weight(2, 2), jnp.ones((2, 2))), "mask must be bool"),
        (lambda: boxes.mask(weight(2, 2), jnp.ones((2, 3), bool)), "mask must be bool"),
        (
            lambda: boxes.mask(quantize(weight(2, 2), Format("int8")), jnp.ones((2, 2), bool)),
            "prune before quantizing",
        ),
        (lambda: Format("int7"), "qtype 'int7' is unknown"),
        (lambda: Format("int4", 0), "group_size must be positive"),
        (lambda: Format("int4", 8, scale_dtype="int8"), "scale_dtype"),
        (
            lambda: boxes.quantized(
                jnp.zeros((2, 9), jnp.int8), jnp.ones((2, 1)), None, Format("int4", 8)
            ),
            "9 columns do not divide into groups of 8",
        ),
        (
            lambda: boxes.quantized(jnp.zeros((2, 8)), jnp.ones((2, 1)), None, Format("int8")),
            "must be int8",
        ),
        (
            lambda: boxes.quantized(
                jnp.zeros((2, 8), jnp.int8), jnp.ones((2, 2)), None, Format("int8")
            ),
            "scale must be",
        ),
        (
            lambda: boxes.quantized(
                jnp.zeros((2, 8), jnp.int8), jnp.ones((2, 1)), None, Format("int8", symmetric=False)
            ),
            "zero points",
        ),
    ],
)
def test_factories_refuse_what_has_no_meaning(build, message):
    with pytest.raises(BoxError, match=message):
        build()


def test_boxes_rebuild_around_placeholders():
    box = quantize(weight(6, 16), Format("int4", 8))
    shapes = jax.tree.map(lambda leaf: leaf.shape, box)
    assert shapes.data == (6, 8)
    assert jax.tree.leaves(jax.tree.map(lambda _: None, box)) == []


def test_a_wrong_dense_shape_is_refused_by_name():
    box = quantize(weight(6, 16), Format("int8"))
    with pytest.raises(ValueError, match="weight: shape"):
        Linear(7).apply({"params": {"weight": box}}, weight(2, 16))


GRIDS = {f"{side}_{name}" for side in ("input", "output") for name in ("scale", "zero")}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"output_scale", "output_zero"}, None),
        (GRIDS, None),
        (set(), None),
        ({"output_zero"}, "output_scale and output_zero must be set together"),
        ({"input_scale"}, "input_scale and input_zero must be set together"),
        ({"input_scale", "input_zero"}, "output_scale requires input_scale"),
    ],
)
def test_static_grids_come_whole_and_outputs_after_inputs(missing, message):
    box = quantize(weight(4, 8), Format("int8"))
    scale, zero = jnp.float32(0.5), jnp.int8(3)
    stored = {name: scale if name.endswith("scale") else zero for name in GRIDS - missing}
    static = describe(box)
    fields = {name: v for name, v in boxes.array_fields(box).items() if v is not None} | stored
    if message:
        with pytest.raises(BoxError, match=message):
            rebuild(fields, static)
        return
    rebuilt = rebuild(fields, static)
    results = {name for name in GRIDS if getattr(rebuilt, name) is not None}
    assert results == GRIDS - missing
    if stored:
        with pytest.raises(BoxError, match=r"must be \(\) each"):
            rebuild(fields | {"input_scale": jnp.ones(2)}, static)
