"""Masks of every shape: what goes together, exactly how much, and what is refused."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import batches, chain, prune, quantize, recipe_from_json, to_json
from glm_edge.compress.prune.masks.shapes import Shape
from glm_edge.compress.prune.scores.from_model import pools_of
from glm_edge.configs import SpeechConfig, VisionConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.models.multimodal import MultimodalGLM


def weight(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def masked(params, *args, model=None, **options):
    return prune.mask(*args, **options)(model, params)[1]


def test_n_of_m_neighbours_along_the_inputs_stay():
    params = {"a": {"weight": weight(6, 16)}, "b": {"kernel": weight(12, 5, seed=1)}}
    pruned = masked(params, shape="1:4")
    for leaf, along in ((pruned["a"]["weight"], 1), (pruned["b"]["kernel"], 0)):
        keep = np.moveaxis(np.asarray(leaf.mask), along, -1).reshape(-1, 4)
        values = np.moveaxis(np.abs(leaf.value), along, -1).reshape(-1, 4)
        assert set(keep.sum(1).tolist()) == {1}
        np.testing.assert_array_equal(keep.argmax(1), values.argmax(1))


@pytest.mark.parametrize(("score", "order"), [("l1", 1), ("l2", 2), ("linf", np.inf), ("l3", 3)])
def test_blocks_go_by_their_norm(score, order):
    dense = weight(8, 12)
    pruned = masked({"weight": dense}, 0.5, score=score, shape="block:2x3")["weight"]
    blocks = np.abs(dense).reshape(4, 2, 4, 3).transpose(0, 2, 1, 3).reshape(16, 6)
    norms = np.linalg.norm(blocks, order, axis=1)
    keep = np.asarray(pruned.mask).reshape(4, 2, 4, 3).transpose(0, 2, 1, 3).reshape(16, 6)
    assert bool((keep.all(1) | ~keep.any(1)).all())
    np.testing.assert_array_equal(np.flatnonzero(~keep[:, 0]), np.sort(np.argsort(norms)[:8]))


def test_channels_of_a_convolution_are_its_outputs():
    kernel, model = weight(3, 3, 4, 10), nn.Conv(10, (3, 3), use_bias=False)
    channels = prune.mask(0.3, score="l2", shape="channel")
    pruned = channels(model, {"kernel": kernel})[1]["kernel"]
    norms = np.sqrt(np.square(kernel).sum((0, 1, 2)))
    gone = np.flatnonzero(~np.asarray(pruned.mask).any((0, 1, 2)))
    np.testing.assert_array_equal(gone, np.sort(np.argsort(norms)[:3]))
    assert float(pruned.mask.mean()) == pytest.approx(0.7)


def test_weights_compete_within_their_row_where_asked():
    pruned = masked({"weight": weight(7, 10)}, 0.3, within="row")["weight"]
    assert set(np.asarray(pruned.mask.sum(1)).tolist()) == {7}


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, batch):
    return batches.apply_batch(model, params, batch)


@pytest.mark.parametrize(
    ("shape", "key", "sparsity", "remaining"),
    [("head", "heads", 0.25, 6), ("neuron", "neurons", 0.4, 77)],
)
def test_masked_units_are_what_shrinking_takes_out(
    small, calibration, shape, key, sparsity, remaining
):
    model, params = small
    _, pruned, report = prune.mask(sparsity, shape=shape)(model, params)
    keep = {}
    for index, layer in pruned["decoder"]["layers"].items():
        if shape == "head":
            columns = np.asarray(layer["attention"]["o_proj"]["weight"].mask)
            units = columns.reshape(32, 8, 8).any((0, 2))
            rows = np.asarray(layer["attention"]["q_proj"]["weight"].mask).reshape(8, -1)
            np.testing.assert_array_equal(rows.any(1), units)
            assert set(units.reshape(2, 4).sum(1).tolist()) == {3}
        else:
            units = np.asarray(layer["mlp"]["down_proj"]["weight"].mask).any(0)
            halves = np.asarray(layer["mlp"]["gate_up_proj"]["weight"].mask).all(1)
            np.testing.assert_array_equal(halves, np.tile(units, 2))
        assert units.sum() == remaining
        keep[int(index)] = {key: np.flatnonzero(units)}
    smaller, shrunk = prune.shrink(model, params, keep)
    expected = logits(smaller, shrunk, calibration[0])
    np.testing.assert_allclose(logits(model, pruned, calibration[0]), expected, atol=1e-5)
    assert report.bytes_after > report.bytes_before
    assert "taken out of the arrays" in report.notes[-1]


def test_a_masked_layer_passes_its_input_on(small, decoder64, calibration):
    model, params = small
    _, pruned, _ = prune.mask(0.5, shape="layer")(model, params)
    layers = pruned["decoder"]["layers"]
    gone = [i for i in "01" if not bool(layers[i]["mlp"]["down_proj"]["weight"].mask.any())]
    assert len(gone) == 1
    decoder64.gates = {(int(gone[0]), "heads"): np.zeros(8), (int(gone[0]), "neurons"): 0.0}
    tokens = calibration[0]["tokens"]
    result = logits(model, pruned, calibration[0])
    np.testing.assert_allclose(result, decoder64.logits(tokens), atol=1e-4)


def drawn(config):
    """A model with parameters of random numbers; nothing is compiled."""
    model = MultimodalGLM(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    return model, treedef.unflatten(weight(*leaf.shape, seed=i) for i, leaf in enumerate(leaves))


def test_rows_of_the_vocabulary_go_from_both_ends(small):
    config = small[0].config
    decoder = dataclasses.replace(config.decoder, tie_embeddings=False, vocab_size=48)
    model, params = drawn(dataclasses.replace(config, decoder=decoder))
    pruned = masked(params, 0.25, shape="vocab", score="l1", model=model)
    norms = np.abs(params["embed"]["weight"]).sum(1) + np.abs(params["head"]["weight"]).sum(1)
    # The padding and the token of images hold a place in the configuration and stay.
    needed = [model.config.pad_token_id, model.config.image_token_id]
    norms = np.array(norms)
    norms[needed] = np.inf
    gone = np.sort(np.argsort(norms)[:12])
    for name in ("embed", "head"):
        keep = np.asarray(pruned[name]["weight"].mask)
        np.testing.assert_array_equal(np.flatnonzero(~keep.any(1)), gone)


def test_a_layer_is_scaled_behind_the_norms_of_its_branches(small):
    config = small[0].config
    decoder = dataclasses.replace(config.decoder, sandwich_norm=True)
    model, params = drawn(dataclasses.replace(config, decoder=decoder))
    leaves = dict(boxes.path_items(params))
    results = {}
    for owner in (small[0], model):
        chosen = boxes.select(params, None)
        (pool,) = pools_of("test", Shape("layer"), owner, leaves, chosen)
        results[owner is model] = [member.path for member in pool.parts[1].gates]
    root = "decoder/layers/1"
    assert results == {
        False: [f"{root}/attention/o_proj/weight", f"{root}/mlp/down_proj/weight"],
        True: [f"{root}/post_self_attention_norm/weight", f"{root}/post_mlp_norm/weight"],
    }


def test_encoders_lose_heads_and_neurons_too(small):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    speech = SpeechConfig(mel_bins=8, num_frames=16, projector_size=40, **sizes)
    vision = VisionConfig(
        image_size=(8, 8),
        projector_size=32,
        patch_size=2,
        patch_stride=2,
        temporal_patch_size=1,
        position_grid=(4, 4),
        **sizes,
    )
    model, params = drawn(
        dataclasses.replace(small[0].config, vision=vision, speech=speech, audio_token_id=8)
    )
    for shape in ("head", "neuron"):
        _, _, report = prune.mask(0.5, shape=shape, where="vision|speech")(model, params)
        assert {row.path.split("/")[0] for row in report.rows} == {"vision", "speech"}
        assert {row.keep_ratio for row in report.rows} == {0.5}


def test_a_second_mask_only_adds():
    params = {"weight": weight(8, 16)}
    for options in ({"score": "random"}, {"shape": "channel"}, {"shape": "block:2x2"}):
        first = prune.mask(0.25, **options)
        second = prune.mask(0.5, **{**options, "score": "magnitude"})
        _, once, _ = first(None, params, rng=jax.random.key(0))
        _, twice, _ = second(None, once)
        before, after = once["weight"].mask, twice["weight"].mask
        assert bool(jnp.all(before | ~after))
        assert int((~after).sum()) == 64


def test_the_report_counts_masks_and_says_that_they_save_nothing():
    params = {"weight": weight(8, 16)}
    _, pruned, report = prune.mask(0.5)(None, params)
    row = report.rows[0]
    assert (row.bytes_before, row.bytes_after) == (512, 512 + 128)
    assert report.bytes_after == boxes.stored_bytes(pruned) == 640
    assert report.notes == (
        "masks take 128 bytes, which are counted; zeros of this shape save no bytes by themselves",
    )
    assert row.action == "masked (unstructured, magnitude)"


def test_zeros_stay_when_the_weight_is_rounded():
    model, params = nn.Dense(10), {"kernel": weight(16, 10)}
    recipe = chain(prune.mask(shape="2:4"), quantize.rtn("int4-g8"))
    assert recipe_from_json(to_json(recipe)) == recipe
    _, rounded, report = recipe(model, params)
    keep = masked(params, shape="2:4")["kernel"].mask
    assert not bool(jnp.any(rounded["kernel"].unbox()[~keep] != 0))
    assert report.bytes_after < report.bytes_before


def test_every_option_goes_through_json():
    transform = prune.mask(
        None,
        score="taylor2",
        shape="neuron",
        allocation="measured",
        where="mlp",
        levels=(0.0, 0.25, 0.5),
        budget_flops=1000,
    )
    assert recipe_from_json(to_json(transform)) == transform
    assert hash(recipe_from_json(to_json(transform))) == hash(transform)


def test_masks_by_stage_are_those_in_memory(tmp_path, small, calibration):
    import glm_edge

    model, params = small
    glm_edge.save(model, params, tmp_path / "dense")
    recipe = chain(
        prune.mask(0.5, score="random", where="q_proj"),
        prune.mask(shape="2:4", score="wanda", where="mlp"),
    )
    key = jax.random.key(0)
    report = glm_edge.compress_checkpoint(
        tmp_path / "dense", tmp_path / "sparse", recipe, calibration, rng=key
    )
    expected, complete = recipe(model, params, calibration, rng=key)[1:]
    _, actual = glm_edge.load(tmp_path / "sparse")
    masks = {p: leaf.mask for p, leaf in boxes.path_items(expected) if boxes.is_box(leaf)}
    for path, leaf in boxes.path_items(actual):
        assert boxes.is_box(leaf) == (path in masks)
        if path in masks:
            np.testing.assert_array_equal(leaf.mask, masks[path])
    assert report.bytes_after == complete.bytes_after
    with pytest.raises(RecipeError, match="needs the whole model"):
        glm_edge.compress_checkpoint(
            tmp_path / "dense", tmp_path / "other", prune.mask(0.5, score="taylor"), calibration
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "keep ratio is above 0 and at most 1, not 1.0"),
        ({"sparsity": -0.1}, "keep ratio is above 0 and at most 1, not -0.1"),
        ({"sparsity": float("nan")}, "sparsity must be finite"),
        ({"sparsity": "half"}, "sparsity must be float"),
        ({"sparsity": True}, "sparsity must be float"),
        ({}, "give it or one budget"),
        ({"sparsity": 0.3, "shape": "2:4"}, "the shape says 0.5"),
        ({"shape": "4:2"}, "1 <= N < M"),
        ({"shape": "0:4"}, "1 <= N < M"),
        ({"sparsity": 0.5, "shape": "block:0x2"}, "shape must be"),
        ({"sparsity": 0.5, "shape": "column"}, "shape must be"),
        ({"sparsity": 0.5, "shape": None}, "shape must be"),
        ({"sparsity": 0.5, "allocation": "even"}, "allocation must be"),
        ({"shape": "2:4", "allocation": "global"}, "is uniform"),
        ({"sparsity": 0.5, "within": "layer"}, "within must be"),
        ({"sparsity": 0.5, "within": "row", "shape": "channel"}, "within must be"),
        ({"sparsity": 0.5, "levels": (0.5, 1.0)}, "levels must be"),
        ({"sparsity": 0.5, "levels": 0.5}, "levels must be"),
        ({"sparsity": 0.5, "levels": ()}, "levels must be"),
        ({"sparsity": 0.5, "where": "("}, "not a regular expression"),
        ({"budget_bytes": 100}, "budget_bytes is for allocation='measured'"),
        ({"budget_flops": 9, "allocation": "measured"}, "save neither bytes nor operations"),
        ({"budget_bytes": 0, "allocation": "measured", "shape": "head"}, "whole number"),
        (
            {"sparsity": 0.5, "budget_bytes": 9, "allocation": "measured", "shape": "head"},
            "give it or one budget",
        ),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        prune.mask(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "2:3"}, "^weight: 16 columns do not divide into groups of 3"),
        ({"sparsity": 0.5, "shape": "block:3x4"}, "8 x 16 are not whole blocks of 3x4"),
        ({"sparsity": 0.97, "shape": "channel"}, "leaves none of 8"),
        ({"sparsity": 0.5, "shape": "head"}, "has no GLM decoder"),
        ({"sparsity": 0.5, "where": "kernel"}, "matches none"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        masked({"weight": weight(8, 16)}, **options)


def test_more_heads_than_a_group_has_are_refused(small):
    model, params = small
    with pytest.raises(RecipeError, match=r"attention: sparsity=0.9 leaves none of 4"):
        prune.mask(0.9, shape="head")(model, params)
    with pytest.raises(RecipeError, match="selects no matrix of a neuron"):
        prune.mask(0.5, shape="neuron", where="attention")(model, params)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    broken = {"a": {"weight": weight(4, 4)}, "b": {"weight": weight(4, 4).at[1, 2].set(value)}}
    for transform in (prune.mask(0.5), prune.mask(shape="2:4"), prune.magnitude(0.5)):
        with pytest.raises(RecipeError, match="b/weight: NaN or infinity in the weights"):
            transform(None, broken)


def test_inputs_that_are_not_finite_are_refused(make_model, calibration):
    model, params = make_model(num_layers=1)
    broken = {**params, "embed": {"weight": params["embed"]["weight"] * jnp.nan}}
    for score in ("wanda", "taylor"):
        with pytest.raises(DataError, match="not finite"):
            prune.mask(0.5, score=score, where="layers/0/attention/q_proj")(
                model, broken, calibration
            )


def test_quantized_weights_are_refused(small):
    model, params = small
    rounded = quantize.rtn("int8", where="q_proj")(model, params)[1]
    for shape in ("unstructured", "head"):
        with pytest.raises(RecipeError, match="prune before quantizing"):
            prune.mask(0.5, shape=shape)(model, rounded)
