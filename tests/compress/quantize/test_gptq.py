"""GPTQ as a transform: less error than rounding to nearest, and what it refuses."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import SolverOptions, chain, recipe_from_json, to_json
from glm_edge.compress.layerwise.runner import StageInputs
from glm_edge.compress.layerwise.stages import ROWS, first_states, stages
from glm_edge.compress.prune import depth, structured
from glm_edge.compress.quantize.gptq import gptq
from glm_edge.compress.quantize.rtn import rtn
from glm_edge.compress.quantize.solvers import gptq_solver
from glm_edge.compress.quantize.solvers.shrinkage import Choice
from glm_edge.errors import DataError, RecipeError
from tests.tiny_models import init

# The package exports the factory under the name of its module.
gptq_module = importlib.import_module("glm_edge.compress.quantize.gptq")
LAYERS = r"layers/"
# One format, model and shape of batches in most tests, so that the solver is compiled once.
FORMAT = "int2-g8"


@pytest.fixture(scope="module")
def error(logits):
    def norm(model, params, changed, batch):
        return np.linalg.norm(logits(model, changed, batch) - logits(model, params, batch))

    return norm


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"solver": SolverOptions(propagate=0.0, sequential=False)}]
)
def test_loses_less_than_rounding_to_nearest(make_member, batch_of, error, options):
    model, params = make_member("nano")
    calibration = [batch_of(model, rows=8, seed=seed) for seed in (1, 2, 3)]
    held_out = batch_of(model, rows=8, seed=9)
    nearest = rtn("int3-g8", where=LAYERS, scale="mse")(model, params)[1]
    _, compressed, report = gptq("int3-g8", where=LAYERS, **options)(model, params, calibration)
    assert error(model, params, compressed, held_out) < 0.95 * error(
        model, params, nearest, held_out
    )
    assert {row.action.split(" ")[0] for row in report.rows} == {"int3-g8"}
    assert all("output error" in row.action for row in report.rows)
    assert set(boxes.select(params, LAYERS)) == {row.path for row in report.rows}


@pytest.mark.slow
def test_each_stage_loses_less_at_its_output(square, calibration):
    model, params = square
    changed = {
        "nearest": rtn(FORMAT, where=LAYERS, scale="mse")(model, params)[1],
        "gptq": gptq(FORMAT, where=LAYERS, solver={"propagate": 0.0})(model, params, calibration)[
            1
        ],
    }
    leaves = dict(boxes.path_items(params))
    states = first_states(model, calibration)
    for stage in stages(model):
        view = StageInputs(stage, leaves, states)
        if "layers" in stage.name:
            target, lost = view.outputs(), {}
            for name, tree in changed.items():
                other = dict(boxes.path_items(tree))
                pairs = zip(view.outputs(other), target, strict=True)
                lost[name] = sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)
            assert lost["gptq"] < lost["nearest"]
        states = view.run()


def test_gptq_groups_weights_by_input_in_order(square, calibration):
    """Weights with one input are one group in the order in which they run."""
    model, params = square
    states = first_states(model, calibration[:1])
    leaves = dict(boxes.path_items(params))
    front, first = stages(model)[:2]
    states = front.run(leaves, states)
    names = [
        [path.rsplit("/", 2)[1] for path in group] for group in first.readers(leaves, states[0])
    ]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    complete = first.collect(leaves, states, ROWS)
    some = [path for path in complete if "o_proj" in path]
    part = first.collect(leaves, states, ROWS, some)
    assert list(part) == some
    np.testing.assert_allclose(part[some[0]], complete[some[0]], rtol=1e-5)


def test_chains_with_rounding_the_rest_and_goes_through_json(square, calibration):
    model, params = square
    recipe = chain(gptq(FORMAT, where=LAYERS), rtn("int8", where="embed"))
    again = recipe_from_json(to_json(recipe))
    first, second = (r(model, params, calibration)[1] for r in (recipe, again))
    formats = {p: str(leaf.format) for p, leaf in boxes.path_items(first) if boxes.is_box(leaf)}
    assert formats.pop("embed/weight") == "int8-channel"
    assert set(formats.values()) == {FORMAT}
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_shrinkage_goes_through_json():
    for shrinkage in (0.0, 0.25, "cross-validate"):
        recipe = gptq(FORMAT, solver=SolverOptions(shrinkage=shrinkage))
        assert recipe_from_json(to_json(recipe)) == recipe
    assert gptq(FORMAT).solver.shrinkage == "cross-validate"


ONE = "0/mlp/down_proj"


def test_gptq_below_two_domains_gives_the_bytes_without(square, calibration):
    model, params = square
    expected = gptq(FORMAT, where=ONE, solver={"shrinkage": 0.0})(model, params, calibration)
    for domains in ((None,), ("a",), ("a", None)):
        data = named(calibration, domains)
        _, actual, report = gptq(FORMAT, where=ONE)(model, params, data)
        jax.tree.map(np.testing.assert_array_equal, actual, expected[1])
        assert report.rows == expected[2].rows
        assert "shrinkage" not in report.rows[0].action


def named(calibration, domains):
    return [{**b, "domain": domains[i % len(domains)]} for i, b in enumerate(calibration)]


def test_grams_of_domains_add_up_to_the_total(square, calibration, monkeypatch):
    model, params = square
    grams, parts = [], []

    def solve(weight, gram, *arguments, **options):
        grams.append(gram)
        return gptq_solver.solve(weight, gram, *arguments, **options)

    def choose(option, weight, mask, domains, *arguments):
        parts.append(domains)
        return Choice(0.3, 2)

    monkeypatch.setattr(gptq_module, "solve", solve)
    rounding = gptq(FORMAT, where=ONE)
    rounding(model, params, calibration)
    with monkeypatch.context() as patched:
        patched.setattr(gptq_module, "choose", choose)
        # Each batch is a product of its own, and domain `a` has two.
        patched.setattr(gptq_module, "ROWS_AT_ONCE", 1)
        report = rounding(model, params, named(calibration, ("a", "b", None)))[2]
    assert parts[0].keys() == {"a", "b", None}
    alone, total = grams[:2]
    np.testing.assert_allclose(total, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
    np.testing.assert_allclose(sum(parts[0].values()), total, rtol=1e-6)
    assert report.rows[0].action.endswith(", shrinkage 0.3 by 2 domains)")
    fixed = gptq(FORMAT, where=ONE, solver={"shrinkage": 0.3})(model, params, calibration)
    assert fixed[2].rows[0].action.endswith(", shrinkage 0.3)")
    assert fixed[2].rows[0].output_error == pytest.approx(report.rows[0].output_error, rel=1e-3)


def test_what_no_input_meets_is_rounded_to_nearest(square, calibration):
    model, params = square
    _, actual, report = gptq("int8", where="embed")(model, params, calibration)
    assert "to nearest" in report.rows[0].action
    expected = rtn("int8", where="embed", scale="mse")(model, params)[1]["embed"]["weight"]
    np.testing.assert_array_equal(actual["embed"]["weight"].codes(), expected.codes())


def test_zeros_of_a_mask_stay(square, calibration):
    model, params = square
    path = "decoder/layers/0/mlp/down_proj/weight"
    leaves = dict(boxes.path_items(params))
    keep = np.random.default_rng(0).random(leaves[path].shape) < 0.5
    leaves[path] = boxes.mask(leaves[path], jnp.asarray(keep))
    masked = boxes.tree.nested(leaves)
    result = gptq(FORMAT, where="0/mlp/down_proj")(model, masked, calibration)[1]
    dense = np.asarray(dict(boxes.path_items(result))[path].unbox())
    assert not np.any(dense[~keep] != 0)
    published = {"propagate": 0.0, "refit": False, "sweeps": 0}
    with pytest.raises(RecipeError, match="cannot represent the zeros"):
        gptq("ternary34-g8", where="0/mlp/down_proj", scale="max", solver=published)(
            model, masked, calibration
        )


def test_stock_kernels_are_rounded_by_their_inputs(error):
    class Stock(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(40, 32, name="embed")(tokens)
            return nn.Dense(32, name="out")(nn.relu(nn.Dense(32, name="hidden")(x)))

    model, tokens = Stock(), np.random.default_rng(0).integers(0, 40, (8, 12)).astype(np.int32)
    params = init(model, tokens)["params"]
    batch = {"tokens": tokens}
    result = gptq(FORMAT, where="kernel")(model, params, [batch])[1]
    nearest = rtn(FORMAT, where="kernel", scale="mse")(model, params)[1]
    assert error(model, params, result, batch) < 0.8 * error(model, params, nearest, batch)


def test_what_is_not_finite_is_refused(square, calibration):
    model, params = square
    leaves = dict(boxes.path_items(params))
    path = "decoder/layers/0/attention/q_proj/weight"
    broken = boxes.tree.nested({**leaves, path: leaves[path].at[0, 0].set(jnp.inf)})
    with pytest.raises(RecipeError, match="q_proj/weight: NaN or infinity in the weights"):
        gptq(where="layers/0")(model, broken, calibration)
    path = "decoder/layers/0/input_norm/weight"
    broken = boxes.tree.nested({**leaves, path: leaves[path].at[0].set(jnp.nan)})
    with pytest.raises(RecipeError, match="its calibration inputs contain NaN or infinity"):
        gptq(where="layers/0")(model, broken, calibration)


def test_options_without_meaning_are_refused(square, calibration):
    model, params = square
    for options in (
        {"format": "int7"},
        {"format": "bfloat16"},
        {"scale": "least"},
        {"solver": {"damping": -1.0}},
        {"solver": {"propagate": 2.0}},
        {"solver": {"sweeps": -1}},
        {"solver": {"refit": 1}},
        {"solver": {"act_order": None}},
        {"solver": {"dampening": 0.01}},
        {"solver": {"shrinkage": -0.1}},
        {"solver": {"shrinkage": 1.5}},
        {"solver": {"shrinkage": True}},
        {"solver": {"shrinkage": None}},
        {"solver": 0.01},
        {"where": "("},
    ):
        with pytest.raises(RecipeError, match=r"quantize\.gptq"):
            gptq(**options)
    with pytest.raises(RecipeError, match=r"shrinkage must be in 0\.\.1 or 'cross-validate', not"):
        gptq(solver={"shrinkage": "always"})
    with pytest.raises(DataError, match="calibration"):
        gptq(where=LAYERS)(model, params)
    with pytest.raises(RecipeError, match="do not divide into groups of 7"):
        gptq("int4-g7", where=LAYERS)(model, params, calibration)


@pytest.mark.parametrize(
    "shrink",
    [
        depth(layers=1),
        pytest.param(structured(neurons=0.5, score="magnitude"), marks=pytest.mark.slow),
        pytest.param(
            structured(heads=0.25, neurons=0.5, score="magnitude"), marks=pytest.mark.slow
        ),
    ],
)
def test_gptq_after_shrinking_compares_smaller_layers(square, calibration, shrink):
    """After shrinking layers are compared with the smaller models."""
    model, params = square
    rounding = gptq(FORMAT, where=LAYERS)
    smaller, fewer, _ = shrink(model, params, calibration=calibration)
    alone = rounding(smaller, fewer, calibration=calibration)[1]
    _, chained, _ = chain(shrink, rounding)(model, params, calibration=calibration)
    for (path, one), (_, other) in zip(
        boxes.path_items(alone), boxes.path_items(chained), strict=True
    ):
        np.testing.assert_array_equal(boxes.dense(one), boxes.dense(other), err_msg=path)
