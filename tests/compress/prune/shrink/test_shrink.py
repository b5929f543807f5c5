"""A shrunk model against the same model with what was removed at zero."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import configs
from glm_edge.compress import batches, cost
from glm_edge.compress.prune.shrink.heads_neurons import shrink
from glm_edge.compress.report import Report
from glm_edge.errors import ConfigError, RecipeError
from glm_edge.generate import greedy
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.models.speech import SpeechEncoder
from glm_edge.models.vision import VisionEncoder
from tests.tiny_models import init

apply = jax.jit(batches.apply_batch, static_argnums=0)

KEEP = {0: {"heads": [0, 2]}, 1: {"heads": [1, 3], "neurons": [0, 5, 6, 20, 39]}}


def zeroed(params, keep, head_dim, path="decoder"):
    """Weights that read from removed heads and neurons at zero, nothing else changed."""
    layers = dict(params[path]["layers"])
    for index, retained in keep.items():
        layer = jax.tree.map(np.array, layers[str(index)])
        heads, neurons = retained.get("heads"), retained.get("neurons")
        if heads is not None:
            gone = np.ones(layer["attention"]["o_proj"]["weight"].shape[1] // head_dim, bool)
            gone[heads] = False
            layer["attention"]["o_proj"]["weight"][:, np.repeat(gone, head_dim)] = 0
        if neurons is not None:
            weight = layer["mlp"]["down_proj"]["weight"]
            weight[:, np.setdiff1d(np.arange(weight.shape[1]), neurons)] = 0
        layers[str(index)] = jax.tree.map(jnp.asarray, layer)
    return {**params, path: {**params[path], "layers": layers}}


@pytest.fixture(scope="module")
def shrunk(make_member):
    model, params = make_member("sandwich")
    return model, params, *shrink(model, params, KEEP)


def test_a_shrunk_decoder_gives_the_outputs_of_the_zeroed_one(shrunk):
    model, params, smaller, small = shrunk
    # Of text, so that no encoder compiles.
    batch = {"tokens": np.random.default_rng(0).integers(10, 48, (2, 24)).astype(np.int32)}
    actual = apply(smaller, small, batch)
    expected = apply(model, zeroed(params, KEEP, 8), batch)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    unpruned = apply(model, params, batch)
    assert float(jnp.abs(expected - unpruned).max()) > 1e-2
    decoder = smaller.config.decoder
    assert (decoder.num_heads, decoder.num_kv_heads) == (2, 2)
    assert decoder.intermediate_size == (40, 5)


def test_a_shrunk_model_saves_loads_and_generates(shrunk, tmp_path):
    _, _, smaller, small = shrunk
    ge.save(smaller, small, tmp_path / "out")
    loaded, params = ge.load(tmp_path / "out")
    assert loaded.config == smaller.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, small))
    tokens = np.arange(10, 20)[None]
    result = greedy(loaded, params, tokens, max_new_tokens=3)
    # No position sees a later one, so that one pass predicts each token from those before it.
    ids = np.zeros((2, 24), np.int32)  # The shape of the test above: one program less.
    ids[:1, :12] = np.append(tokens, result[:, :-1], axis=1)
    logits = apply(smaller, small, {"tokens": ids})[:1, 9:12]
    np.testing.assert_array_equal(result, np.argmax(logits, axis=-1))


def wide(part):
    """A model whose time goes into what is removed: a decoder, or an encoder on its own."""
    if part == "decoder":
        sizes = {"vocab_size": 8192, "hidden_size": 256, "num_layers": 4, "num_heads": 8}
        sizes |= {"num_kv_heads": 2, "head_dim": 32, "intermediate_size": 1024}
        model = MultimodalGLM(configs.GLMConfig("wide", configs.DecoderConfig(**sizes)))
        original = jnp.zeros((1, 2), jnp.int32)
    elif part == "vision":
        changes = {"image_size": (64, 32), "window": (4, 4), "global_layers": (1,)}
        config = configs.preset("nano").vision
        changes |= {"num_layers": 2, "intermediate_size": 4096}
        model = VisionEncoder(dataclasses.replace(config, **changes), 256)
        original = jnp.zeros((1, 64, 32, 3))
    else:
        config = configs.preset("nano").speech
        changes = {"num_layers": 2, "intermediate_size": 4096}
        model = SpeechEncoder(dataclasses.replace(config, **changes), 256)
        original = jnp.zeros((1, config.num_frames, config.mel_bins))
    return model, init(model, original)["params"]


@pytest.mark.parametrize(
    ("part", "transform", "work"),
    [
        pytest.param(
            "decoder",
            ge.prune.structured(0.75, neurons=0.9, score="magnitude"),
            "token",
            marks=pytest.mark.slow,
        ),
        pytest.param("decoder", ge.prune.depth([0, 1, 3]), "token", marks=pytest.mark.slow),
        pytest.param("decoder", ge.prune.vocabulary("0-127"), "token", marks=pytest.mark.slow),
        ("vision", ge.prune.encoders(0.5, neurons=0.9, score="magnitude"), "image"),
        pytest.param(
            "speech",
            ge.prune.encoders(0.5, neurons=0.9, score="magnitude"),
            "clip",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["heads and neurons", "layers", "vocabulary", "vision", "speech"],
)
def test_parameters_bytes_flops_and_latency_fall_and_are_shown(part, transform, work):
    model, params = wide(part)
    smaller, small, report = transform(model, params)
    assert report.flops_before == cost.flops(model)
    assert report.flops_after == cost.flops(smaller)
    rows = cost.measure((model, params), (smaller, small), rounds=7, calls=2)
    assert [row.work for row in rows] == [work]
    before = report.count_before, report.bytes_before, report.flops_before[work], rows[0].before_ms
    after = report.count_after, report.bytes_after, report.flops_after[work], rows[0].after_ms
    assert all(0 < new < old for new, old in zip(after, before, strict=True))
    assert rows[0].speedup > 1.0
    assert "latency" not in str(report)
    measured = report.with_latency(rows)
    for text in (str(measured), measured.to_markdown()):
        for shown in (
            f"{before[0]:,} -> {after[0]:,} parameters",
            f"{after[1]:,}",
            f"FLOPs per {work}: {before[2]:,} -> {after[2]:,}",
            f"latency per {work}: {before[3]:.3f} -> {after[3]:.3f} ms",
        ):
            assert shown in text


def test_costs_run_from_the_first_report_of_a_chain_to_the_last():
    def report(before, after):
        flops = {"flops_before": before, "flops_after": after}
        return Report((), 8, 4, 2, 1, **flops)

    joined = report(None, None) + report({"token": 8}, {"token": 4}) + report(None, None)
    assert (joined.flops_before, joined.flops_after) == ({"token": 8}, {"token": 4})
    joined += report({"token": 4}, {"token": 1})
    assert (joined.flops_before, joined.flops_after) == ({"token": 8}, {"token": 1})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({0: {"heads": [0, 1]}}, "group 1 would lose all 2 query heads"),
        ({0: {"heads": [0, 1, 2]}}, r"groups would keep \[2, 1\] query heads"),
        ({0: {"neurons": []}}, "nothing of 40 would remain"),
        ({1: {"neurons": [40]}}, r"ascending whole numbers in 0\.\.39"),
        ({1: {"neurons": [3, 3]}}, "ascending"),
        ({0: {"heads": [0.5]}}, "ascending whole numbers"),
        ({2: {"heads": [0, 2]}}, "no layer 2 of 2"),
        ({0: {"rows": [1]}}, "'rows' is unknown"),
    ],
)
def test_what_makes_no_layer_is_refused(make_member, keep, message):
    model, params = make_member("edge")
    with pytest.raises(RecipeError, match=message):
        shrink(model, params, keep)


def test_more_heads_than_a_group_has_cannot_go(make_member):
    model, params = make_member("edge")
    with pytest.raises(RecipeError, match="leaves no query head in groups of 2"):
        ge.prune.structured(heads=0.6, score="magnitude")(model, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": (2, 1)}, "must be one integer, or 1 integers of at least 1"),
        ({"num_heads": (2,)}, "require head_dim"),
        ({"intermediate_size": (0,)}, "of at least 1"),
        ({"head_dim": 0, "num_heads": (1,)}, "head_dim 0 must be in 1"),
        ({"num_heads": 3}, "hidden_size 16 must be a multiple of num_heads 3"),
    ],
)
def test_widths_of_encoders_that_make_no_layers_are_refused(make_member, changes, message):
    vision = make_member("edge_v")[0].config.vision
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(vision, **changes)


def test_an_old_configuration_without_head_dim_is_read(make_member):
    config = make_member("nano")[0].config
    fields = json.loads(json.dumps(configs.to_dict(config)))
    assert fields["vision"].pop("head_dim") is None
    assert configs.from_dict(fields) == config
