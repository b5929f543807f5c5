"""Distillation of scales: integers stay, types stay, the student comes closer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import TrainOptions, chain
from glm_edge.compress.quantize import rtn
from glm_edge.compress.quantize.distill_scales import _check_finite, distill_scales
from glm_edge.errors import DataError, RecipeError

DECODER = r"^decoder/"


@pytest.fixture
def small(make_model):
    return make_model(num_layers=1, num_heads=4, num_kv_heads=4, intermediate_size=32)


def arrays_of(params):
    return {name: np.asarray(array) for name, array in boxes.to_flat(params)[0].items()}


def moved_by(before, after):
    old, new = arrays_of(before), arrays_of(after)
    assert {n: a.dtype for n, a in old.items()} == {n: a.dtype for n, a in new.items()}
    return {name for name in old if not np.array_equal(old[name], new[name])}


@pytest.mark.parametrize("format", ["int2-g16", pytest.param("int2", marks=pytest.mark.slow)])
def test_scales_and_norms_move_and_integers_stay(small, calibration, format):
    model, params = small
    _, rounded, _ = rtn(format, where=DECODER)(model, params)
    transform = distill_scales(
        teacher=(model, params), train=TrainOptions(steps=30, learning_rate=0.02)
    )
    _, tuned, report = transform(model, rounded, calibration=calibration, rng=jax.random.key(0))
    assert np.mean([p.soft for p in report.curve[-4:]]) < 0.8 * report.curve[0].soft
    names = {name for name in arrays_of(rounded) if name.startswith("decoder/")}
    assert moved_by(rounded, tuned) == {n for n in names if n.endswith(".scale") or "norm" in n}
    assert jax.tree.structure(tuned) == jax.tree.structure(rounded)
    assert report.rows[0].action.endswith("(scales trained)")


def test_only_the_scales_that_match_move_when_norms_do_not(small, calibration):
    model, params = small
    _, rounded, _ = rtn("int4", where=DECODER)(model, params)
    transform = distill_scales(
        where="q_proj",
        norms=False,
        teacher=(model, params),
        train=TrainOptions(steps=2, compute="bfloat16"),
    )
    tuned = transform(model, rounded, calibration=calibration)[1]
    assert moved_by(rounded, tuned) == {"decoder/layers/0/attention/q_proj/weight.scale"}


def test_floating_zero_points_train_and_integer_ones_stay(stock, calibration):
    model, params = stock
    path = "hidden/kernel"
    _, affine, _ = rtn("int2-affine", where=path)(model, params)

    def floating(name, leaf):
        if name != path:
            return leaf
        format = boxes.Format("int2", None, False, "float32", "bfloat16")
        return leaf.replace(zero=jnp.asarray(leaf.zero, jnp.bfloat16), format=format)

    options = {"norms": False, "teacher": (model, params)}
    options["train"] = TrainOptions(steps=4, learning_rate=0.02)
    for rounded, expected in (
        (affine, {f"{path}.scale"}),
        (boxes.map_with_path(floating, affine), {f"{path}.scale", f"{path}.zero"}),
    ):
        tuned = distill_scales(**options)(model, rounded, calibration=calibration)[1]
        assert moved_by(rounded, tuned) == expected


def test_in_a_chain_the_teacher_is_what_it_started_from(small, calibration):
    model, params = small
    rounded = rtn("int2-g16", where=DECODER)
    recipe = chain(rounded, distill_scales(train=TrainOptions(steps=2)))
    _, actual, _ = recipe(model, params, calibration=calibration)
    _, student, _ = rounded(model, params)
    explicit = distill_scales(teacher=(model, params), train=TrainOptions(steps=2))
    _, expected, _ = explicit(model, student, calibration=calibration)
    assert moved_by(actual, expected) == set()


def test_what_cannot_be_trained_is_refused(small, calibration):
    model, params = small
    _, rounded, _ = rtn("int4", where=DECODER)(model, params)
    with pytest.raises(DataError, match="needs calibration="):
        distill_scales(teacher=small)(model, rounded)
    with pytest.raises(RecipeError, match="its own teacher"):
        distill_scales()(model, rounded, calibration=calibration)
    with pytest.raises(RecipeError, match="matches no quantized weight"):
        distill_scales(teacher=small)(model, params, calibration=calibration)
    with pytest.raises(RecipeError, match="where='embed' matches no quantized weight"):
        distill_scales(teacher=small, where="embed")(model, rounded, calibration=calibration)
    with pytest.raises(RecipeError, match="steps must be a whole number"):
        distill_scales(train=TrainOptions(steps=0))


def test_what_left_the_range_of_its_type_is_refused(small):
    leaf = rtn("int4-scale=float16", where="q_proj")(*small)[1]
    stored = boxes.partition(leaf, scales=True)[0]
    _check_finite(stored)
    layer = stored["decoder"]["layers"]["0"]["attention"]["q_proj"]
    layer["weight"] = layer["weight"].replace(scale=np.full((32, 1), np.inf, np.float16))
    with pytest.raises(RecipeError, match="q_proj/weight: trained values exceed the range"):
        _check_finite(stored)
