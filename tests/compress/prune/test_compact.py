"""What is masked as a whole, taken out of the arrays: the masked model's outputs in fewer bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import batches, chain, prune, quantize, recipe_from_json, to_json
from glm_edge.configs import TextConfig
from glm_edge.errors import RecipeError
from glm_edge.models.text import TextEncoder
from glm_edge.params import Format

apply = jax.jit(batches.apply_batch, static_argnums=0)


def dense(params):
    """Without boxes, so that one program serves the model and all its masks."""
    return jax.tree.map(boxes.dense, params, is_leaf=boxes.is_box)


def compacted(masking, model, params, *calibration):
    """The masked parameters, and what the chain with `compact` gives."""
    recipe = chain(masking, prune.compact())
    assert recipe_from_json(to_json(recipe)) == recipe
    _, masked, _ = masking(model, params, *calibration)
    smaller, small, report = recipe(model, params, *calibration)
    assert report.bytes_after == boxes.stored_bytes(small) < report.bytes_before
    assert report.flops_after["token"] < report.flops_before["token"]
    return masked, smaller, small, report


def same_outputs(model, masked, smaller, small, batch):
    """Checks equality with the masked model, and that masking changed something."""
    expected = np.asarray(apply(model, dense(masked), batch))
    np.testing.assert_allclose(apply(smaller, dense(small), batch), expected, atol=1e-5)
    whole = jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, boxes.Masked) else leaf,
        masked,
        is_leaf=boxes.is_box,
    )
    assert np.abs(expected - np.asarray(apply(model, dense(whole), batch))).max() > 1e-2


@pytest.fixture(scope="module")
def nano(make_member, batch_of):
    model, params = make_member("nano")
    return model, params, [batch_of(model, seed=seed) for seed in range(2)]


def test_heads_under_a_measured_budget_take_at_most_its_bytes(nano):
    model, params, calibration = nano
    before = boxes.stored_bytes(params)
    budget = before - 8000
    masking = prune.mask(
        shape="head",
        allocation="measured",
        budget_bytes=budget,
        levels=(0.0, 0.5),
    )
    masked, smaller, small, report = compacted(masking, model, params, calibration)
    assert boxes.stored_bytes(masked) > before
    assert boxes.stored_bytes(small) <= budget
    assert not any(boxes.is_box(leaf) for _, leaf in boxes.path_items(small))
    counts = [smaller.config.decoder.heads(index) for index in range(2)]
    counts += [smaller.config.vision.heads(0), smaller.config.speech.heads(0)]
    # Three kilobytes of each decoder layer and two of each encoder: both of the former must go.
    assert counts in ([2, 2, 1, 1], [2, 2, 1, 2], [2, 2, 2, 1])
    assert smaller.config.decoder.num_kv_heads == model.config.decoder.num_kv_heads
    same_outputs(model, masked, smaller, small, calibration[0])
    note = next(note for note in report.notes if "measured on held-out" in note)
    divergence = float(note.split("predicted, ")[1].split()[0])
    assert divergence > 0


def test_neurons_under_one_threshold_go_from_all_stacks(nano, tmp_path):
    model, params, calibration = nano
    masking = prune.mask(0.4, shape="neuron", allocation="global")
    masked, smaller, small, _ = compacted(masking, model, params)
    left = prune.unmasked(model, masked)
    widths = {
        stack: [getattr(smaller.config, stack).neurons(index) for index in range(layers)]
        for stack, layers in (("decoder", 2), ("vision", 1), ("speech", 1))
    }
    assert len({*widths["decoder"], *widths["vision"], *widths["speech"]}) > 1
    for stack, layers in left.units.items():
        for index, kept in layers.items():
            assert widths[stack][index] == len(kept["neurons"])
    same_outputs(model, masked, smaller, small, calibration[0])
    ge.save(smaller, small, tmp_path / "out")
    loaded, read = ge.load(tmp_path / "out")
    assert loaded.config == smaller.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read, small))


def test_layers_heads_and_single_weights_go_together(make_member, batch_of):
    model, params = make_member("sandwich")
    masking = chain(
        prune.mask(0.5, shape="layer"),
        prune.mask(0.5, shape="head", where="^decoder/"),
        prune.mask(0.3, where=r"layers/\d+/mlp/down_proj|vision/patch"),
    )
    masked, smaller, small, report = compacted(masking, model, params)
    layers = prune.unmasked(model, masked).layers
    assert len(layers) == smaller.config.decoder.num_layers == 1
    assert (smaller.config.decoder.num_heads, smaller.config.decoder.num_kv_heads) == (2, 2)
    assert report.notes[-1] == f"removed layers {1 - layers[0]} of the decoder"
    same_outputs(model, masked, smaller, small, batch_of(model))
    kept = {path: leaf for path, leaf in boxes.path_items(small) if boxes.is_box(leaf)}
    old = dict(boxes.path_items(masked))
    for path in ("vision/patch/weight", "vision/layers/0/mlp/down_proj/weight"):
        np.testing.assert_array_equal(kept[path].mask, old[path].mask)
    assert set(kept) == {
        "decoder/layers/0/mlp/down_proj/weight",
        "vision/layers/0/mlp/down_proj/weight",
        "vision/patch/weight",
    }
    assert float(kept["vision/patch/weight"].mask.mean()) == pytest.approx(0.7, abs=0.01)


def test_rows_of_the_vocabulary_go_and_tokens_are_numbered_anew(make_member, batch_of):
    model, params = make_member("edge")
    masking = prune.mask(0.5, shape="vocab", score="taylor")
    calibration = [batch_of(model)]
    masked, smaller, small, report = compacted(masking, model, params, calibration)
    tokens = prune.unmasked(model, masked).tokens
    assert len(tokens) == smaller.config.decoder.vocab_size == 24
    named = {model.config.pad_token_id, model.config.image_token_id, model.config.audio_token_id}
    assert named <= set(tokens.tolist())
    words = np.setdiff1d(tokens, list(named))
    batch = {"tokens": np.random.default_rng(0).choice(words, (2, 24)).astype(np.int32)}
    mapped = {"tokens": prune.map_tokens(batch["tokens"], tokens)}
    expected = np.asarray(apply(model, dense(masked), batch))[..., tokens]
    np.testing.assert_allclose(apply(smaller, dense(small), mapped), expected, atol=1e-5)
    rows = small["embed"]["weight"].nbytes + small["head"]["weight"].nbytes
    assert report.bytes_before - report.bytes_after == rows
    assert "24 of 48 tokens stay" in report.notes[-1]


def hidden(params, path, gone):
    """The parameters with a boolean array of weights masked at one path."""
    return boxes.map_with_path(
        lambda at, leaf: boxes.mask(leaf, jnp.asarray(~gone)) if at == path else leaf, params
    )


def heads_hidden(params, heads, head_dim=8):
    """Query heads of the first layer masked, all of them their own choice."""
    gone = np.zeros((4, head_dim, 24), bool)
    gone[heads] = True
    gone = gone.reshape(-1, 24)
    root = "decoder/layers/0/attention"
    params = hidden(params, f"{root}/q_proj/weight", gone)
    return hidden(params, f"{root}/o_proj/weight", gone.T)


def test_a_head_of_which_a_weight_is_left_stays(make_member):
    model, params = make_member("edge")
    masked = heads_hidden(params, [1, 3])
    smaller = prune.compact()(model, masked)[0]
    assert smaller.config.decoder.num_heads == (2, 4)
    box = masked["decoder"]["layers"]["0"]["attention"]["q_proj"]["weight"]
    shown = box.replace(mask=box.mask.at[8, 0].set(True))
    opened = boxes.map_with_path(lambda _, leaf: shown if leaf is box else leaf, masked)
    with pytest.raises(RecipeError, match=r"would keep \[2, 1\] heads"):
        prune.compact()(model, opened)


def test_what_cannot_be_taken_out_is_refused(make_member):
    model, params = make_member("edge")
    compact = prune.compact()

    def refused(message, masked, owner=model):
        with pytest.raises(RecipeError, match=message):
            compact(owner, masked)

    nothing = "no head, neuron, layer or vocabulary row is masked as a whole"
    refused(nothing, params)
    refused(nothing, prune.mask(0.9, where="^decoder/")(model, params)[1])
    masked = prune.mask(0.5, shape="neuron")(model, params)[1]
    refused(nothing, quantize.rtn(8)(model, masked)[1])
    refused(r"layers/0/attention: groups would keep \[1, 2\] heads", heads_hidden(params, [1]))
    refused(r"groups would keep \[0, 2\] heads", heads_hidden(params, [0, 1]))
    refused("attention: all 4 heads are masked; leave one", heads_hidden(params, [0, 1, 2, 3]))
    everything = boxes.map_with_path(
        lambda path, leaf: (
            boxes.mask(leaf, jnp.zeros(leaf.shape, bool))
            if boxes.is_matrix(path, leaf) and "layers" in path
            else leaf
        ),
        params,
    )
    refused("decoder/layers: all 2 layers are masked", everything)
    gone = np.zeros((48, 24), bool)
    gone[model.config.image_token_id] = True
    special = hidden(hidden(params, "embed/weight", gone), "head/weight", gone)
    refused("token 5 is masked and must stay, since it is image_token_id", special)
    text = TextEncoder(TextConfig(30, 16, 2, 2, 24))
    refused("TextEncoder is no GLM", {}, text)


def test_weights_in_training_for_rounding_keep_their_scales(make_member):
    model, params = make_member("edge")
    format = Format.parse("int8")

    def fake(path, leaf):
        if path not in ("embed/weight", "decoder/layers/0/attention/o_proj/weight"):
            return leaf
        scale = jnp.abs(leaf).max(axis=1, keepdims=True) / 127
        return boxes.fake_quantized(leaf, scale, None, format)

    trained = boxes.map_with_path(fake, params)
    rows = prune.mask(0.5, shape="vocab")(model, trained)[1]
    tokens = prune.unmasked(model, rows).tokens
    _, small, _ = prune.compact()(model, rows)
    np.testing.assert_array_equal(
        boxes.dense(small["embed"]["weight"]), boxes.dense(trained["embed"]["weight"])[tokens]
    )
    with pytest.raises(RecipeError, match="o_proj is quantized; prune before quantizing"):
        prune.compact()(model, heads_hidden(trained, [1, 3]))


def test_other_layers_keep_what_they_were(make_member):
    model, _ = make_member("edge")
    config = model.config
    wide = dataclasses.replace(config.decoder, num_kv_heads=4)
    owner = model.clone(config=dataclasses.replace(config, decoder=wide))
    shapes = jax.eval_shape(owner.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    own = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    masked = prune.mask(0.5, shape="head", where="layers/1/")(owner, own)[1]
    smaller, small, report = prune.compact()(owner, masked)
    decoder = smaller.config.decoder
    assert (decoder.num_heads, decoder.num_kv_heads) == ((4, 2), (4, 2))
    assert {row.path.split("/")[2] for row in report.rows} == {"1"}
    assert small["decoder"]["layers"]["0"] == own["decoder"]["layers"]["0"]
