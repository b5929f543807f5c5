"""What a student learns from inside a teacher of another depth, width and vocabulary."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import IntermediateLosses, TrainOptions, distill
from glm_edge.compress.distill.intermediates import (
    PROJECTION_KEY,
    attention_loss,
    hidden_loss,
    run_with_intermediates,
    uniform,
)
from glm_edge.compress.recipes import recipe_from_json, to_json
from glm_edge.errors import RecipeError
from tests.tiny_models import init

VOCAB, ROWS, LENGTH = 12, 3, 6


class Mixer(nn.Module):
    """Layers of attention that return and sow as the models here do; compiles in no time."""

    depth: int
    width: int
    heads: int
    vocab: int = VOCAB

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocab, self.width, name="embed")(tokens)
        observed = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))
        hidden = [x]
        for index in range(self.depth):
            x = x + Head(self.heads, name=f"layer_{index}")(x, observed)
            hidden.append(x)
        return nn.Dense(self.vocab, name="head")(x), {"hidden": hidden}


class Head(nn.Module):
    """Attention with `heads` heads."""

    heads: int

    @nn.compact
    def __call__(self, x, observed):
        # A bias of keys would shift all scores of a query: no gradient but rounding.
        query = nn.DenseGeneral((self.heads, 4), name="q")(x)
        key = nn.DenseGeneral((self.heads, 4), use_bias=False, name="k")(x)
        scores = jnp.where(observed, jnp.einsum("btnh,bsnh->bnts", query, key), -1e9)
        weights = jax.nn.softmax(scores)
        if self.is_mutable_collection("attention") and not self.is_initializing():
            self.sow("attention", "weights", weights[:, :, None])
        mixed = jnp.einsum("bnts,bsd->btnd", weights, x)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(mixed)


def built(seed, **fields):
    model = Mixer(**{"depth": 1, "width": 8, "heads": 2, **fields})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32)

    return model, jax.tree.map(draw, shapes)


inside = jax.jit(run_with_intermediates, static_argnums=(0, 3, 4))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32) for _ in range(3)]
    return [{"tokens": part, "loss_mask": rng.random((ROWS, LENGTH))} for part in tokens]


def train(student, teacher, data, **options):
    model, params = student
    names = [field.name for field in dataclasses.fields(TrainOptions)]
    training = {"steps": 1} | {name: options.pop(name) for name in names if name in options}
    options = {"temperature": 1.0, **options}
    names = [field.name for field in dataclasses.fields(IntermediateLosses)]
    inside = {name: options.pop(name) for name in names if name in options}
    if inside:
        options["intermediates"] = IntermediateLosses(**inside)
    transform = distill(teacher=teacher, train=TrainOptions(**training), **options)
    return transform(model, params, calibration=data, rng=jax.random.key(0))[1:]


def test_layers_are_spaced_evenly():
    assert uniform(3, 3) == (0, 1, 2)
    assert uniform(2, 4) == (1, 3)
    assert uniform(3, 7) == (2, 4, 6)
    assert uniform(4, 2) == (0, 0, 1, 1)


def test_the_losses_match_loops():
    rng = np.random.default_rng(1)
    weights = rng.random((2, 3))
    student = [rng.normal(size=(2, 4, 5)) for _ in range(2)]
    teacher = [rng.normal(size=(2, 4, 7)) for _ in range(4)]
    projection = rng.normal(size=(5, 7))
    actual = jax.jit(hidden_loss)(student, teacher, None, weights, projection)
    expected = 0.0
    for mine, its in ((0, 1), (1, 3)):
        for b, t in np.ndindex(2, 3):
            there = teacher[its][b, t]
            distance = student[mine][b, t] @ projection - there
            expected += weights[b, t] * (distance @ distance) / (there @ there) / 2
    np.testing.assert_allclose(actual, expected / weights.sum(), rtol=1e-5)

    student, teacher = (rng.dirichlet(np.ones(4), size=(2, heads, 4)) for heads in (3, 3))
    actual = attention_loss([student], [teacher, teacher[::-1]], (0,), weights)
    expected = 0.0
    for b, n, t in np.ndindex(2, 3, 3):
        there, current = teacher[b, n, t], student[b, n, t]
        expected += weights[b, t] * np.sum(there * np.log(there / current)) / 3
    np.testing.assert_allclose(actual, expected / weights.sum(), rtol=1e-5)
    halved = attention_loss([student[:, :1]], [teacher], None, weights)
    mean = attention_loss([student[:, :1]], [teacher.mean(1, keepdims=True)], None, weights)
    np.testing.assert_allclose(halved, mean, rtol=1e-5)


@pytest.mark.slow
def test_a_student_learns_from_layers_of_a_deeper_wider_teacher(data):
    student = built(0, depth=2)
    teacher = built(1, depth=4, width=12, heads=3)
    options = {"steps": 60, "learning_rate": 0.02, "hidden": 1.0, "attention": 1.0}
    trained, report = train(student, teacher, data, **options)
    first, last = report.curve[0], report.curve[-1]
    assert last.hidden < 0.5 * first.hidden
    assert last.attention < 0.5 * first.attention
    expected = 0.9 * first.soft + 0.1 * first.hard + first.hidden + first.attention
    assert first.loss == pytest.approx(expected, rel=1e-5)
    assert jax.tree.structure(trained) == jax.tree.structure(student[1])
    assert PROJECTION_KEY not in trained
    again, _ = train(student, teacher, data, **options)
    for one, other in zip(jax.tree.leaves(trained), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_equal_teacher_has_nothing_to_transfer(data):
    model, params = built(0)
    teacher = (model, jax.device_put(jax.device_get(params)))
    _, report = train((model, params), teacher, data, hidden=2.0, attention=1.0, alpha=1.0)
    assert report.curve[0].hidden == pytest.approx(0.0, abs=1e-9)
    assert report.curve[0].attention == pytest.approx(0.0, abs=1e-6)


def test_the_map_of_layers_is_used(data):
    model, params = built(0, depth=2)
    shuffled = (model, jax.device_put(jax.device_get(params)))
    _, report = train((model, params), shuffled, data, hidden=1.0, layers=[1, 0])
    logits, _ = inside(model, params, data[0], True, False)
    assert logits.shape == (ROWS, LENGTH, VOCAB)
    # The order of batches follows from the key, so any of the three may come first.
    loss = jax.jit(lambda mine, its, weights: hidden_loss(mine, its, None, weights, None))
    losses = []
    for batch in data:
        hidden = inside(model, params, batch, True, False)[1].hidden
        losses.append(float(loss(hidden, hidden[::-1], batch["loss_mask"][:, :-1])))
    assert min(abs(report.curve[0].hidden / loss - 1.0) for loss in losses) < 1e-5


@pytest.mark.slow
def test_accumulated_transfer_is_that_of_one_big_batch(data):
    joined = [{name: np.concatenate([batch[name] for batch in data]) for name in data[0]}]
    student, teacher = built(0), built(1, depth=2, width=12)
    options = {"hidden": 1.0, "attention": 1.0, "steps": 4}
    one, parts = train(student, teacher, data, accumulate=3, **options)
    other, complete = train(student, teacher, joined, **options)
    for part, result in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(part, result, rtol=1e-3, atol=1e-5)
    assert parts.curve[-1].hidden == pytest.approx(complete.curve[-1].hidden, rel=1e-5)
    assert parts.curve[-1].attention == pytest.approx(complete.curve[-1].attention, rel=1e-5)


def test_the_projection_survives_an_interruption(data, tmp_path):
    student, teacher = built(0), built(1, width=12)
    training = TrainOptions(steps=7, save_every=2, state_dir=tmp_path / "state")
    intermediates = IntermediateLosses(hidden=1.0)
    transform = distill(teacher=teacher, intermediates=intermediates, train=training)

    def stop(*_):
        raise KeyboardInterrupt

    call = {"calibration": data, "rng": jax.random.key(0)}
    with pytest.raises(KeyboardInterrupt):
        transform(*student, **call, progress=stop)
    resumed = transform(*student, **call)
    transform = dataclasses.replace(transform, train=TrainOptions(steps=7))
    expected = transform(*student, **call)
    for one, other in zip(jax.tree.leaves(resumed[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert resumed[2].curve == expected[2].curve
    assert (
        (tmp_path / "state" / "curve.csv")
        .read_text()
        .startswith("step,loss,soft,hard,learning_rate,hidden,attention\n")
    )


def test_a_glm_learns_from_the_layers_of_a_wider_one(make_model, calibration):
    model, params = make_model(num_layers=1)
    teacher = make_model(num_layers=1, hidden_size=48)
    transform = distill(
        teacher=teacher,
        intermediates=IntermediateLosses(hidden=1.0, attention=1.0),
        train=TrainOptions(steps=12, learning_rate=0.005),
    )
    _, trained, report = transform(model, params, calibration=calibration)
    assert report.curve[-1].hidden < report.curve[0].hidden
    assert report.curve[-1].attention < report.curve[0].attention
    assert boxes.count(trained) == boxes.count(params)


def test_a_map_of_tokens_asks_the_teacher_about_no_others(data):
    rng = np.random.default_rng(3)
    retained = rng.permutation(30)[:VOCAB]
    teacher_model, teacher = built(1, vocab=30)
    sliced = jax.device_get(teacher)
    sliced["embed"]["embedding"] = sliced["embed"]["embedding"][retained]
    sliced["head"] = {
        "kernel": sliced["head"]["kernel"][:, retained],
        "bias": sliced["head"]["bias"][retained],
    }
    same = (built(0)[0], jax.device_put(sliced))
    _, report = train(same, (teacher_model, teacher), data, vocabulary=retained)
    assert report.curve[0].soft == pytest.approx(0.0, abs=1e-6)

    student = built(0)
    options = {"steps": 5, "learning_rate": 0.01}
    mapped, _ = train(student, (teacher_model, teacher), data, vocabulary=retained, **options)
    expected, _ = train(student, same, data, **options)
    for one, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_maps_that_do_not_fit_are_refused(data):
    student, teacher = built(0, depth=2), built(1, depth=2, vocab=30)
    with pytest.raises(RecipeError, match="predicts 12 tokens, its teacher 30; give the teacher's"):
        train(student, teacher, data)
    with pytest.raises(RecipeError, match="holds 11 ids up to 10; it must name one of the teach"):
        train(student, teacher, data, vocabulary=range(11))
    with pytest.raises(RecipeError, match="holds 12 ids up to 30"):
        train(student, teacher, data, vocabulary=[*range(11), 30])
    with pytest.raises(RecipeError, match="must name one of the teacher's 2 layers"):
        train(student, built(1, depth=2), data, hidden=1.0, layers=[0, 2])
    with pytest.raises(RecipeError, match="must name one of the teacher's 2 layers"):
        train(student, built(1, depth=2), data, attention=1.0, layers=[1])


def test_a_model_that_shows_nothing_inside_is_refused(data):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(VOCAB)(nn.Embed(VOCAB, 4)(tokens))

    model = Plain()
    teacher = model, init(model, data[0]["tokens"])["params"]
    with pytest.raises(RecipeError, match="Plain returns no 'hidden'"):
        train(built(0), teacher, data, hidden=1.0)
    with pytest.raises(RecipeError, match="Plain sows no 'attention'"):
        train(built(0), teacher, data, attention=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intermediates": {"hidden": -1.0}}, "must not be negative"),
        ({"intermediates": {"hidden": float("inf")}}, "hidden must be finite"),
        ({"intermediates": {"attention": float("nan")}}, "attention must be finite"),
        ({"intermediates": {"layers": [0, 1]}}, "needs hidden= or attention= above zero"),
        ({"intermediates": {"hidden": 1.0, "layers": [0.5]}}, "layers must be whole numbers"),
        ({"intermediates": {"hiden": 1.0}}, "intermediates has no option 'hiden'; known: hidden"),
        ({"vocabulary": []}, "vocabulary must be whole numbers"),
        ({"vocabulary": [-1, 2]}, "none negative"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        distill(**options)


def test_maps_survive_json():
    intermediates = IntermediateLosses(hidden=0.5, attention=2.0, layers=[0, 2])
    transform = distill(intermediates=intermediates, vocabulary=np.arange(4))
    assert recipe_from_json(to_json(transform)) == transform
