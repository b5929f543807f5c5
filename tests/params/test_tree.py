"""Partition, casts, selection and counts over trees of arrays and boxes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from glm_edge import params as boxes
from glm_edge.compress.quantize import quantize_leaf
from glm_edge.errors import RecipeError
from glm_edge.params import Format


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    masked, rounded, plain = (jax.device_put(np.float32(rng.normal(size=(4, 8)))) for _ in range(3))
    return {
        "layers": {
            "0": {"weight": boxes.mask(masked, np.abs(masked) > 0.5), "bias": jnp.ones(4)},
            "1": {"weight": quantize_leaf("weight", rounded, Format("int4", 8))[0]},
            "2": {"weight": quantize_leaf("weight", rounded, Format("int8", symmetric=False))[0]},
        },
        "steps": jnp.arange(3),
        "plain": {"weight": plain},
    }


def total(tree):
    return sum(
        jnp.sum(jnp.sin(boxes.dense(leaf)))
        for path, leaf in boxes.path_items(tree)
        if path != "steps"
    )


def test_combine_undoes_partition_bit_for_bit(tree):
    trainable, frozen = boxes.partition(tree)
    back = boxes.combine(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_only_floats_and_declared_fields_train(tree):
    trainable, frozen = boxes.partition(tree)
    assert len(jax.tree.leaves(trainable)) == 3
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trainable))
    assert trainable["layers"]["0"]["weight"].mask is None
    assert frozen["layers"]["0"]["weight"].value is None
    assert frozen["layers"]["1"]["weight"].scale is not None


def test_gradients_flow_through_partition_and_stop_at_masks(tree):
    trainable, frozen = boxes.partition(tree)
    gradient = jax.jit(jax.grad(lambda t: total(boxes.combine(t, frozen))))(trainable)
    box = tree["layers"]["0"]["weight"]
    expected = np.cos(boxes.dense(box)) * box.mask
    np.testing.assert_allclose(gradient["layers"]["0"]["weight"].value, expected, atol=1e-6)
    assert gradient["layers"]["1"]["weight"].data is None


def test_partition_trains_values_and_keeps_other_fields(tree):
    """An optimizer trains through partition and keeps the rest."""
    optimizer = optax.adamw(1e-2)
    trainable, frozen = boxes.partition(tree)
    state = optimizer.init(trainable)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0 for x in jax.tree.leaves(state))

    @jax.jit
    def step(trainable, state):
        gradient = jax.grad(lambda t: total(boxes.combine(t, frozen)))(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(3):
        trainable, state = step(trainable, state)
    trained = boxes.combine(trainable, frozen)
    before, after = tree["layers"]["0"]["weight"], trained["layers"]["0"]["weight"]
    np.testing.assert_array_equal(after.mask, before.mask)
    assert not np.allclose(boxes.dense(after), boxes.dense(before))
    assert np.all(np.asarray(boxes.dense(after))[~np.asarray(before.mask)] == 0.0)
    np.testing.assert_array_equal(
        trained["layers"]["1"]["weight"].data, tree["layers"]["1"]["weight"].data
    )


def test_casts_keep_integers_masks_and_scales(tree):
    cast = boxes.cast(tree, jnp.bfloat16)
    assert cast["plain"]["weight"].dtype == jnp.bfloat16
    assert cast["layers"]["0"]["weight"].value.dtype == jnp.bfloat16
    assert cast["layers"]["0"]["weight"].mask.dtype == jnp.bool_
    assert cast["steps"].dtype == jnp.int32
    for name in ("1", "2"):
        old, new = tree["layers"][name]["weight"], cast["layers"][name]["weight"]
        for one, other in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_counts_are_dense_and_bytes_are_stored(tree):
    assert boxes.count(tree["layers"]) == 3 * 32 + 4
    assert boxes.stored_bytes(tree["layers"]["0"]) == 32 * 4 + 32 + 4 * 4
    assert boxes.stored_bytes(tree["layers"]["1"]) == 16 + 4 * 4
    assert boxes.stored_bytes(tree["layers"]["2"]) == 32 + 4 * 4 + 4


def test_walks_keep_boxes_whole(tree):
    paths = [path for path, _ in boxes.path_items(tree)]
    assert paths == [
        "layers/0/bias",
        "layers/0/weight",
        "layers/1/weight",
        "layers/2/weight",
        "plain/weight",
        "steps",
    ]
    names = boxes.map_with_path(lambda path, leaf: path, tree)
    assert names["layers"]["1"]["weight"] == "layers/1/weight"


def test_selection_is_by_regular_expression_and_never_empty(tree):
    assert boxes.select(tree, r"layers/[01]/") == ["layers/0/weight", "layers/1/weight"]
    assert "layers/0/bias" not in boxes.select(tree, None)
    with pytest.raises(RecipeError, match="matches none of 4 matrices"):
        boxes.select(tree, "decoder")
    with pytest.raises(RecipeError, match="not a regular expression"):
        boxes.select(tree, "layers/(")


def test_masked_parameters_train_in_a_train_state_and_keep_zeros():
    model, x = nn.Dense(3), np.ones((2, 4), np.float32)
    mask = np.arange(12).reshape(4, 3) % 2 == 0
    masked = {"kernel": boxes.mask(np.ones((4, 3), np.float32), mask), "bias": jnp.zeros(3)}
    with pytest.raises(TypeError, match="bool"):
        jax.grad(lambda params: model.apply({"params": params}, x).sum())(masked)
    trainable, frozen = boxes.partition(masked)
    state = TrainState.create(apply_fn=model.apply, params=trainable, tx=optax.adam(0.1))

    def loss(trainable):
        params = boxes.combine(trainable, frozen)
        return jnp.sum(jnp.square(model.apply({"params": params}, x) - 5.0))

    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    for _ in range(3):
        state = step(state)
    kernel = np.asarray(boxes.combine(state.params, frozen)["kernel"].unbox())
    assert np.where(mask, kernel > 1, kernel == 0).all()
