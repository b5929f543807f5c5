"""Rotation: the function stays, the outliers go."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import chain, recipe_from_json, to_json
from glm_edge.compress.layerwise.stream import compress_checkpoint
from glm_edge.compress.quantize.rotate import rotate
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.compress.quantize.solvers import hadamard
from glm_edge.errors import RecipeError
from glm_edge.models.vision import VisionEncoder

ROTATABLE = ["glm4", "nano", "tied"]
ROTATABLE += [pytest.param(name, marks=pytest.mark.slow) for name in ("asr", "edge_v", "pruned")]


@pytest.fixture(scope="module")
def relative_change(logits):
    def change(before, after, batch):
        expected = np.asarray(logits(*before, batch))
        return np.abs(logits(*after, batch) - expected).max() / np.abs(expected).max()

    return change


@pytest.mark.parametrize("name", ROTATABLE)
def test_the_function_stays(make_member, make_shallow, batch_of, relative_change, name):
    model, params = (make_member if name in ("glm4", "pruned") else make_shallow)(name)
    rotated_model, rotated, report = rotate(encoders=True)(model, params)
    assert relative_change((model, params), (rotated_model, rotated), batch_of(model)) < 1e-5
    for path in ("embed/weight", "decoder/layers/0/mlp/gate_up_proj/weight"):
        before, after = (dict(boxes.path_items(tree))[path] for tree in (params, rotated))
        assert np.linalg.norm(after - before) > 0.5 * np.linalg.norm(before)
    leaves = dict(boxes.path_items(rotated))
    for layer in range(model.config.decoder.num_layers):
        for norm in ("input_norm", "post_attention_norm"):
            np.testing.assert_array_equal(leaves[f"decoder/layers/{layer}/{norm}/weight"], 1.0)
    np.testing.assert_array_equal(leaves["decoder/norm/weight"], 1.0)
    assert not rotated_model.config.decoder.tie_embeddings
    assert report.bytes_before == boxes.stored_bytes(params)
    assert report.bytes_after == boxes.stored_bytes(rotated)


@pytest.mark.parametrize("name", ["sandwich", pytest.param("nano", marks=pytest.mark.slow)])
def test_heads_alone(make_member, batch_of, relative_change, name):
    model, params = make_member(name)
    same_model, rotated, report = rotate(residual=False)(model, params)
    assert same_model is model
    assert relative_change((model, params), (model, rotated), batch_of(model)) < 1e-5
    touched = {row.path.split("/")[-2] for row in report.rows}
    assert touched == {"v_proj", "o_proj"}
    assert {row.path.split("/")[0] for row in report.rows} == {"decoder"}


def test_the_residual_stream_is_rotated_by_one_matrix(make_member):
    model, params = make_member("edge")
    _, rotated, _ = rotate(heads=False)(model, params)
    before, after = (dict(boxes.path_items(tree)) for tree in (params, rotated))
    drawn = hadamard.random_rotation(jax.random.key(0), 24)
    odd = np.float64(drawn.odd)
    power = scipy.linalg.hadamard(8) / np.sqrt(8)
    matrix = np.float64(drawn.signs)[:, None] * np.kron(power, odd)

    def close(path, expected):
        np.testing.assert_allclose(after[path], expected, atol=1e-5, err_msg=path)

    layer = "decoder/layers/1"
    close("embed/weight", np.float64(before["embed/weight"]) @ matrix)
    close(
        f"{layer}/mlp/down_proj/weight",
        matrix.T @ np.float64(before[f"{layer}/mlp/down_proj/weight"]),
    )
    for norm, reader in (
        (f"{layer}/input_norm", f"{layer}/attention/k_proj"),
        (f"{layer}/post_attention_norm", f"{layer}/mlp/gate_up_proj"),
        ("decoder/norm", "head"),
    ):
        scaled = np.float64(before[f"{reader}/weight"]) * np.float64(before[f"{norm}/weight"])
        close(f"{reader}/weight", scaled @ matrix)


def test_a_tied_head_becomes_a_matrix_of_its_own(make_member):
    model, params = make_member("tied")
    rotated_model, rotated, report = rotate()(model, params)
    assert set(rotated["head"]) == {"weight"}
    assert rotated["head"]["weight"].shape == params["embed"]["weight"].shape
    assert rotated_model.config == dataclasses.replace(
        model.config, decoder=dataclasses.replace(model.config.decoder, tie_embeddings=False)
    )
    assert "head" not in params
    assert any("separate matrix" in note for note in report.notes)
    assert report.count_after == report.count_before + rotated["head"]["weight"].size


def test_outliers_go_and_the_report_says_so(make_member, batch_of):
    model, params = make_member("edge")
    leaves = dict(boxes.path_items(params))
    for path in leaves:
        if path.endswith(("down_proj/weight", "o_proj/weight", "embed/weight")):
            axis = 1 if "embed" in path else 0
            leaves[path] = leaves[path] * np.where(np.arange(24) == 5, 20.0, 1.0).reshape(
                (-1, 1) if axis == 0 else (1, -1)
            )
    params = ge.params.tree.nested(leaves)
    _, rotated, report = rotate()(model, params)
    after = dict(boxes.path_items(rotated))
    row = next(row for row in report.rows if row.path == "embed/weight")
    numbers = [
        scipy.stats.kurtosis(np.float64(tree["embed/weight"]), axis=None, fisher=False)
        for tree in (leaves, after)
    ]
    assert f"kurtosis {numbers[0]:.2f} -> {numbers[1]:.2f}" in row.action
    assert numbers[1] < numbers[0] / 3


def test_rounding_loses_less_after_rotation(make_member, batch_of, logits):
    model, params = make_member("edge", 3)
    spike = np.where(np.arange(24) == 3, 30.0, 1.0).astype(np.float32)
    params = {**params, "embed": {"weight": params["embed"]["weight"] * spike}}
    batch = batch_of(model)
    expected = logits(model, params, batch)

    def error(recipe):
        actual = recipe(model, params)
        return float(jnp.linalg.norm(logits(actual[0], actual[1], batch) - expected))

    embed = rtn("int4", where="^embed/")
    assert error(chain(rotate(heads=False), embed)) < 0.85 * error(embed)


def test_seeds_and_json(make_member):
    model, params = make_member("edge")
    first, again, other = (rotate(seed=seed)(model, params)[1] for seed in (1, 1, 2))
    weights = [tree["embed"]["weight"] for tree in (first, again, other)]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.allclose(weights[0], weights[2])
    recipe = rotate(residual=False, seed=7)
    assert recipe_from_json(to_json(recipe)) == recipe


def test_refuses(make_member):
    for options in ({"seed": -1}, {"residual": "yes"}, {"residual": False, "heads": False}):
        with pytest.raises(RecipeError, match=r"quantize\.rotate"):
            rotate(**options)
    with pytest.raises(RecipeError, match="sandwich_norm"):
        rotate()(*make_member("sandwich"))
    model, params = make_member("edge")
    quantized = rtn(where="q_proj")(model, params)[1]
    with pytest.raises(RecipeError, match=r"q_proj/weight is quantized; rotate before"):
        rotate()(model, quantized)
    pruned = ge.prune.magnitude(0.5, where="down_proj")(model, params)[1]
    with pytest.raises(RecipeError, match=r"down_proj/weight is pruned"):
        rotate()(model, pruned)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(4)(nn.Embed(4, 4)(tokens))


def test_other_models_are_offered_only_what_helps(make_member):
    dense = {"Dense_0": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(RecipeError, match=r"quantize.rotate: Plain: only a GLM") as refused:
        rotate()(Plain(), dense)
    assert "residual=False" not in str(refused.value)
    with pytest.raises(RecipeError, match=r"quantize.rotate: Plain: no factor is known to move"):
        rotate(residual=False)(Plain(), dense)
    model, params = make_member("nano")
    vision = VisionEncoder(model.config.vision, model.config.decoder.hidden_size)
    with pytest.raises(RecipeError, match="pass residual=False, encoders=True"):
        rotate()(vision, params["vision"])
    with pytest.raises(RecipeError, match=r"VisionEncoder is an encoder.*pass encoders=True"):
        rotate(residual=False)(vision, params["vision"])
    assert rotate(residual=False, encoders=True)(vision, params["vision"])[2].rows


def test_streams_the_same_and_refuses_a_tied_head_there(make_member, tmp_path):
    model, params = make_member("edge")
    ge.save(model, params, tmp_path / "own")
    compress_checkpoint(tmp_path / "own", tmp_path / "rotated", rotate())
    streamed = dict(boxes.path_items(ge.load(tmp_path / "rotated")[1]))
    for path, leaf in boxes.path_items(rotate()(model, params)[1]):
        np.testing.assert_array_equal(streamed[path], leaf, err_msg=path)
    ge.save(*make_member("tied"), tmp_path / "tied")
    with pytest.raises(RecipeError, match=r"tie_embeddings.*in memory"):
        compress_checkpoint(tmp_path / "tied", tmp_path / "none", rotate())
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_nano(relative_change):
    model, params = ge.load(ge.shipped("nano"), dtype="float32")
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(20, 2000, (2, 48)).astype(np.int32)}
    result = rotate()(model, params)
    assert relative_change((model, params), result[:2], batch) < 1e-5
