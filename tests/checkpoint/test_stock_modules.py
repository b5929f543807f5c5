"""Saving and loading the parameters of a Linen module that is not one of this library."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge.compress import prune, quantize
from glm_edge.errors import CheckpointError


class Net(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3))(x)
        return nn.DenseGeneral((2, 4))(nn.relu(x))


IMAGE = jnp.ones((1, 4, 4, 3))
SHAPES = jax.eval_shape(Net().init, jax.random.key(0), IMAGE)["params"]


@pytest.fixture(scope="module")
def compressed():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), SHAPES)
    _, params, _ = prune.mask(0.5, where="Conv")(Net(), params)
    return quantize.rtn("int4", where="Dense")(Net(), params)[1]


@pytest.mark.parametrize("store", ["safetensors", "orbax"])
def test_boxes_come_back_bit_by_bit(compressed, store, tmp_path):
    ge.save(Net(), compressed, tmp_path / "net", format=store)
    model, params = ge.load(tmp_path / "net", model=Net(), like=SHAPES)
    assert model == Net()
    assert jax.tree.structure(params) == jax.tree.structure(compressed)
    jax.tree.map(np.testing.assert_array_equal, params, compressed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"pass it: load\(path, model=module\)"),
        ({"model": nn.Dense(3)}, "of a 'Net', not of a Dense"),
        ({"model": Net(16)}, "width of the module is 8 in the checkpoint and 16"),
        ({"model": Net(), "like": {"Conv_0": SHAPES["Conv_0"]}}, "DenseGeneral_0"),
    ],
)
def test_another_module_is_refused(compressed, options, message, tmp_path):
    ge.save(Net(), compressed, tmp_path / "net")
    with pytest.raises(CheckpointError, match=message):
        ge.load(tmp_path / "net", **options)


@pytest.mark.parametrize(
    ("model", "params", "message"),
    [
        (object(), SHAPES, "your own Linen module, not a object; for nnx"),
        (Net(), None, "params is a NoneType"),
        (Net(), Net(), "params is a Net"),
        (Net(), {"a/b": {"c": jnp.ones(3)}, "a": {"b/c": jnp.ones(2)}}, "do not contain '/'"),
    ],
)
def test_save_refuses_what_is_no_module_or_no_parameters(model, params, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        ge.save(model, params, tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("box", ["Masked"]), ("box", {}), ("dtype", "int32"), ("dtype", {}), ("dtype", "complex64")],
)
def test_boxes_of_no_meaning_are_refused(compressed, field, value, tmp_path):
    ge.save(Net(), compressed, tmp_path / "net")
    config = json.loads((tmp_path / "net/config.json").read_text())
    config["params"]["DenseGeneral_0/kernel"][field] = value
    (tmp_path / "net/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        ge.load(tmp_path / "net", model=Net())


def test_scales_beyond_the_dense_type_are_refused(compressed, tmp_path):
    box = compressed["DenseGeneral_0"]["kernel"]
    huge = box.replace(scale=jnp.full_like(box.scale, 1e38))
    bias = compressed["DenseGeneral_0"]["bias"]
    params = {**compressed, "DenseGeneral_0": {"kernel": huge, "bias": bias}}
    with pytest.raises(CheckpointError, match=r"DenseGeneral_0/kernel.*not finite"):
        ge.save(Net(), params, tmp_path / "net")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: ge.save(path, Net(), {}), r"save\(model, params, path\), not save\("),
        (lambda path: ge.save(Net(), path, {}), r"save\(model, params, path\), not save\("),
        (lambda path: ge.load(None), "load: path must be a checkpoint directory, not a NoneType"),
        (lambda path: ge.build({}), "build: path must be a checkpoint directory, not a dict"),
        (
            lambda path: ge.load_tokenizer(None),
            "load_tokenizer: path must be a checkpoint directory",
        ),
        (lambda path: ge.load(path, dtype="float99"), "dtype 'float99' is unknown; known: float32"),
        (lambda path: ge.load(path, dtype=7), "dtype 7 is unknown; known: float32"),
    ],
)
def test_arguments_of_another_form_are_named(call, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        call(tmp_path)
