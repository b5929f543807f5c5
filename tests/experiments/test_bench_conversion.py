"""Shapes and random parameters of the export benchmark."""

import numpy as np
import pytest

from experiments import bench_conversion
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("glm_edge_1_5b", 1_472_055_296), ("glm_4_9b", 9_399_951_360)],
)
def test_shapes_have_the_published_counts(name, parameters):
    shapes = expected_shapes(MultimodalGLM(bench_conversion.shape_of(name)))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("form", ["int8", "int4", "int4-g32", "int2"])
def test_random_weights_keep_the_size_of_what_they_meet(form):
    box = bench_conversion.random_box(np.random.default_rng(0), (256, 512), Format.parse(form))
    assert boxes.stored_bytes(box) == Format.parse(form).stored_bytes((256, 512))
    x = np.random.default_rng(1).normal(size=(64, 512))
    assert 0.5 < float(np.std(x @ np.asarray(box.unbox(), np.float64).T)) < 2
