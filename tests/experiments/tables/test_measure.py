"""Operations against published counts, files in LiteRT, and rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import reparameterize as bench_reparameterize
from experiments.tables import (
    int8_pruned,
    learning,
    measure,
    precision_memory,
    repvgg,
    sparsity,
)
from glm_edge import configs
from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.export import function
from glm_edge.models.cnn import CNN, preset
from glm_edge.models.multimodal import MultimodalGLM


@pytest.mark.parametrize(
    ("name", "giga"),
    # torchvision's GFLOPs of resnet50 and mobilenet_v2; the papers' of RepVGG and MobileNet.
    [
        ("resnet_50", 4.09),
        ("mobilenet_v2_1", 0.30),
        ("mobilenet_v1", 0.57),
        ("repvgg_a2", 5.1),
        ("repvgg_b1", 11.8),
    ],
)
def test_multiply_accumulates_are_the_published_ones(name, giga):
    result = repvgg.operations(preset(name)) / 1e9
    assert result == pytest.approx(giga, abs=0.051 if giga > 5 else 0.0051)


def test_products_within_loops_and_calls_are_counted():
    a = jnp.ones((3, 4))
    inner = jax.jit(lambda x: x @ jnp.ones((4, 5)))
    assert measure.multiply_accumulates(lambda x: inner(x).sum(), a) == 3 * 4 * 5


def test_sides_are_measured_in_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = measure.alternate(sides, 3)
    assert order == [*"aabb", *"ba", *"ab", *"ba"]
    assert all(len(result) == 3 for result in seconds.values())
    assert measure.median_ms([0.001, 0.5, 0.002]) == pytest.approx(2.0)
    assert measure.ratio_quartiles([1, 2, 6], [1, 1, 2])[1] == 2.0


@pytest.fixture(scope="module")
def mobile():
    config = dataclasses.replace(preset("mobilenet_v2_digits"), image_size=(8, 8, 1))
    model = CNN(config)
    return model, measure.random_variables(model, 0)


def test_files_agree_with_jax_in_float32_and_int8(mobile, tmp_path):
    pytest.importorskip("tensorflow")
    model, variables = mobile
    images = np.random.default_rng(0).random((7, 8, 8, 1), np.float32)
    expected = learning.logits_of(model, variables, {"images": images})
    size = measure.export(model, variables, tmp_path / "float.tflite", batch=3)
    file = measure.LiteRT(tmp_path / "float.tflite")
    np.testing.assert_allclose(file(images[:3]), expected[:3], atol=1e-4)
    np.testing.assert_array_equal(file.classify(images), expected.argmax(-1))
    small = measure.export(model, variables, tmp_path / "int8.tflite", images)
    assert small < 0.6 * size
    rounded = measure.LiteRT(tmp_path / "int8.tflite")(images[:1])
    error = np.abs(rounded - expected[:1]).max()
    assert 0.0 < error < 0.2 * np.abs(expected).max()


def test_a_function_that_tflite_cannot_hold_is_refused(tmp_path):
    pytest.importorskip("tensorflow")
    with pytest.raises(ExportError, match="cannot represent this function"):
        function(
            lambda _, inputs: {"y": jnp.linalg.svd(inputs["x"])[1]},
            {},
            {"x": jax.ShapeDtypeStruct((3, 3), jnp.float32)},
            tmp_path / "svd.tflite",
        )
    assert not list(tmp_path.iterdir())


def test_the_reparameterization_benchmark_measures_both_sides():
    pytest.importorskip("tensorflow")
    config = dataclasses.replace(preset("repvgg_digits"), image_size=(8, 8, 1))
    row = bench_reparameterize.run(config, rounds=2, threads=1, seed=0)
    assert row["parameters"] == {"before": 42_602, "after": 37_834}
    assert row["file_bytes"]["after"] < row["file_bytes"]["before"]
    for engine in ("jax", "litert"):
        assert row[engine]["relative_difference"] < 1e-4
        assert row[engine]["before_ms"] > 0 < row[engine]["after_ms"]
    assert len([form(row) for form in bench_reparameterize.COLUMNS.values()]) == 8


def test_masks_and_narrow_leave_as_many_parameters():
    sides = sparsity.models(64, 0.3, seed=0)
    sizes = {name: sparsity.size_of(params) for name, (_, params) in sides.items()}
    matrices = boxes.select(sides["dense"][1], None)
    leaves = dict(boxes.path_items(sides["dense"][1]))
    zeros = sum(round(0.3 * leaves[path].size) for path in matrices)
    remaining = sizes["dense"]["parameters"] - zeros
    assert sizes["masked, in its box"]["parameters"] == remaining
    assert sizes["narrow"]["parameters"] == pytest.approx(remaining, rel=0.02)
    assert sizes["masked, in its box"]["bytes"] > sizes["dense"]["bytes"]
    tokens = jnp.arange(5)[None]
    model, masked = sides["masked, in its box"]
    run = jax.jit(lambda params: model.apply({"params": params}, tokens)[0])
    boxed, plain = run(masked), run(sides["masked"][1])
    np.testing.assert_allclose(boxed, plain, atol=1e-5)


def test_encoders_run_in_both_engines_and_boxes_in_jax():
    pytest.importorskip("tensorflow")
    sides = sparsity.models(64, 0.3, seed=0)
    chosen = {"one": sides["narrow"], "boxed": sides["masked, in its box"]}
    seconds = measure.encoder_times(chosen, tokens=5, rounds=2, threads=1)
    assert set(seconds) == {"jax one", "litert one", "jax boxed"}
    assert all(len(result) == 2 and min(result) > 0 for result in seconds.values())


def test_rows_of_sparsity_say_how_time_changed():
    seconds = {
        f"{engine} {name}": [0.1 * factor] * 3
        for engine in measure.ENGINES
        for name, factor in (("dense", 1.0), ("masked", 1.02), ("narrow", 0.7))
    }
    kinds = ("dense", "masked", "masked, in its box", "narrow")
    rows = sparsity.rows_of(seconds, {kind: {"parameters": 5e7, "bytes": 2e8} for kind in kinds})
    results = {row.quantity: row for row in rows}
    assert results["masked over dense, JAX"].measured == pytest.approx(1.02)
    assert results["masked over dense, JAX"].ratio == pytest.approx(1.02 / 0.78)
    assert results["narrow over dense, LiteRT"].claim is None
    assert results["masked, by a sparse kernel"].measured is None


def test_rows_of_int8_and_pruning_give_factors_and_losses():
    cost = {"operations": 6e8, "bytes": 14e6, "seconds": [0.02] * 3}
    small = {"operations": 2e8, "bytes": 2e6, "seconds": [0.01] * 3}
    kinds = {"dense": cost, "dense int8": cost, "pruned": small, "pruned int8": small}
    results = {"dense": [97.0], "dense int8": [96.5], "pruned": [96.0], "pruned int8": [95.5]}
    rows = {row.quantity: row for row in int8_pruned.rows_of(results, kinds, "d")}
    assert rows["operations, reduction factor"].measured == pytest.approx(3.0)
    assert rows["file, reduction factor"].claim == pytest.approx(8.7 / 3.2)
    assert rows["top-1 lost, pruned int8"].measured == pytest.approx(1.5)
    assert rows["top-1 lost, pruned int8"].ratio == pytest.approx(1.5)


def test_rows_of_repvgg_are_ratios_pair_by_pair():
    seconds = {
        f"{engine} {name}": times
        for engine in measure.ENGINES
        for name, times in (
            ("resnet_50", [0.1, 0.2, 0.3]),
            ("repvgg_a2", [0.2, 0.4, 0.6]),
            ("repvgg_a2 in three branches", [0.3, 0.6, 0.9]),
        )
    }
    macs = {"resnet_50": 4, "repvgg_a2": 5}
    results = {
        (row.quantity, row.unit): row
        for row in repvgg.rows_of(seconds, macs, "resnet_50", ["repvgg_a2"])
    }
    ratio = results["repvgg_a2 over resnet_50, JAX", "x"]
    assert (ratio.measured, ratio.claim) == (pytest.approx(2.0), pytest.approx(6.2 / 8.7))
    work = results["repvgg_a2 over resnet_50, JAX", "x operations a second"]
    assert work.measured == pytest.approx(5 / 4 / 2)
    branches = results["repvgg_a2, three branches over one, LiteRT", "x"]
    assert branches.measured == pytest.approx(1.5)


def test_memory_is_that_of_what_is_stored_and_of_what_runs():
    config = configs.GLMConfig(
        name="small",
        decoder=configs.DecoderConfig(
            vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32,
            intermediate_size=96, max_position_embeddings=64,
        ),
    )  # fmt: skip
    model = MultimodalGLM(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    recipes = precision_memory.recipes()
    results = {"float32": precision_memory.sizes(model, params, [4])}
    for name in precision_memory.CLAIMS:
        results[name] = precision_memory.sizes(model, recipes[name](model, params)[1], [4])
    assert results["float32"]["stored"] == boxes.stored_bytes(params)
    assert results["float32"]["running 4"] > results["float32"]["stored"]
    rows = {row.quantity: row for row in precision_memory.rows_of(results)}
    assert 49.0 < rows["stored, bfloat16"].measured < 50.0
    assert 65.0 < rows["stored, int8"].measured < 75.0
    assert rows["stored, int8"].ratio == pytest.approx(rows["stored, int8"].measured / 75.0)
