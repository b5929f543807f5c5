"""Folds: a factor moved between matrices leaves the function as it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, folding
from glm_edge.configs import TextConfig
from glm_edge.errors import RecipeError
from glm_edge.models.text import TextEncoder
from glm_edge.params.tree import nested
from tests.compress.conftest import MEMBERS
from tests.marks import slow_unless
from tests.tiny_models import init


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


def factors(fold, seed=0):
    return np.exp(np.random.default_rng(seed).normal(0, 1, fold.channels)).astype(np.float32)


def leaves_of(params):
    return dict(boxes.path_items(params))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return batches.apply_batch(model, params, batch)


def relative_change(model, before, after, batch):
    expected = logits(model, before, batch)
    return float(jnp.abs(logits(model, after, batch) - expected).max() / jnp.abs(expected).max())


# Both encoders, sandwich norms and an untied head, and layers of other widths.
QUICK = ("nano", "sandwich", "pruned")


@pytest.mark.parametrize(
    "member",
    slow_unless(QUICK.__contains__, sorted(MEMBERS)),
)
def test_every_fold_leaves_the_function_as_it_was(make_member, make_shallow, batch_of, member):
    # Widths of the pruned member differ from layer to layer.
    model, params = (make_member if member == "pruned" else make_shallow)(member)
    leaves = leaves_of(params)
    result = folding.folds(model.config)
    assert all(fold.within(leaves) for fold in result)
    for index, fold in enumerate(result):
        changed = folding.move(fold, leaves, factors(fold, index))
        assert set(changed) == {*fold.producers, *fold.consumers}
        leaves = {**leaves, **changed}
    assert relative_change(model, params, nested(leaves), batch_of(model)) < 1e-5


@pytest.mark.parametrize("name", ["nano", "pruned", "glm4"])
def test_each_fold_moves_what_it_names_and_only_together(make_member, make_shallow, batch_of, name):
    model, params = (make_member if name == "pruned" else make_shallow)(name)
    leaves, batch = leaves_of(params), batch_of(model)
    observed = set()
    for fold in folding.folds(model.config):
        key = (fold.kind, fold.producers[0].split("/")[0])
        if key in observed:
            continue
        observed.add(key)
        changed = folding.move(fold, leaves, factors(fold))
        half = {**leaves, **{path: changed[path] for path in fold.producers}}
        assert relative_change(model, params, nested(half), batch) > 1e-4, fold


def test_kinds_of_each_member(make_member, member):
    model, _ = make_member(member)
    config = model.config
    paths = {path for fold in folding.folds(config) for path in fold.consumers}
    assert not any(path.endswith(("fc2/weight", "linear_2/weight")) for path in paths)
    assert ("head/weight" in paths) == (not config.decoder.tie_embeddings)
    for index in range(config.decoder.num_layers):
        layer = f"decoder/layers/{index}"
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        assert {f"{layer}/attention/{name}/weight" for name in names} <= paths
        assert {f"{layer}/mlp/{name}/weight" for name in ("gate_up_proj", "down_proj")} <= paths


def test_folded_columns_share_a_key_value_head(make_member):
    """Columns that share a factor are those of one key value head."""
    model, _ = make_member("glm4")
    fold = folding.folds(model.config)[0]
    assert (fold.kind, fold.blocks) == ("value", (2, 2, 8))
    spread = np.asarray(fold.spread(jnp.arange(16.0)))
    for head in range(4):
        np.testing.assert_array_equal(
            spread[8 * head : 8 * head + 8], 8 * (head // 2) + np.arange(8)
        )
    np.testing.assert_array_equal(fold.repeated(spread), np.tile(np.arange(16.0), (2, 1)))


def test_masks_stay(make_shallow, batch_of):
    model, params = make_shallow("edge")
    leaves = leaves_of(params)
    keep = np.random.default_rng(0).random((24, 40)) > 0.5
    path = "decoder/layers/0/mlp/down_proj/weight"
    leaves[path] = boxes.mask(leaves[path], jnp.asarray(keep))
    before = nested(leaves)
    for fold in folding.folds(model.config):
        leaves = {**leaves, **folding.move(fold, leaves, factors(fold))}
    np.testing.assert_array_equal(leaves[path].mask, keep)
    assert relative_change(model, before, nested(leaves), batch_of(model)) < 1e-5


def test_what_rounding_a_narrow_norm_loses_the_consumers_make_up(make_shallow, batch_of):
    model, params = make_shallow("edge")
    params = boxes.map_with_path(
        lambda path, leaf: leaf.astype(jnp.bfloat16) if "norm" in path else leaf, params
    )
    leaves = leaves_of(params)
    for fold in folding.folds(model.config):
        if fold.kind == "norm":
            leaves = {**leaves, **folding.move(fold, leaves, factors(fold))}
    assert leaves["decoder/norm/weight"].dtype == jnp.bfloat16
    assert relative_change(model, params, nested(leaves), batch_of(model)) < 1e-5


def test_a_quantized_leaf_closes_its_folds(make_member):
    model, params = make_member("edge")
    leaves = leaves_of(params)
    fold = folding.folds(model.config)[0]
    assert fold.within(leaves)
    path = fold.consumers[0]
    format = boxes.Format()
    matrix = jnp.zeros(leaves[path].shape, jnp.int8)
    leaves[path] = boxes.quantized(matrix, jnp.ones((matrix.shape[0], 1)), None, format)
    assert not fold.within(leaves)
    del leaves[path]
    assert not fold.within(leaves)


def test_encoders_alone(make_member):
    model, params = make_member("nano")
    config = dataclasses.replace(model.config.vision, projector_size=0, merge_size=1)
    assert {fold.kind for fold in folding.folds(config)} == {"norm", "value", "neurons"}
    alone = leaves_of(params["vision"])
    assert all(fold.within(alone) for fold in folding.folds(model.config.vision))
    alone = leaves_of(params["speech"])
    assert all(fold.within(alone) for fold in folding.folds(model.config.speech))
    with pytest.raises(RecipeError, match="supported are"):
        folding.folds(None)


def test_a_text_encoder_moves_values_alone():
    config = TextConfig(
        vocab_size=8, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=8, pooler=None
    )
    model, tokens = TextEncoder(config), jnp.arange(6).reshape(2, 3)
    params = init(model, tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), params)
    leaves = leaves_of(params)
    actual = folding.folds(config)
    assert [fold.kind for fold in actual] == ["value", "value"]
    for fold in actual:
        leaves |= folding.move(fold, leaves, factors(fold))
    expected = applied(model, {"params": params}, tokens)[0]
    moved = applied(model, {"params": nested(leaves)}, tokens)[0]
    assert jnp.abs(moved - expected).max() < 1e-5 * jnp.abs(expected).max()
