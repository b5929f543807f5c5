"""Learned rounding of a model's layers: closer outputs, masks, chains, and what is refused."""

import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import chain, prune
from glm_edge.compress.layerwise.stages import ROWS, first_states, stages
from glm_edge.compress.quantize import rtn
from glm_edge.compress.quantize.adaround import adaround
from glm_edge.compress.readings import LOOKED_UP
from glm_edge.errors import DataError, RecipeError
from glm_edge.params import Masked, Quantized

DECODER = r"^decoder/"
# One format, model and length of training, so that few programs are compiled.
FORMAT = "int3-g16"


def layer_outputs(model, params, calibration):
    """What each matrix of the decoder gives on the inputs that it meets, by path."""
    states, result = first_states(model, calibration), {}
    # Dense weights, so that all formats run the same programs.
    leaves = {path: boxes.dense(leaf) for path, leaf in boxes.path_items(params)}
    for stage in stages(model)[:-1]:
        if stage.name.startswith("decoder/"):
            for path, rows in stage.collect(leaves, states, ROWS).items():
                result[path] = np.asarray(rows) @ np.asarray(leaves[path]).T
        states = stage.run(leaves, states)
    return result


@pytest.mark.parametrize("method", [pytest.param("adaround", marks=pytest.mark.slow), "descent"])
def test_adaround_beats_nearest_in_each_layer(square, calibration, method):
    """Each layers output is closer to the originals than by nearest."""
    model, params = square
    options = {"where": DECODER, "scale": "mse"}
    nearest = rtn(FORMAT, **options)(model, params)[1]
    _, learned, report = adaround(FORMAT, method=method, **options)(
        model, params, calibration=calibration
    )
    wanted, first, actual = (
        layer_outputs(model, tree, calibration) for tree in (params, nearest, learned)
    )
    assert len(wanted) == 12
    errors = [
        [np.linalg.norm(original[path] - wanted[path]) for path in wanted]
        for original in (first, actual)
    ]
    assert sum(errors[1]) < 0.7 * sum(errors[0])
    assert errors[1][-1] < 0.8 * errors[0][-1]
    assert all(row.action == FORMAT for row in report.rows)
    for path, leaf in boxes.path_items(learned):
        assert isinstance(leaf, Quantized) == ("proj/weight" in path), path


def test_adaround_with_mask_and_without_inputs(square, calibration):
    """A mask stays and a matrix without inputs is rounded to nearest."""
    model, params = square
    down = "layers/0/mlp/down_proj"
    masked = prune.magnitude(0.5, where=down)(model, params)[1]
    transform = adaround(FORMAT, where=f"{down}|^embed")
    _, learned, report = transform(model, masked, calibration=calibration)
    for path, leaf in boxes.path_items(masked):
        if isinstance(leaf, Masked):
            stored = dict(boxes.path_items(learned))[path].unbox()
            assert np.all(np.asarray(stored)[~np.asarray(leaf.mask)] == 0.0)
    notes = {row.path: row.action for row in report.rows}
    assert notes["embed/weight"] == f"{FORMAT} (to nearest: {LOOKED_UP})"
    nearest = rtn(FORMAT, scale="mse", where="^embed")(model, masked)[1]["embed"]["weight"]
    np.testing.assert_array_equal(learned["embed"]["weight"].data, nearest.data)


def test_what_was_rounded_before_is_made_up_for(square, calibration):
    model, params = square
    before, options = rtn(FORMAT, where="layers/0/"), {"where": "layers/1/", "scale": "mse"}
    recipe = chain(before, adaround(FORMAT, **options))
    learned = recipe(model, params, calibration=calibration)[1]
    plain = chain(before, rtn(FORMAT, **options))(model, params)[1]
    wanted, first, actual = (
        layer_outputs(model, tree, calibration) for tree in (params, plain, learned)
    )
    path = "decoder/layers/1/attention/q_proj/weight"
    assert np.linalg.norm(actual[path] - wanted[path]) < np.linalg.norm(first[path] - wanted[path])


@pytest.mark.slow
def test_every_stage_of_every_member_is_rounded(member, make_member, batch_of):
    model, params = make_member(member)
    transform = adaround("int4", fallback_bits=8, steps=5)
    _, learned, _ = transform(model, params, calibration=[batch_of(model)])
    for path, leaf in boxes.path_items(learned):
        assert isinstance(leaf, Quantized) == boxes.is_matrix(path, leaf), path


def test_what_cannot_be_rounded_is_refused(square, calibration):
    model, params = square
    with pytest.raises(DataError, match="needs calibration="):
        adaround()(model, params)
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)
    with pytest.raises(RecipeError, match="NaN or infinity"):
        adaround()(model, broken, calibration=calibration)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "signround"}, "method must be one of adaround, descent"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"sweeps": 0}, "sweeps must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"format": "ternary34"}, "cannot round to"),
        ({"format": "int7"}, "'int7' is not a type; types: int8"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        adaround(**options)
