"""One flat form for saving: what comes back is what went in, or an error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.compress.quantize import quantize_leaf
from glm_edge.errors import BoxError
from glm_edge.params import Format


@pytest.fixture(scope="module")
def tree():
    weight = jax.device_put(np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32))
    return {
        "a": {"weight": boxes.mask(weight, np.asarray(weight) > 0)},
        "b": {
            "weight": quantize_leaf("weight", weight, Format("int4", 8, scale_dtype="bfloat16"))[0]
        },
        "c": {"kernel": quantize_leaf("kernel", weight, Format("int8", symmetric=False))[0]},
        "d": {"weight": weight, "bias": jnp.zeros(4, jnp.bfloat16)},
    }


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_from_flat_undoes_to_flat_through_a_file(tree, tmp_path):
    arrays, spec = boxes.to_flat(tree)
    write_safetensors(tmp_path / "weights.safetensors", arrays)
    file = SafetensorsFile(tmp_path / "weights.safetensors")
    read = {name: jax.device_put(file.read(name)) for name in file.tensors}
    assert_same(boxes.from_flat(read, spec), tree)
    assert boxes.stored_bytes(tree) == sum(array.nbytes for array in arrays.values())


def test_the_description_survives_json(tree):
    arrays, spec = boxes.to_flat(tree)
    assert_same(boxes.from_flat(arrays, json.loads(json.dumps(spec))), tree)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays, spec: arrays.pop("b/weight.scale"), "b/weight: array 'scale' is missing"),
        (lambda arrays, spec: arrays.pop("a/weight.mask"), "a/weight: array 'mask' is missing"),
        (lambda arrays, spec: spec["b/weight"].update(box="Ternary"), "unknown box 'Ternary'"),
        (lambda arrays, spec: spec["b/weight"].update(columns=24), "b/weight: data must be"),
        (
            lambda arrays, spec: arrays.update({"b/weight.scale": jnp.ones((4, 3))}),
            "b/weight: scale",
        ),
        (
            lambda arrays, spec: spec["c/kernel"]["format"].update(symmetric=True),
            "c/kernel: only an affine format has zero points",
        ),
    ],
)
def test_arrays_and_description_that_do_not_fit_are_refused(tree, damage, message):
    arrays, spec = boxes.to_flat(tree)
    damage(arrays, spec)
    with pytest.raises(BoxError, match=message):
        boxes.from_flat(arrays, spec)
