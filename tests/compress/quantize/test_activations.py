"""Static grids of activations: what was seen fits them, and the model computes on them."""

import dataclasses

import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, chain
from glm_edge.compress.layerwise.runner import StageInputs
from glm_edge.compress.layerwise.stages import ROWS, first_states, stages
from glm_edge.compress.quantize.activations import activations
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.compress.quantize.solvers.activation_ranges import METHODS
from glm_edge.errors import DataError, RecipeError

LAYERS = r"layers/"


@pytest.fixture
def rounded(square, batch_of):
    model, params = square
    calibration = [batch_of(model, rows=4, seed=seed) for seed in (1, 2)]
    return model, rtn("int8", where=LAYERS)(model, params)[1], calibration


def rows_of(model, params, calibration):
    leaves, states, result = dict(boxes.path_items(params)), first_states(model, calibration), {}
    for stage in stages(model):
        view = StageInputs(stage, leaves, states)
        result |= view.collect(ROWS)
        states = view.run()
    return result


@pytest.mark.parametrize("symmetric", [False, True])
def test_minmax_spans_what_was_seen(rounded, symmetric):
    model, params, calibration = rounded
    _, compressed, report = activations(symmetric=symmetric)(model, params, calibration)
    rows = rows_of(model, params, calibration)
    stored = {
        p: leaf for p, leaf in boxes.path_items(compressed) if isinstance(leaf, boxes.Quantized)
    }
    assert {row.path for row in report.rows} == set(stored)
    for path, box in stored.items():
        low, high = min(float(rows[path].min()), 0.0), max(float(rows[path].max()), 0.0)
        if symmetric:
            scale, zero = max(-low, high) / 127, 0
        else:
            scale = (high - low) / 255
            zero = round(-128 - low / scale)
        assert float(box.input_scale) == pytest.approx(scale, rel=1e-5)
        assert int(box.input_zero) == zero
        products = np.asarray(rows[path], np.float64) @ np.asarray(box.rows(), np.float64).T
        low, high = min(products.min(), 0.0), max(products.max(), 0.0)
        if symmetric:
            scale, zero = max(-low, high) / 127, 0
        else:
            scale = (high - low) / 255
            zero = round(-128 - low / scale)
        assert float(box.output_scale) == pytest.approx(scale, rel=1e-5)
        assert int(box.output_zero) == zero
        np.testing.assert_array_equal(box.data, dict(boxes.path_items(params))[path].data)


@pytest.mark.parametrize("method", METHODS)
def test_static_logits_are_near_those_of_float(rounded, method):
    model, params, calibration = rounded
    actual = activations(method)(model, params, calibration)[1]
    static = dataclasses.replace(model, compute="int8_static")
    logits = jax.jit(batches.apply_batch, static_argnums=0)
    expected = np.asarray(logits(model, params, calibration[0]))
    lost = logits(static, actual, calibration[0]) - expected
    assert 0 < np.linalg.norm(lost) < 0.1 * np.linalg.norm(expected)


def test_methods_other_than_minmax_clip(rounded):
    model, params, calibration = rounded
    scales, products = {}, {}
    for method in METHODS:
        result = activations(method, percentile=90.0)(model, params, calibration)[1]
        boxed = [leaf for _, leaf in boxes.path_items(result) if isinstance(leaf, boxes.Quantized)]
        scales[method] = sum(float(box.input_scale) for box in boxed)
        products[method] = sum(float(box.output_scale) for box in boxed)
    assert products["percentile"] < 0.9 * products["minmax"]
    assert products["mse"] <= products["minmax"]
    assert scales["percentile"] < 0.9 * scales["minmax"]
    assert scales["mse"] <= scales["minmax"]
    assert scales["entropy"] <= scales["minmax"]


def test_chains_after_rounding_and_needs_something_rounded(square, batch_of):
    model, params = square
    calibration = [batch_of(model, rows=4)]
    result = chain(rtn("int8", where=LAYERS), activations())(model, params, calibration)[1]
    stored = [leaf for _, leaf in boxes.path_items(result) if isinstance(leaf, boxes.Quantized)]
    assert all(box.input_scale is not None for box in stored)
    with pytest.raises(RecipeError, match="quantize first"):
        activations()(model, params, calibration)
    with pytest.raises(DataError, match="calibration"):
        activations()(model, params)


def test_options_without_meaning_are_refused():
    for options in (
        {"method": "max"},
        {"percentile": 20},
        {"percentile": 101},
        {"symmetric": 1},
        {"where": "("},
    ):
        with pytest.raises(RecipeError, match=r"quantize\.activations"):
            activations(**options)
