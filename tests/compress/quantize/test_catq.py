"""Softened ternary weights: their ends, their hard codes, and blocks that come closer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import TrainOptions, recipe_from_json, to_json
from glm_edge.compress.quantize import rtn
from glm_edge.compress.quantize.catq import catq
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.compress.quantize.solvers.softened import Softened, transition
from glm_edge.errors import RecipeError
from glm_edge.params import Format, Quantized

WHERE = r"layers/0/mlp"
dense = jax.jit(boxes.dense)


def softened(name, seed=0):
    """A weight [6, 32] with random factors."""
    rng = np.random.default_rng(seed)
    weight, format = jnp.float32(rng.normal(size=(6, 32)) + 0.3), Format.parse(name)
    box = Softened.of(weight, grids.choose(weight, format, "mse"), format, True, 30.0, "float32")
    names = ("scale_factor", "offset_factor", "threshold_factor")
    return box.replace(**{n: jnp.float32(rng.normal(size=box.scale.shape)) for n in names})


def test_transition_goes_from_the_identity_to_three_levels():
    x, threshold = jnp.linspace(-2, 2, 41), jnp.float32(0.6)
    np.testing.assert_array_equal(transition(x, threshold, jnp.float32(0), 30.0), x)
    hard = np.where(np.abs(x) > 0.6, np.sign(x), 0)
    far = np.abs(np.abs(x) - 0.6) > 0.15
    steep = transition(x, threshold, jnp.float32(1), 30.0)
    np.testing.assert_allclose(steep[far], hard[far], atol=1e-3)
    assert (np.diff(transition(x, threshold, jnp.float32(0.5), 30.0)) > 0).all()


@pytest.mark.parametrize("name", ["ternary-g8", "ternary-g8-affine", "ternary-tensor"])
def test_hardened_codes_are_the_weight_at_hardness_one(name):
    box = softened(name)
    codes, grid = box.hardened()
    packed = boxes.quantized(codes, *grid, box.format)
    hard = dense(box.replace(hardness=jnp.float32(1)))
    np.testing.assert_allclose(hard, dense(packed), rtol=1e-5, atol=1e-6)
    # The threshold, in units of the scale, is the sigmoid of its factor.
    scale, offset, threshold = (
        np.repeat(np.asarray(x), 32 // box.scale.shape[-1], axis=-1)
        for x in (
            box.scale * 2 / (1 + np.exp(-box.scale_factor)),
            box.offset + box.scale * (2 / (1 + np.exp(-box.offset_factor)) - 1),
            1 / (1 + np.exp(-box.threshold_factor)),
        )
    )
    x = (np.asarray(box.value) - offset) / scale
    np.testing.assert_array_equal(codes, np.where(np.abs(x) > threshold, np.sign(x), 0))


@pytest.mark.parametrize("weights", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_catq_lowers_the_error_of_a_block(square, calibration, logits, weights):
    model, params = square
    train = TrainOptions(steps=60, learning_rate=0.02)
    transform = catq("ternary-g16", where=WHERE, weights=weights, train=train)
    transform = recipe_from_json(to_json(transform))
    _, trained, report = transform(model, params, calibration=calibration)
    _, nearest, _ = rtn("ternary-g16", where=WHERE, scale="mse")(model, params)
    changed = {path for path, leaf in boxes.path_items(trained) if isinstance(leaf, Quantized)}
    assert changed == {row.path for row in report.rows}
    assert all("block error" in row.action for row in report.rows)

    wanted, rounded, actual = (
        np.concatenate([logits(model, tree, batch) for batch in calibration])
        for tree in (params, nearest, trained)
    )
    assert np.linalg.norm(actual - wanted) < 0.9 * np.linalg.norm(rounded - wanted)


def test_catq_keeps_the_zeros_of_a_mask(square, calibration):
    model, params = square
    path = "decoder/layers/0/mlp/down_proj/weight"
    leaves = dict(boxes.path_items(params))
    keep = np.random.default_rng(0).random(leaves[path].shape) < 0.5
    leaves[path] = boxes.mask(leaves[path], jnp.asarray(keep))
    masked = boxes.tree.nested(leaves)
    transform = catq("ternary-g16", where="0/mlp/down", train=TrainOptions(steps=4))
    box = dict(boxes.path_items(transform(model, masked, calibration=calibration)[1]))[path]
    assert not np.asarray(box.unbox())[~keep].any()
    assert np.asarray(box.unbox())[keep].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int4-g32"}, "cannot round to int4-g32"),
        ({"format": "ternary34"}, "cannot round to ternary34"),
        ({"softened": 0.0}, "softened must be in"),
        ({"sharpness": 0.0}, "sharpness must be positive"),
        ({"train": {"accumulate": 2}}, "steps, learning_rate, warmup and compute, not accumulate"),
    ],
)
def test_catq_refuses_options_without_a_meaning(options, message):
    with pytest.raises(RecipeError, match=f"quantize.catq.*{message}"):
        catq(**options)
