"""Calibration by functions: a ViT on images and labels, a CNN with statistics of batches."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from glm_edge import params as boxes
from glm_edge.compress import Calibration, TrainOptions, chain, distill, prune, quantize
from glm_edge.compress.allocate.plan import plan
from glm_edge.compress.distill.state import calibration_digest
from glm_edge.errors import DataError, RecipeError
from tests.marks import slow_unless
from tests.tiny_models import init

CLASSES = 5


class ViT(nn.Module):
    """Patches, one layer, mean, head: all of Flax."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(16, (4, 4), (4, 4), name="patch")(images)
        x = x.reshape(x.shape[0], -1, 16)
        x = x + self.param("position", nn.initializers.normal(0.1), (1, x.shape[1], 16))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y, y)
        y = nn.Dense(24, name="up")(nn.LayerNorm()(x))
        x = x + nn.Dense(16, name="down")(nn.gelu(y))
        return nn.Dense(CLASSES, name="head")(x.mean(axis=1))


class CNN(nn.Module):
    """A convolution, its norm by statistics that are a collection of their own, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Dense(12, name="hidden")(x.mean(axis=(1, 2))))
        return nn.Dense(CLASSES, name="head")(x)


def apply(model, variables, batch):
    return model.apply(variables, batch["images"])


def loss(model, variables, batch):
    logits = apply(model, variables, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])


def mean_loss(model, variables, batch):
    return loss(model, variables, batch).mean()


def data(count=4, rows=3):
    rng = np.random.default_rng(0)
    return [
        {
            "images": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
            "labels": rng.integers(0, CLASSES, rows).astype(np.int32),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def models():
    """`(model, params, other collections)` of both."""
    results = {}
    for name, model in (("vit", ViT()), ("cnn", CNN())):
        variables = init(model, data(1)[0]["images"])
        params = variables.pop("params")
        if name == "cnn":
            variables = jax.tree.map(lambda leaf: leaf + 0.3, variables)
        results[name] = model, params, variables
    return results


DENSE = "up|down|hidden|head"
TRANSFORMS = {
    "gptq": lambda: quantize.gptq("int4", where="up|hidden", solver={"sweeps": 0, "refit": False}),
    "adaround": lambda: quantize.adaround("int4", where=DENSE, method="descent"),
    "activations": lambda: chain(
        quantize.rtn("int8", where=DENSE), quantize.activations(method="percentile")
    ),
    "blockwise": lambda: quantize.blockwise("int4", where=DENSE, train=TrainOptions(steps=3)),
    "qat": lambda: quantize.qat("int4", where=DENSE, train=TrainOptions(steps=3, warmup=0.05)),
    "distill_scales": lambda: chain(
        quantize.rtn("int4", where=DENSE), quantize.distill_scales(train=TrainOptions(steps=3))
    ),
    "sparsegpt": lambda: prune.sparsegpt(0.5, where=DENSE),
    "wanda": lambda: prune.mask(0.5, score="wanda", where=DENSE),
    "taylor": lambda: prune.mask(0.5, score="taylor"),
    "sensitivity": lambda: prune.mask(0.5, score="sensitivity"),
    "measured": lambda: prune.mask(0.5, allocation="measured", levels=(0.3, 0.7)),
    "distill": lambda: chain(prune.magnitude(0.5), distill(alpha=0.5, train=TrainOptions(steps=3))),
}


# Scores from gradients have a test of their own below.
QUICK = {("gptq", "vit"), ("distill", "cnn")}


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_unless(QUICK.__contains__, itertools.product(TRANSFORMS, ("vit", "cnn"))),
)
def test_every_transform_reads_any_batch(models, name, kind):
    model, params, variables = models[kind]
    calibration = Calibration(data(), apply=apply, loss=loss, variables=variables)
    _, changed, report = TRANSFORMS[name]()(model, params, calibration, rng=jax.random.key(0))
    out = jax.jit(model.apply)({**variables, "params": changed}, data()[0]["images"])
    assert out.shape == (3, CLASSES)
    assert np.isfinite(out).all()
    assert report.rows
    messages = [row.action for row in report.rows]
    assert not any("looked up" in action or "no inputs" in action for action in messages)
    assert boxes.to_flat(changed)[0].keys() != boxes.to_flat(params)[0].keys() or name == "distill"


@pytest.mark.slow
def test_gptq_reads_what_the_function_runs(models):
    """The error at the output of a layer on its own inputs is below that of rounding to nearest."""
    model, params, variables = models["cnn"]
    batches = data(8)
    calibration = Calibration(batches, apply=apply, variables=variables)
    observed = [
        model.apply({**variables, "params": params}, batch["images"], capture_intermediates=True)[
            1
        ]["intermediates"]["norm"]["__call__"][0]
        for batch in batches
    ]
    inputs = np.concatenate([np.asarray(nn.relu(x)).mean(axis=(1, 2)) for x in observed])
    kernel = np.asarray(params["hidden"]["kernel"])

    def error(transform, **call):
        result = transform(model, params, **call)[1]["hidden"]["kernel"].unbox()
        return np.linalg.norm(inputs @ (np.asarray(result) - kernel))

    nearest = error(quantize.rtn("int3", where="hidden"))
    assert error(quantize.gptq("int3", where="hidden"), calibration=calibration) < 0.9 * nearest


@pytest.mark.slow
def test_a_loss_alone_runs_what_needs_no_logits(models):
    model, params, _ = models["vit"]
    calibration = Calibration(data(), loss=mean_loss)
    apart = Calibration(data(), apply=apply)
    transform = quantize.gptq("int4", where="up|down")
    _, one, _ = transform(model, params, calibration)
    _, other, _ = transform(model, params, apart)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    for transform in (
        distill(teacher=(model, params), train=TrainOptions(steps=1)),
        quantize.blockwise(train=TrainOptions(steps=1)),
    ):
        with pytest.raises(RecipeError, match="calibration has no apply="):
            transform(model, params, calibration)
    with pytest.raises(RecipeError, match="calibration has no loss="):
        prune.mask(0.5, score="taylor")(model, params, apart)
    with pytest.raises(RecipeError, match=r"no loss=; pass .* or alpha=1.0"):
        distill(teacher=(model, params), train=TrainOptions(steps=1))(model, params, apart)


@pytest.mark.slow
def test_losses_of_rows_and_their_mean_score_alike(models):
    model, params, variables = models["cnn"]
    results = [
        prune.scores_of(
            model,
            params,
            "sensitivity",
            where="hidden|head",
            calibration=Calibration(data(), loss=function, variables=variables),
        )
        for function in (loss, mean_loss)
    ]
    for path, scores in results[0].items():
        np.testing.assert_allclose(scores, results[1][path], rtol=1e-4, atol=1e-7)

    complete = jax.tree.map(lambda *parts: np.concatenate(parts), *data())

    @jax.jit
    def slope(params):
        return jax.grad(lambda p: mean_loss(model, {**variables, "params": p}, complete))(params)

    expected = np.abs(slope(params)["head"]["kernel"] * params["head"]["kernel"])
    np.testing.assert_allclose(results[0]["head/kernel"], expected, rtol=1e-4, atol=1e-7)


def test_taylor_takes_each_row_as_a_sample(models):
    model, params, _ = models["vit"]
    calibration = Calibration(data(2), loss=loss)
    result = prune.scores_of(model, params, "taylor", where="head", calibration=calibration)
    slope = jax.jit(jax.grad(lambda p, row: loss(model, {"params": p}, row).sum()))
    terms = []
    for batch in data(2):
        for row in range(3):
            single = {name: array[row : row + 1] for name, array in batch.items()}
            terms.append(np.abs(slope(params, single)["head"]["kernel"] * params["head"]["kernel"]))
    np.testing.assert_allclose(result["head/kernel"], np.mean(terms, axis=0), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_a_pruned_classifier_learns_from_the_dense_one(models):
    model, params, _ = models["vit"]
    calibration = Calibration(data(4, 8), apply=apply)
    recipe = chain(
        prune.magnitude(0.4), distill(alpha=1.0, train=TrainOptions(steps=40, learning_rate=0.003))
    )
    _, healed, report = recipe(model, params, calibration, rng=jax.random.key(0))
    assert report.curve[-1].soft < 0.5 * report.curve[0].soft
    assert 0.3 < float(1 - healed["head"]["kernel"].mask.mean()) < 0.5


def test_plans_of_a_classifier_fit(models):
    model, params, variables = models["cnn"]
    calibration = Calibration(data(), apply=apply, variables=variables)
    made = plan(model, params, boxes.stored_bytes(params) // 2, ("int8", "keep"), calibration)
    assert made.measured.keys() == {"batches"}
    assert made.measured_bytes <= boxes.stored_bytes(params) // 2
    assert made.recipe(model, params)[1]


def test_batches_without_tokens_ask_for_functions(models):
    model, params, _ = models["vit"]
    for transform in (
        quantize.gptq("int4"),
        prune.mask(0.5, score="taylor"),
        quantize.qat(where="head", train=TrainOptions(steps=1, warmup=0.05)),
        distill(teacher=(model, params), train=TrainOptions(steps=1)),
    ):
        with pytest.raises(DataError, match=r"Calibration\(batches, apply=\.\.\., loss=\.\.\.\)"):
            transform(model, params, data())


def bad(change):
    return lambda model, variables, batch: change(apply(model, variables, batch))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Calibration(iter(data())), DataError, "read only once"),
        (lambda: Calibration(data(), apply="logits"), DataError, "apply must be callable"),
        (lambda: Calibration(data(), variables={"params": {}}), DataError, "besides 'params'"),
        (lambda: Calibration([], apply=apply), DataError, "there are none"),
        (lambda: Calibration([{}], apply=apply), DataError, "contains no array"),
        (lambda: Calibration([{"a": "b"}], apply=apply), DataError, r"\['a'\] is not an array"),
        (
            lambda: Calibration(data(), apply=bad(lambda x: x.argmax(-1))),
            RecipeError,
            "must return a floating array of logits .*, not int32",
        ),
    ],
)
def test_functions_and_batches_that_do_not_fit(models, make, error, message):
    model, params, _ = models["vit"]
    with pytest.raises(error, match=message):
        quantize.blockwise(where="head", train=TrainOptions(steps=1))(model, params, make())


def test_a_loss_of_another_shape_is_refused(models):
    model, params, _ = models["vit"]
    calibration = Calibration(data(), loss=bad(lambda logits: logits))
    with pytest.raises(RecipeError, match=r"a scalar or one loss per row \[1\], not float32"):
        prune.mask(0.5, score="taylor")(model, params, calibration)


def test_digests_tell_functions_apart():
    results = {
        calibration_digest(Calibration(data(), **fields))
        for fields in (
            {"apply": apply},
            {"apply": loss},
            {"loss": loss},
            {"apply": lambda m, v, b: 1.0},
            {"apply": lambda m, v, b: 2.0},
            {"apply": apply, "variables": {"batch_stats": {"mean": np.ones(2)}}},
        )
    }
    assert len(results) == 6
    assert calibration_digest(Calibration(data(), apply=apply)) in results


def test_whole_variables_are_refused_by_name(models):
    model, params, variables = models["cnn"]
    complete = {**variables, "params": params}
    with pytest.raises(RecipeError, match=r"params and batch_stats.*variables\['params'\]"):
        quantize.gptq("int4")(model, complete, Calibration(data(), apply=apply))


def test_batches_that_can_be_read_once_are_refused(models):
    model, params, _ = models["vit"]
    with pytest.raises(DataError, match="read only once"):
        plan(model, params, 1000, ("int8",), iter(data()))


@pytest.mark.parametrize("name", ["apply", "loss"])
def test_functions_of_another_arity_are_refused(name):
    with pytest.raises(DataError, match=rf"{name}\(variables, batch\) must be callable as {name}"):
        Calibration(data(1), **{name: lambda variables, batch: None})
    Calibration(data(1), **{name: lambda model, variables, batch, train=False: None})
    Calibration(data(1), **{name: lambda *arguments: None})


@pytest.mark.parametrize(
    "transform", [quantize.gptq("int8"), prune.mask(0.5, score="taylor")], ids=str
)
def test_a_collection_that_is_missing_is_named(models, transform):
    model, params, _ = models["cnn"]
    calibration = Calibration(data(1), apply=apply, loss=loss)
    message = r"CNN reads the collection 'batch_stats'.*Calibration\(variables={'batch_stats': "
    with pytest.raises(DataError, match=message):
        transform(model, params, calibration)


def test_a_collection_that_is_written_is_named(models):
    model, params, variables = models["cnn"]

    def train(model, variables, batch):
        return model.apply(variables, batch["images"], train=True)

    calibration = Calibration(data(1), apply=train, variables=variables)
    with pytest.raises(DataError, match=r"CNN updates a collection.*use_running_average=True"):
        quantize.gptq("int8")(model, params, calibration)


def test_a_single_batch_in_place_of_a_list_is_named(models):
    model, params, _ = models["vit"]
    for wrong in (
        lambda: Calibration(data(1)[0], apply=apply),
        lambda: quantize.gptq("int8")(model, params, data(1)[0]),
        lambda: plan(model, params, 1000, calibration=data(1)[0]),
    ):
        with pytest.raises(DataError, match=r"not a single batch; pass \[batch\]"):
            wrong()
