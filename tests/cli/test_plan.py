"""Sizes on paper equal those of quantized trees, and the verdict follows from them."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from glm_edge import params as boxes
from glm_edge.cli import plan
from glm_edge.compress.quantize.solvers import scales as grids
from glm_edge.configs import preset
from glm_edge.errors import RecipeError
from glm_edge.params import Format


def quantized_abstractly(params, formats):
    """The tree that rounding would make, as abstract values."""

    def store(weight, format):
        codes, grid = grids.nearest(weight, format)
        return boxes.quantized(codes, grid.scale, grid.zero, format, dtype="bfloat16")

    @functools.cache
    def stored(shape, dtype, format):
        leaf = jax.ShapeDtypeStruct(shape, dtype)
        return jax.eval_shape(functools.partial(store, format=format), leaf)

    def convert(path, leaf):
        if path not in formats or formats[path].plain:
            return leaf
        return stored(leaf.shape, leaf.dtype, formats[path])

    return boxes.map_with_path(convert, params)


@pytest.mark.parametrize(
    ("body", "ends", "tower"),
    [
        pytest.param("int8", "int8", "int8", marks=pytest.mark.slow),
        ("int4-g32", "int8", "int4"),
        ("int3", "int4-g64", "int4-g32-affine"),
        pytest.param("ternary-g128", "int4", "int4", marks=pytest.mark.slow),
        ("ternary34-g128", "ternary", "int2"),
    ],
)
def test_totals_are_those_of_quantized_trees(body, ends, tower):
    params = plan.shapes(preset("phone_9b"))
    chosen = [plan.read_format(name) for name in (body, ends, tower)]
    formats = plan.formats_of(params, *chosen)
    tree = quantized_abstractly(params, formats)
    assert sum(plan.total(params, *chosen).values()) == boxes.stored_bytes(tree)
    assert plan.total(params, *chosen)["vision"] == boxes.stored_bytes(tree["vision"])
    assert sum(plan.counts(params).values()) == boxes.count(params)


def test_layers_that_fit_are_the_most_that_fit():
    config = plan.with_vocabulary(preset("phone_9b"), 65536)
    body, ends, tower = Format.parse("int2"), Format.parse("int4"), Format.parse("int4")
    budget = 1_800_000_000
    count = plan.most_layers(config, body, ends, tower, {"GB": budget})["GB"]

    def bytes_of(layers):
        params = plan.shapes(plan.with_layers(config, layers))
        return plan.total(params, body, ends, tower)["text"]

    assert bytes_of(count) <= budget < bytes_of(count + 1)


def test_a_smaller_vocabulary_is_still_a_model():
    config = plan.with_vocabulary(preset("phone_9b"), 1000)
    params = plan.shapes(config)
    assert params["embed"]["weight"].shape[0] == params["head"]["weight"].shape[0] == 1000
    assert params["embed"]["weight"].dtype == jnp.bfloat16
    assert config.image_token_id != config.audio_token_id


@pytest.mark.slow
def test_plan_phone_prints_what_the_command_prints(run, capsys):
    command = [sys.executable, "-m", "experiments.plan_phone"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    run("plan")
    assert capsys.readouterr().out == printed


def test_the_claim_is_impossible_and_the_plan_says_what_is_not(run, capsys, tmp_path):
    file = tmp_path / "plan.json"
    run("plan", f"--json={file}")
    assert "arithmetically impossible" in capsys.readouterr().out
    report = json.loads(file.read_text())
    text = sum(
        leaf.size
        for path, leaf in boxes.path_items(plan.shapes(preset("phone_9b")))
        if not path.startswith(("vision/", "speech/"))
    )
    assert report["claim"]["parameters"] == text
    # A byte a weight and more, whatever the scales take.
    assert report["claim"]["bytes_needed"] > text > 5 * report["budgets"]["GB"]
    fitting = {row["format"] for row in report["claim"]["uniform_formats_that_fit"]}
    assert "ternary34-g128" in fitting
    assert not fitting & {"int8", "int4", "int3", "int2", "ternary-g128"}


def test_unknown_formats_are_refused():
    with pytest.raises(RecipeError, match="int7"):
        plan.read_format("int7")
