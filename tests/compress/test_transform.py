"""Transforms and recipes as values: printing, equality, JSON, and the same bytes again."""

import dataclasses
import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.compress import (
    ProgressLine,
    chain,
    distill,
    prune,
    quantize,
    recipes,
    register,
    to_json,
)
from glm_edge.compress import transform as transform_lib
from glm_edge.compress.recipes import recipe_from_json
from glm_edge.errors import DataError, RecipeError

RECIPE = chain(
    prune.structured(heads=0.25, neurons=0.3),
    distill(train=ge.TrainOptions(steps=2)),
    quantize.rtn("int4-g16", where="decoder/.*"),
    quantize.rtn("int8", where="embed"),
)


@pytest.fixture
def small(make_model):
    return make_model(num_layers=1)


def digest(params):
    arrays, spec = boxes.to_flat(params)
    total = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for name in sorted(arrays):
        total.update(name.encode() + np.asarray(arrays[name]).tobytes())
    return total.hexdigest()


def test_a_transform_prints_what_defines_it_and_what_differs():
    assert repr(prune.structured(heads=0.25, neurons=0.3)) == (
        "prune.structured(0.25, neurons=0.3)"
    )
    assert repr(quantize.rtn()) == "quantize.rtn('int8-channel')"
    assert repr(quantize.hqq()) == "quantize.hqq('int4-g64-affine-zero=float16', steps=20)"
    assert repr(quantize.rtn("nf4")) == "quantize.rtn('nf4-channel')"
    assert repr(quantize.smoothquant()) == "quantize.smoothquant(0.5)"
    assert repr(distill(teacher=(None, {}), train=ge.TrainOptions(steps=3))) == (
        "distill(…, train=TrainOptions(steps=3))"
    )
    assert repr(chain()) == "chain()"
    assert repr(chain(quantize.rtn("int4-g32"))) == "chain(\n  quantize.rtn('int4-g32'),\n)"


def test_what_prints_evaluates_to_an_equal_transform():
    names = {"chain": chain, "prune": prune, "distill": distill, "quantize": quantize}
    names["TrainOptions"] = ge.TrainOptions
    for transform in (RECIPE, *(recipes.named(name) for name in recipes.NAMED)):
        assert eval(repr(transform), names) == transform


def test_equality_is_by_value():
    assert quantize.rtn("int8") == quantize.rtn(format=boxes.Format("int8"))
    assert quantize.rtn("int8") != quantize.rtn("int4")
    assert quantize.rtn("int8") != quantize.hqq("int8")
    assert quantize.rtn("int8") != "quantize.rtn"
    assert hash(quantize.rtn("int8")) == hash(quantize.rtn(format="int8-channel"))
    teacher = (None, {})
    assert distill(teacher=teacher) == distill(teacher=teacher)
    assert distill(teacher=teacher) != distill()


def test_grouping_of_a_chain_changes_nothing():
    a, b, c = prune.magnitude(0.5), quantize.rtn("int4-g32"), quantize.rtn("int8")
    assert chain(chain(a, b), c) == chain(a, chain(b, c)) == chain(a, b, c)
    assert hash(chain(chain(a, b), c)) == hash(chain(a, b, c))


def test_options_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantize.rtn("int8").format = boxes.Format("int4")


@pytest.mark.parametrize("name", ["phone", "small", "quickstart"])
def test_named_recipes_round_trip_through_json(name, tmp_path):
    recipe = recipes.named(name)
    assert recipe_from_json(to_json(recipe)) == recipe
    path = tmp_path / "recipe.json"
    path.write_text(to_json(recipe))
    assert recipe_from_json(path) == recipe_from_json(str(path)) == recipe
    assert recipes.find(name) == recipes.find(str(path)) == recipe


def test_the_public_names_are_on_the_package():
    assert ge.chain is chain
    assert ge.distill is distill
    assert ge.recipe_from_json is recipe_from_json
    assert ge.prune.structured is prune.structured
    assert ge.quantize.rtn is quantize.rtn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "quantize.magic"}', "unknown transform 'quantize.magic'; known: .*quantize.rtn"),
        ('{"name": "quantize.rtn", "options": {"bit": 4}}', "no option 'bit'; known: format"),
        ('{"name": "quantize.rtn", "options": {"bits": 7}}', "bits must be 8, 6, 5, 4, 3 or 2"),
        ('{"name": "prune.magnitude", "options": {"sparsity": "x"}}', "prune.magnitude"),
        ('{"name": "prune.magnitude"}', "prune.magnitude: .*sparsity"),
        ('{"name": "chain", "options": {"steps": []}}', "chain takes one option"),
        ('{"name": "chain", "options": {"transforms": [3]}}', "expected"),
        ('{"options": {}}', "expected"),
        ('{"version": 3, "name": "quantize.rtn"}', "version 3 of a recipe is unknown"),
        ('{"version": "1", "name": "quantize.rtn"}', "version '1' of a recipe is unknown"),
        (
            '{"version": 1, "name": "quantize.rtn", "options": {"bits": 4}}',
            "no option 'bits'; known: format",
        ),
        ('{"name": "quantize.rtn", "options": []}', "options an object"),
        ('{"name": ', "not JSON"),
        ("no/such/file.json", "no/such/file.json: cannot read a recipe .*phone"),
    ],
)
def test_recipes_that_are_none_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_json(text)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="unknown recipe 'laptop'; known: phone"):
        recipes.named("laptop")
    with pytest.raises(RecipeError, match="chain takes transforms, found int"):
        chain(3)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary.json: not JSON"):
        recipe_from_json(tmp_path / "binary.json")


def test_a_teacher_of_arrays_cannot_be_written(small):
    with pytest.raises(RecipeError, match="teacher= contains arrays"):
        to_json(chain(distill(teacher=small)))


def test_same_recipe_seed_and_calibration_same_bytes(small, calibration):
    """The same recipe seed and calibration give the same bytes."""
    model, params = small
    before = digest(params)

    def run(recipe, seed=0):
        rng = jax.random.key(seed)
        smaller, compressed, _ = recipe(model, params, calibration=calibration, rng=rng)
        return smaller, digest(compressed)

    first = run(RECIPE)
    assert run(recipe_from_json(to_json(RECIPE))) == first
    assert run(RECIPE, seed=3)[1] != first[1]
    assert digest(params) == before


def test_a_chain_reports_every_step_and_the_totals_of_all(small, calibration):
    model, params = small
    _, compressed, report = RECIPE(model, params, calibration=calibration)
    assert [row.transform for row in report.rows].count("quantize.rtn") == 7
    assert report.bytes_before == boxes.stored_bytes(params)
    assert report.bytes_after == boxes.stored_bytes(compressed)
    assert report.count_before == boxes.count(params)
    assert report.count_after == boxes.count(compressed)
    assert len(report.curve) == 2


def test_an_empty_chain_changes_nothing(small):
    model, params = small
    same, same_params, report = chain()(model, params)
    assert same is model
    assert same_params is params
    assert report.bytes_before == report.bytes_after


def test_report_of_a_chain_shows_every_step():
    kernel = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    recipe = chain(prune.magnitude(0.5), quantize.rtn("int8"))
    _, params, report = recipe(nn.Dense(16), {"kernel": kernel})
    shown = str(report).splitlines()
    assert [line.split()[0] for line in shown[2:4]] == ["prune.magnitude", "quantize.rtn"]
    assert (report.bytes_before, report.bytes_after) == (4 * 8 * 16, boxes.stored_bytes(params))


def test_a_transform_of_a_user_joins_chains_and_recipes(monkeypatch):
    monkeypatch.setattr(transform_lib, "_REGISTRY", dict(transform_lib._REGISTRY))

    @register("mine.doubled")
    class Doubled(ge.Transform):
        times: int = dataclasses.field(default=1, kw_only=False)

        def apply(self, model, params, context):
            doubled = jax.tree.map(lambda leaf: leaf * 2**self.times, params)
            return model, doubled, ge.Report.start(params)

    recipe = recipe_from_json(to_json(chain(Doubled(2))))
    assert repr(Doubled()) == "mine.doubled(1)"
    with pytest.raises(RecipeError, match="times must be int, not 'x'"):
        Doubled("x")
    _, params, _ = recipe(nn.Dense(2), {"kernel": np.ones((2, 2), np.float32)})
    np.testing.assert_array_equal(params["kernel"], np.full((2, 2), 4.0))


def test_progress_is_told(small, calibration, capsys):
    model, params = small
    observed = []
    RECIPE(
        model,
        params,
        calibration=calibration,
        progress=lambda stage, done, total: observed.append((stage.split(":")[0], done, total)),
    )
    assert [stage for stage, done, total in observed if done == total] == [
        "score",
        "distill",
        "quantize.rtn",
        "quantize.rtn",
    ]
    for progress in (ProgressLine(), True):
        quantize.rtn("int8")(model, params, progress=progress)
        shown = capsys.readouterr().err
        # A file gets whole lines, a terminal one line that is rewritten.
        assert "7/7 quantize" in shown
        assert "\r" not in shown
    with pytest.raises(DataError, match="progress must be True or a function"):
        quantize.rtn("int8")(model, params, progress="yes")


def test_calibration_is_read_more_than_once(small, calibration):
    with pytest.raises(DataError, match="can be read only once"):
        RECIPE(*small, calibration=(batch for batch in calibration))


AFTER_ROUNDING = {
    "gptq": lambda: quantize.gptq("int4"),
    "awq": lambda: quantize.awq("int4"),
    "hqq": lambda: quantize.hqq("int4-affine-zero=float16"),
    "rtn": lambda: quantize.rtn("int4"),
    "adaround": lambda: quantize.adaround("int4"),
    "blockwise": lambda: quantize.blockwise("int4", train=ge.TrainOptions(steps=50)),
    "sparsegpt_quantize": lambda: prune.sparsegpt(0.5, format="int4"),
}


@pytest.mark.parametrize("name", AFTER_ROUNDING)
def test_a_transform_with_nothing_left_says_so(small, calibration, name):
    model, params = small
    recipe = chain(quantize.rtn("int8"), AFTER_ROUNDING[name]())
    _, after, report = recipe(model, params, calibration[:1])
    results = [note for note in report.notes if "nothing to do" in note]
    count = len(boxes.select(params, None))
    assert len(results) == 1
    assert f"{name}: nothing to do: all {count} matrices are quantized already" in results[0]
    _, alone, _ = quantize.rtn("int8")(model, params)
    jax.tree.map(np.testing.assert_array_equal, after, alone)


def test_distillation_of_integers_only_is_refused(calibration):
    params = {"kernel": quantize.quantize_leaf("kernel", jnp.eye(4), boxes.Format("int8"))[0]}
    with pytest.raises(RecipeError, match="nothing left to train"):
        distill(teacher=(nn.Dense(4), params), train=ge.TrainOptions(steps=1))(
            nn.Dense(4), params, calibration
        )


def test_training_says_that_narrow_types_were_widened(calibration):
    model, tree = nn.Embed(40, 40), {"embedding": jnp.eye(40)}
    transform = distill(
        teacher=(model, {"embedding": 2 * jnp.eye(40)}), train=ge.TrainOptions(steps=1)
    )
    _, trained, report = transform(model, boxes.cast(tree, jnp.bfloat16), calibration[:1])
    assert trained["embedding"].dtype == jnp.float32
    (note,) = report.notes
    assert "1 arrays of bfloat16 were trained and are float32 now" in note
    assert "params.cast(params, 'bfloat16')" in note
    assert not transform(model, tree, calibration[:1])[2].notes


class Half(nn.Module):
    """Half of it has names of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        w = self.param("w", nn.initializers.normal(), (4, 3))
        return x @ w + self.param("b", nn.initializers.zeros, (3,))


@pytest.mark.parametrize("transform", [quantize.rtn("int8"), prune.magnitude(0.5)], ids=str)
def test_arrays_of_other_names_are_counted(transform):
    shapes = jax.eval_shape(Half().init, jax.random.key(0), jnp.ones((1, 4)))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    _, _, report = transform(Half(), params)
    assert [row.path for row in report.rows] == ["first/kernel"]
    (note,) = [note for note in report.notes if "are compressed" in note]
    assert note.startswith("1 arrays of two or more axes are unchanged: w; ")
    assert "named weight, kernel, embedding are compressed" in note


def test_a_tree_without_matrices_says_which_names_count():
    with pytest.raises(RecipeError, match=r"none of 0 matrices.*named weight, kernel, embedding"):
        quantize.rtn("int8")(Half(), {"w": jnp.ones((4, 3))})


def test_arguments_that_are_no_parameters_are_named():
    model = Half()
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4)))["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1))
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    for wrong, message in (
        ((model, None), "not NoneType"),
        ((params, model), "params is a Half, a model"),
        ((model, state), r"not TrainState \(pass its .params\)"),
        ((module, nnx.state(module)), "nnx.to_pure_dict"),
        ((model, {"kernel": 3.0}), "params/kernel is float, not an array"),
        ((Half, params), "model is the class Half, not an instance of it"),
        (("Half", params), "model is a str, not a Linen module"),
    ):
        with pytest.raises(RecipeError, match=message):
            quantize.rtn("int8")(*wrong)


class OfNnx(nnx.Module):
    """A module of a user."""

    def __init__(self):
        self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))


NEEDS_A_MODEL = [
    quantize.gptq("int8"),
    quantize.awq(),
    quantize.qat(train=ge.TrainOptions(steps=1, warmup=0.05)),
    distill(train=ge.TrainOptions(steps=1)),
    quantize.rotate(),
    prune.structured(heads=0.5, score="magnitude"),
    chain(quantize.rtn("int8"), quantize.gptq("int8")),
]


@pytest.mark.parametrize("transform", [quantize.rtn("int8"), *NEEDS_A_MODEL], ids=lambda t: t.name)
@pytest.mark.parametrize("wrong", ["module", "kind", "state", "params"])
def test_modules_of_nnx_are_told_what_to_pass(transform, wrong):
    module = OfNnx()
    state = nnx.split(module)[1]
    pure = nnx.to_pure_dict(state)
    model, params = {
        "module": (module, pure),
        "kind": (OfNnx, pure),
        "state": (None, state),
        "params": (None, module),
    }[wrong]
    with pytest.raises(RecipeError, match=r"pass None as the model and nnx\.to_pure_dict"):
        transform(model, params, [{"tokens": np.zeros((1, 4), np.int32)}])


@pytest.mark.parametrize("original", [None, "tokens", "calibration"])
@pytest.mark.parametrize("transform", NEEDS_A_MODEL, ids=lambda t: t.name)
def test_transforms_that_need_a_model_say_so(transform, original):
    batches = [{"tokens": np.zeros((1, 4), np.int32)}]
    data = {None: None, "tokens": batches, "calibration": ge.Calibration(batches, apply=max)}[
        original
    ]
    with pytest.raises(RecipeError, match=r"needs the model.*require Linen modules"):
        transform(None, {"kernel": jnp.ones((4, 4))}, data)


def test_calibration_without_a_model_is_refused():
    with pytest.raises(RecipeError, match="calibration needs the model"):
        prune.mask(0.5, score="wanda")(None, {"kernel": jnp.ones((4, 4))}, [{}])


class Stack(nn.Module):
    """Attention within a scan, whose biases have several axes, and a table of its own name."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.LayerNorm()(x)
                return nn.MultiHeadDotProductAttention(num_heads=2)(x, x), None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Layer, length=2, **axes)()(x, None)
        return x + self.param("cls", nn.initializers.zeros, (1, 1, 4))


def test_biases_and_norms_hide_no_array_of_another_name():
    shapes = jax.eval_shape(Stack().init, jax.random.key(0), jnp.ones((1, 3, 4)))["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
    _, _, report = quantize.rtn("int8", stacked="Scan")(Stack(), params)
    (note,) = [note for note in report.notes if "are compressed" in note]
    assert note.startswith("1 arrays of two or more axes are unchanged: cls; ")


def test_parameters_of_nnx_pass_as_a_dict():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    _, rounded, _ = quantize.rtn("int8")(None, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.tree.map(boxes.dense, rounded, is_leaf=boxes.is_box))
    kernel = np.asarray(nnx.merge(graph, state).kernel[...])
    scale = np.abs(np.asarray(module.kernel[...])).max(0) / 127
    assert 0 < np.abs(kernel - np.asarray(module.kernel[...])).max() <= scale.max()
