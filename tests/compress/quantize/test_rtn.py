"""Rounding to nearest: the published formula, its edge cases, and what it refuses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import prune, quantize
from glm_edge.errors import RecipeError
from tests.tiny_models import init


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


KINDS = [
    (8, None, True),
    (8, None, False),
    (8, 16, True),
    (4, None, True),
    (4, 16, True),
    (4, 16, False),
]


def cases(usual, other):
    """All kinds with both options; slow are those whose code another kind runs too."""
    few = {usual: (KINDS[0], *KINDS[4:]), other: KINDS[-1:]}
    return [
        pytest.param(*kind, option, marks=() if kind in few[option] else pytest.mark.slow)
        for option in few
        for kind in KINDS
    ]


def weight(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def named(bits, group, symmetric, scale_dtype=None) -> str:
    """The format as a string."""
    parts = [f"int{bits}", f"g{group}" if group else "channel"]
    parts += [] if symmetric else ["affine"]
    return "-".join(parts + ([f"scale={scale_dtype}"] if scale_dtype else []))


def rtn_loop(values, bits, group, symmetric, scale_type):
    """`f'` of every weight, in float64 but for the stored type of the scale."""
    rows, columns = values.shape
    half, group = 2 ** (bits - 1), group or columns
    out, integers = np.zeros(values.shape), np.zeros(values.shape, int)
    for r in range(rows):
        for start in range(0, columns, group):
            part = np.float64(values[r, start : start + group])
            if symmetric:
                scale = np.float32(np.abs(part).max() / (half - 1))
            else:
                low, high = min(part.min(), 0.0), max(part.max(), 0.0)
                scale = np.float32((high - low) / (2 * half - 1))
            scale = float(np.asarray(scale).astype(scale_type)) or 1.0
            zero = 0 if symmetric else np.clip(np.round(-half - low / scale), -half, half - 1)
            q = np.clip(np.round(part / scale + zero), -half, half - 1)
            integers[r, start : start + group] = q
            out[r, start : start + group] = scale * (q - zero)
    return out, integers


@pytest.mark.parametrize(("bits", "group", "symmetric", "scale_dtype"), cases(None, "float16"))
def test_matches_a_loop(bits, group, symmetric, scale_dtype):
    values = weight(8, 32) * np.exp(weight(8, 1, seed=1))
    transform = quantize.rtn(named(bits, group, symmetric, scale_dtype))
    _, params, report = transform(nn.Dense(8), {"weight": values})
    stored = {None: ml_dtypes.bfloat16 if group else np.float32, "float16": np.float16}[scale_dtype]
    expected, integers = rtn_loop(np.asarray(values), bits, group, symmetric, stored)
    np.testing.assert_array_equal(params["weight"].codes(), integers)
    np.testing.assert_allclose(boxes.dense(params["weight"]), expected, rtol=1e-6, atol=1e-7)
    error = np.linalg.norm(expected - values) / np.linalg.norm(values)
    assert report.rows[0].relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_a_second_rounding_changes_no_integer(bits, group, symmetric):
    transform = quantize.rtn(named(bits, group, symmetric))
    _, once, _ = transform(None, {"weight": weight(8, 32)})
    _, twice, _ = transform(None, {"weight": boxes.dense(once["weight"])})
    np.testing.assert_array_equal(once["weight"].codes(), twice["weight"].codes())
    np.testing.assert_allclose(
        boxes.dense(twice["weight"]), boxes.dense(once["weight"]), rtol=3e-7, atol=0
    )
    _, same, report = transform(None, once)
    assert same["weight"] is once["weight"]
    assert report.rows == ()


@pytest.mark.parametrize("scale", ["extreme", "mse"])
@pytest.mark.parametrize("format", ["int4", "int4-g16"])
def test_other_scales_lose_less_than_the_largest_magnitude(scale, format):
    values = {"weight": weight(64, 64)}
    errors = {
        name: quantize.rtn(format, scale=name)(None, values)[2].rows[0].relative_error
        for name in ("max", scale)
    }
    assert errors[scale] < errors["max"]


def test_mse_never_loses_more_in_any_group_even_affine():
    values = weight(32, 64) + 0.5
    for format in ("int4-g16", "int4-g16-affine"):
        lost = {}
        for name in ("max", "mse"):
            box = quantize.rtn(format, scale=name)(None, {"weight": values})[1]["weight"]
            square = np.square(np.asarray(boxes.dense(box)) - values).reshape(32, 4, 16)
            lost[name] = np.asarray(square.sum(-1))
        assert (lost["mse"] <= lost["max"] * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "group", "symmetric", "scale"), cases("max", "mse"))
def test_zeros_of_a_mask_stay_zero_and_the_mask_goes(bits, group, symmetric, scale):
    values = {"weight": weight(8, 32)}
    _, pruned, _ = prune.magnitude(0.5)(None, values)
    _, rounded, report = quantize.rtn(named(bits, group, symmetric), scale=scale)(None, pruned)
    box = rounded["weight"]
    assert isinstance(box, boxes.Quantized)
    keep = np.asarray(pruned["weight"].mask)
    assert np.all(np.asarray(boxes.dense(box))[~keep] == 0.0)
    assert report.rows[0].keep_ratio == 0.5


@pytest.mark.parametrize(("bits", "group", "symmetric", "dtype"), cases("float32", "float16"))
def test_groups_of_zeros_and_vanishing_weights_stay_finite(bits, group, symmetric, dtype):
    values = weight(8, 32)
    values[0], values[1] = 0.0, 1e-30
    transform = quantize.rtn(named(bits, group, symmetric, dtype))
    box = transform(None, {"weight": values})[1]["weight"]
    result = np.asarray(boxes.dense(box))
    assert np.isfinite(result).all()
    assert np.all(result[0] == 0.0)
    assert np.all(np.asarray(box.scale)[0] == 1.0)
    zeros = quantize.rtn(named(bits, group, symmetric))(None, {"weight": np.zeros_like(values)})
    assert zeros[2].rows[0].relative_error == 0.0


def test_rtn_report_counts_stored_bytes():
    """Stored bytes are reported and totals count what was left."""
    params = {"a": {"weight": weight(8, 64), "bias": jnp.zeros(8)}}
    _, rounded, report = quantize.rtn("int4-g32")(None, params)
    row = report.rows[0]
    assert (row.path, row.action) == ("a/weight", "int4-g32")
    assert row.bytes_after == 8 * 32 + 8 * 2 * 2 == boxes.stored_bytes(rounded["a"]["weight"])
    assert row.bits == pytest.approx(4.5)
    assert report.bytes_after == row.bytes_after + 32 == boxes.stored_bytes(rounded)
    assert report.bytes_before == 8 * 64 * 4 + 32


def test_a_stock_network_runs_on_rounded_kernels():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, tokens):
            x = nn.Conv(8, (3, 3))(x).mean(axis=(1, 2)) + nn.Embed(20, 8)(tokens)
            return nn.Dense(4)(nn.LayerNorm()(x))

    x, tokens = weight(2, 6, 6, 3), jnp.array([3, 19])
    model = Network()
    params = init(model, x, tokens)["params"]
    same, rounded, report = quantize.rtn("int8")(model, params)
    assert same is model
    assert {row.path for row in report.rows} == {
        "Conv_0/kernel",
        "Dense_0/kernel",
        "Embed_0/embedding",
    }
    result = applied(model, {"params": rounded}, x, tokens)
    np.testing.assert_allclose(result, applied(model, {"params": params}, x, tokens), atol=0.05)
    assert rounded["Conv_0"]["kernel"].scale.shape == (8, 1)
    assert rounded["Dense_0"]["kernel"].scale.shape == (4, 1)
    assert rounded["Embed_0"]["embedding"].scale.shape == (20, 1)


def test_kernels_stacked_by_scan_keep_their_layer_axis():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = weight(2, 8)
    params = init(stack, x, None)["params"]
    _, rounded, _ = quantize.rtn("int8", stacked="Dense")(stack, params)
    box = rounded["Dense_0"]["kernel"]
    assert box.data.shape == box.shape == (3, 8, 8)
    assert box.scale.shape == (3, 8, 1)
    plain = jax.tree.map(boxes.dense, rounded, is_leaf=boxes.is_box)
    result, _ = applied(stack, {"params": rounded}, x, None)
    np.testing.assert_allclose(result, applied(stack, {"params": plain}, x, None)[0], atol=1e-6)


def test_bfloat16_weights_keep_their_type():
    params = {"weight": jnp.asarray(weight(8, 32), jnp.bfloat16)}
    box = quantize.rtn("int8")(None, params)[1]["weight"]
    assert boxes.dense(box).dtype == jnp.bfloat16


def test_where_selects_and_none_takes_what_is_left():
    params = {name: {"weight": weight(8, 32)} for name in ("decoder", "embed", "vision")}
    _, params, _ = quantize.rtn("int4-g32", where="^decoder/")(None, params)
    _, params, report = quantize.rtn("int8")(None, params)
    formats = {name: str(tree["weight"].format) for name, tree in params.items()}
    assert formats == {"decoder": "int4-g32", "embed": "int8-channel", "vision": "int8-channel"}
    assert [row.path for row in report.rows] == ["embed/weight", "vision/weight"]


def test_a_matrix_that_is_not_whole_groups_falls_back_if_asked():
    params = {"a": {"weight": weight(8, 48)}, "b": {"weight": weight(8, 32)}}
    with pytest.raises(RecipeError, match="a/weight: 48 columns do not divide into groups of 32"):
        quantize.rtn("int4-g32")(None, params)
    _, rounded, report = quantize.rtn("int4-g32", fallback_bits=8)(None, params)
    assert str(rounded["a"]["weight"].format) == "int8-channel"
    assert report.rows[0].action == "int8-channel (fallback)"
    assert report.rows[1].action == "int4-g32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int7"}, "'int7' is not a type; types: int8"),
        ({"format": 4}, "a format is a string such as 'int4-g32', not 4"),
        ({"format": "int8-g0"}, "'g0' is not a part; .* channel, tensor or g<columns>"),
        ({"scale": "median"}, "scale must be one of max, extreme, mse"),
        ({"scale": "extreme", "format": "int8-affine"}, "extreme"),
        ({"format": "int8-scale=int8"}, "'int8' is not a scale type; types: float32"),
        ({"fallback_bits": 7}, "bits must be 8, 6, 5, 4, 3 or 2"),
        ({"where": "decoder/("}, "not a regular expression"),
        ({"where": 3}, "where must be str or None"),
    ],
)
def test_options_without_a_meaning_are_refused_at_once(options, message):
    with pytest.raises(RecipeError, match=message):
        quantize.rtn(**options)


def test_calls_that_cannot_be_meant_are_refused():
    params = {"a": {"weight": weight(8, 32)}}
    with pytest.raises(RecipeError, match="matches none of 1 matrices"):
        quantize.rtn(where="decoder")(None, params)
    _, rounded, _ = quantize.rtn("int8")(None, params)
    with pytest.raises(RecipeError, match="a/weight, which is int8-channel already"):
        quantize.rtn("int4", where="a/")(None, rounded)
    for bad in (np.nan, np.inf):
        broken = weight(8, 32)
        broken[1, 2] = bad
        with pytest.raises(RecipeError, match="a/weight: NaN or infinity"):
            quantize.rtn("int8")(None, {"a": {"weight": broken}})
    with pytest.raises(RecipeError, match="float16"):
        quantize.rtn("int8-scale=float16")(None, {"a": {"weight": 1e9 * weight(8, 32)}})
