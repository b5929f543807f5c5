"""What is masked as a whole, taken out of the arrays: the masked model's outputs in fewer bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import batches, chain, prune, quantize, recipe_from_json, to_json
from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.errors import RecipeError
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.text import TextEncoder
from glm_edge.params import Format
from tests.tiny_models import init_away_from_constants

apply = jax.jit(batches.apply_batch, static_argnums=0)


def dense(params):
    """Without boxes, so that one program serves the model and all its masks."""
    return jax.tree.map(boxes.dense, params, is_leaf=boxes.is_box)


def compacted(masking, model, params, **options):
    """The masked parameters, and what the chain with `compact` gives."""
    recipe = chain(masking, prune.compact())
    assert recipe_from_json(to_json(recipe)) == recipe
    _, masked, _ = masking(model, params, **options)
    smaller, small, report = recipe(model, params, **options)
    assert report.bytes_after == boxes.stored_bytes(small) < report.bytes_before
    assert report.flops_after["token"] < report.flops_before["token"]
    return masked, smaller, small, report


def same_outputs(model, masked, smaller, small, batch):
    """Checks equality with the masked model, and that masking changed something."""
    expected = np.asarray(apply(model, dense(masked), batch))
    np.testing.assert_allclose(apply(smaller, dense(small), batch), expected, atol=1e-5)
    complete = jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, boxes.Masked) else leaf,
        masked,
        is_leaf=boxes.is_box,
    )
    assert np.abs(expected - np.asarray(apply(model, dense(complete), batch))).max() > 1e-2


def drawn(config):
    model = MultimodalGLM(config)
    return model, init_away_from_constants(model, jnp.zeros((1, 2), jnp.int32))


@pytest.fixture(scope="module")
def glm():
    """A decoder of four query heads in two groups, with both encoders."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    vision = {"image_size": (16, 16), "projector_size": 40, "patch_size": 4, "patch_stride": 4}
    vision |= {"temporal_patch_size": 1, "position_grid": (4, 4)}
    decoder = {"vocab_size": 48, "hidden_size": 24, "num_layers": 2, "num_heads": 4}
    decoder |= {"num_kv_heads": 2, "head_dim": 8, "intermediate_size": 40}
    decoder |= {"sandwich_norm": True, "attention_bias": True, "tie_embeddings": False}
    return drawn(
        GLMConfig(
            name="masked",
            decoder=DecoderConfig(**decoder),
            vision=VisionConfig(**sizes, **vision),
            speech=SpeechConfig(mel_bins=8, num_frames=16, projector_size=40, **sizes),
            image_token_id=5,
            audio_token_id=8,
            pad_token_id=0,
        )
    )


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    return [{"tokens": rng.integers(10, 48, (2, 24)).astype(np.int32)} for _ in range(2)]


# Budgets are measured in `masks/test_allocation.py` too, and heads taken out below.
@pytest.mark.slow
def test_heads_under_a_measured_budget_take_at_most_its_bytes(glm, text, batch_of):
    model, params = glm
    before = boxes.stored_bytes(params)
    # Half of its heads are 3,072 bytes of a decoder layer and 2,048 of an encoder, biases apart.
    masking = prune.mask(
        shape="head",
        allocation="measured",
        budget_bytes=before - 6500,
        levels=(0.0, 0.5),
    )
    options = {"calibration": text, "without": ("images", "audio")}
    masked, smaller, small, report = compacted(masking, model, params, **options)
    assert boxes.stored_bytes(small) <= before - 6500 < before < boxes.stored_bytes(masked)
    assert not any(boxes.is_box(leaf) for _, leaf in boxes.path_items(small))
    config = smaller.config
    # Text does not feel what the encoders lose, so that one decoder layer has to lose something.
    assert (config.vision.heads(0), config.speech.heads(0)) == (1, 1)
    assert config.decoder.num_kv_heads == 2
    losses = [divergence(model, params, text, f"decoder/layers/{index}/") for index in (0, 1)]
    expected = [4, 4]
    expected[int(np.argmin(losses))] = 2
    assert config.decoder.num_heads == tuple(expected)
    note = next(note for note in report.notes if "measured on held-out" in note)
    assert float(note.split("predicted, ")[1].split()[0]) == pytest.approx(min(losses), rel=1e-3)
    same_outputs(model, masked, smaller, small, batch_of(model))


def divergence(model, params, text, where):
    """Nats a token by which half of some heads change what is predicted, in float64."""
    masked = prune.mask(0.5, shape="head", where=where)(model, params)[1]
    logged = []
    for tree in (params, masked):
        logits = [np.asarray(apply(model, dense(tree), batch), np.float64) for batch in text]
        logits = np.concatenate(logits)[:, :-1]
        logged.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return float((np.exp(logged[0]) * (logged[0] - logged[1])).sum(-1).mean())


def test_neurons_under_one_threshold_go_from_all_stacks(glm, batch_of, tmp_path):
    model, params = glm
    masked, smaller, small, _ = compacted(
        prune.mask(0.4, shape="neuron", allocation="global"), model, params
    )
    remaining = prune.unmasked(model, masked)
    assert set(remaining.units) == {"decoder", "vision", "speech"}
    widths = []
    for stack, layers in remaining.units.items():
        for index, retained in layers.items():
            widths.append(getattr(smaller.config, stack).neurons(index))
            assert len(retained["neurons"]) == widths[-1]
    assert len(set(widths)) > 1
    same_outputs(model, masked, smaller, small, batch_of(model))
    ge.save(smaller, small, tmp_path / "out")
    loaded, read = ge.load(tmp_path / "out")
    assert loaded.config == smaller.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read, small))


def test_layers_heads_and_single_weights_go_together(glm, text):
    model, params = glm
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
    same_outputs(model, masked, smaller, small, text[0])
    old = dict(boxes.path_items(masked))
    retained = {path: leaf.mask for path, leaf in boxes.path_items(small) if boxes.is_box(leaf)}
    sources = {
        "decoder/layers/0/mlp/down_proj/weight": f"decoder/layers/{layers[0]}/mlp/down_proj/weight",
        "vision/layers/0/mlp/down_proj/weight": "vision/layers/0/mlp/down_proj/weight",
        "vision/patch/weight": "vision/patch/weight",
    }
    assert set(retained) == set(sources)
    for path, source in sources.items():
        np.testing.assert_array_equal(retained[path], old[source].mask)
        assert float(retained[path].mean()) == pytest.approx(0.7, abs=0.01)


def test_rows_of_the_vocabulary_go_and_tokens_are_numbered_anew(glm, text):
    model, params = glm
    masking = prune.mask(0.5, shape="vocab", score="l1")
    masked, smaller, small, report = compacted(masking, model, params)
    tokens = prune.unmasked(model, masked).tokens
    assert len(tokens) == smaller.config.decoder.vocab_size == 24
    named = {0, 5, 8}
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


def test_a_head_of_which_a_weight_is_left_stays(glm):
    model, params = glm
    masked = heads_hidden(params, [1, 3])
    smaller = prune.compact()(model, masked)[0]
    assert smaller.config.decoder.num_heads == (2, 4)
    box = masked["decoder"]["layers"]["0"]["attention"]["q_proj"]["weight"]
    shown = box.replace(mask=box.mask.at[8, 0].set(True))
    opened = boxes.map_with_path(lambda _, leaf: shown if leaf is box else leaf, masked)
    with pytest.raises(RecipeError, match=r"would keep \[2, 1\] heads"):
        prune.compact()(model, opened)


def test_what_cannot_be_taken_out_is_refused(glm):
    model, params = glm
    compact = prune.compact()

    def refused(message, masked, owner=model):
        with pytest.raises(RecipeError, match=message):
            compact(owner, masked)

    nothing = "no head, neuron, layer or vocabulary row is masked as a whole"
    refused(nothing, params)
    refused(nothing, prune.mask(0.9, where="^decoder/")(model, params)[1])
    masked = prune.mask(0.5, shape="neuron")(model, params)[1]
    refused(nothing, quantize.rtn("int8")(model, masked)[1])
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
    alone = TextEncoder(TextConfig(30, 16, 2, 2, 24))
    refused("TextEncoder is no GLM", {}, alone)


def test_weights_in_training_for_rounding_keep_their_scales(glm):
    model, params = glm
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


def test_other_layers_keep_what_they_were(glm):
    config = glm[0].config
    wide = dataclasses.replace(config.decoder, num_kv_heads=4)
    owner, local = drawn(dataclasses.replace(config, decoder=wide))
    masked = prune.mask(0.5, shape="head", where="layers/1/")(owner, local)[1]
    smaller, small, report = prune.compact()(owner, masked)
    decoder = smaller.config.decoder
    assert (decoder.num_heads, decoder.num_kv_heads) == ((4, 2), (4, 2))
    assert {row.path.split("/")[2] for row in report.rows} == {"1"}
    assert small["decoder"]["layers"]["0"] == local["decoder"]["layers"]["0"]
