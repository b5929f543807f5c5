"""Distillation: its loss, what trains, masks, and determinism."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import TrainOptions, batches, chain, distill, prune, quantize
from glm_edge.compress.batches import in_order
from glm_edge.compress.distill.distill import split
from glm_edge.compress.distill.loop import schedule
from glm_edge.compress.distill.losses import Objective, distillation_loss
from glm_edge.compress.distill.step import optimizer_of, train_step, without_shared
from glm_edge.compress.recipes import recipe_from_json, to_json
from glm_edge.errors import DataError, RecipeError, TrainingError
from tests.tiny_models import init


def arrays_of(params):
    return {name: np.asarray(array) for name, array in boxes.to_flat(params)[0].items()}


@pytest.fixture
def small(make_model):
    return make_model(num_layers=1)


@pytest.fixture(scope="module")
def pruned(make_model):
    return prune.structured(heads=0.25, neurons=0.5, score="magnitude")(*make_model(num_layers=1))[
        :2
    ]


mean_loss = jax.jit(batches.mean_loss, static_argnums=0)


def loss_loop(logits, targets, tokens, weights, temperature, alpha):
    def softmax(scores):
        exponent = np.exp(scores - scores.max())
        return exponent / exponent.sum()

    soft = hard = total = 0.0
    for b, t in np.ndindex(weights.shape):
        teacher = softmax(targets[b, t] / temperature)
        student = softmax(logits[b, t] / temperature)
        soft += weights[b, t] * temperature**2 * np.sum(teacher * np.log(teacher / student))
        hard -= weights[b, t] * np.log(softmax(logits[b, t])[tokens[b, t + 1]])
        total += weights[b, t]
    return alpha * soft / total + (1 - alpha) * hard / total, soft / total, hard / total


@functools.partial(jax.jit, static_argnums=4)
def loss_of(logits, targets, weights, tokens, objective):
    return distillation_loss(logits, targets, tokens, weights, objective)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.0, 0.9), (4.0, 0.0), (2.0, 1.0)])
def test_the_loss_matches_a_loop(temperature, alpha):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 2, 5, 7)) * 3
    tokens, weights = rng.integers(0, 7, (2, 5)), rng.random((2, 4))
    objective = Objective(temperature, alpha, weight_decay=0.0, clip_norm=1.0)
    arrays = (np.float32(x) for x in (logits, targets, weights))
    actual, parts = loss_of(*arrays, tokens, objective)
    expected = loss_loop(logits, targets, tokens, weights, temperature, alpha)
    np.testing.assert_allclose([actual, *parts], expected, rtol=1e-4)


def test_temperature_squared_keeps_the_gradients_scale():
    rng = np.random.default_rng(1)
    logits, targets = np.float32(rng.normal(size=(2, 1, 3, 50)))
    tokens, weights = np.zeros((1, 3), np.int32), np.ones((1, 2), np.float32)
    gradient = jax.jit(jax.grad(lambda *x: loss_of(*x)[0]), static_argnums=4)

    def size(temperature):
        objective = Objective(temperature, 1.0, weight_decay=0.0, clip_norm=1.0)
        return np.linalg.norm(gradient(logits, targets, weights, tokens, objective))

    assert 0.5 < size(8.0) / size(4.0) < 1.5


def test_a_pruned_student_comes_back_to_its_teacher(small, pruned, calibration):
    model, params = pruned
    transform = distill(teacher=small, alpha=1.0, train=TrainOptions(steps=40, learning_rate=0.003))
    same, healed, report = transform(model, params, calibration=calibration, rng=jax.random.key(0))
    assert same is model
    assert [point.step for point in report.curve] == list(range(1, 41))
    first, last = report.curve[0], np.mean([point.soft for point in report.curve[-4:]])
    assert last < 0.5 * first.soft
    assert report.curve[0].loss == pytest.approx(report.curve[0].soft, rel=1e-5)
    assert boxes.count(healed) == boxes.count(params)


def test_labels_alone_teach_the_task(small, calibration):
    model, params = small
    before = float(mean_loss(model, params, calibration[0]))
    other = jax.device_put(jax.device_get(params))
    transform = distill(
        teacher=(model, other), alpha=0.0, train=TrainOptions(steps=30, learning_rate=0.003)
    )
    _, trained, _ = transform(model, params, calibration=calibration)
    assert float(mean_loss(model, trained, calibration[0])) < 0.6 * before


def test_the_callers_arrays_survive(bigrams, calibration):
    model, params, teacher = bigrams
    before = jax.tree.map(np.copy, arrays_of(params))
    transform = distill(teacher=(model, teacher), train=TrainOptions(steps=2))
    transform(model, params, calibration=calibration)
    for name, array in arrays_of(params).items():
        np.testing.assert_array_equal(array, before[name])


def test_masks_and_quantized_weights_stay_while_the_rest_trains(calibration):
    model = nn.Sequential((nn.Embed(40, 8), nn.Dense(16), nn.Dense(40)))
    params = init(model, calibration[0]["tokens"])["params"]
    _, student, _ = prune.magnitude(0.5, where="layers_1")(model, params)
    _, student, _ = quantize.rtn("int4-g8", where="layers_2")(model, student)
    transform = distill(teacher=(model, params), train=TrainOptions(steps=3, weight_decay=0.1))
    _, trained, _ = transform(model, student, calibration=calibration)
    old, new = arrays_of(student), arrays_of(trained)
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert not any(name.endswith((".mask", ".data", ".scale")) for name in moved)
    assert moved == {
        "layers_0/embedding",
        "layers_1/kernel.value",
        "layers_1/bias",
        "layers_2/bias",
    }
    box = trained["layers_1"]["kernel"]
    assert np.all(np.asarray(boxes.dense(box))[~np.asarray(box.mask)] == 0.0)
    assert jax.tree.structure(trained) == jax.tree.structure(student)


def test_frozen_paths_do_not_move(bigrams, calibration):
    model, params, teacher = bigrams
    transform = distill(teacher=(model, teacher), where="^Den.*_0", train=TrainOptions(steps=2))
    _, trained, report = transform(model, params, calibration=calibration)
    old, new = arrays_of(params), arrays_of(trained)
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert moved == {"Dense_0/kernel", "Dense_0/bias"}
    assert report.rows[0].path == "2 arrays"
    with pytest.raises(RecipeError, match="where='vision' matches no parameter that can train"):
        distill(teacher=(model, teacher), where="vision")(model, params, calibration=calibration)


def test_an_encoder_that_is_shared_and_frozen_runs_once(make_model):
    model, params = make_model(vision=True, num_layers=1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(11, 40, (2, 8))
    tokens[:, 1:5] = 5
    batch = {"tokens": tokens, "images": rng.random((2, 8, 8, 3)).astype(np.float32)}
    smaller, shrunk, _ = prune.structured(neurons=0.5, score="magnitude")(model, params)

    def step(teacher_params):
        """Operations of a step, and what it trains."""
        trainable, frozen = split(shrunk, r"^(decoder|embed)/")
        objective = Objective(2.0, 0.9, weight_decay=0.0, clip_norm=1.0)
        # The step reuses its arguments' memory.
        trainable = jax.device_get(trainable)
        state = jax.jit(optimizer_of(objective).init)(trainable)
        teacher_params = without_shared(teacher_params, frozen)
        arguments = (trainable, state, np.float32(1e-3), frozen, teacher_params, batch)
        compiled = train_step.lower(smaller, model, objective, *arguments).compile()
        return compiled.cost_analysis()["flops"], compiled(*arguments)[0]

    tower = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode_images"))
    once = tower.lower(params, batch["images"]).compile().cost_analysis()["flops"]
    copied = {**params, "vision": jax.device_put(jax.device_get(params["vision"]))}
    (flops, one), (more_flops, other) = step(params), step(copied)
    assert more_flops - flops > 0.9 * once
    for name, array in arrays_of(one).items():
        np.testing.assert_allclose(array, arrays_of(other)[name], atol=1e-6)


def test_an_array_that_is_shared_and_frozen_stays_the_same(bigrams, calibration):
    model, student, teacher = bigrams
    student = {**student, "Embed_0": teacher["Embed_0"]}
    copied = jax.device_put(jax.device_get(teacher))
    one, other = (
        distill(teacher=(model, tree), where="^Dense", train=TrainOptions(steps=2))(
            model, student, calibration=calibration
        )[1]
        for tree in (teacher, copied)
    )
    for name, array in arrays_of(one).items():
        np.testing.assert_allclose(array, arrays_of(other)[name], atol=1e-6)
    assert one["Embed_0"]["embedding"] is teacher["Embed_0"]["embedding"]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(bigrams, calibration):
    model, params, teacher = bigrams

    def train(seed):
        transform = distill(teacher=(model, teacher), train=TrainOptions(steps=3))
        rng = jax.random.key(seed)
        return arrays_of(transform(model, params, calibration=calibration, rng=rng)[1])

    one, again, other = train(0), train(0), train(3)
    assert all(one[name].tobytes() == again[name].tobytes() for name in one)
    assert any(one[name].tobytes() != other[name].tobytes() for name in one)


def test_a_step_is_compiled_once_for_each_shape(bigrams, calibration):
    model, params, teacher = bigrams
    # An objective that no other test has.
    options = {"teacher": (model, teacher), "temperature": 1.25}
    before = train_step._cache_size()
    for steps in (2, 5):
        distill(train=TrainOptions(steps=steps), **options)(model, params, calibration=calibration)
    assert train_step._cache_size() == before + 1
    shorter = [{"tokens": batch["tokens"][:, :8]} for batch in calibration]
    distill(train=TrainOptions(steps=2), **options)(
        model, params, calibration=[calibration[0], shorter[0]]
    )
    assert train_step._cache_size() == before + 2


def products(model, params, batch):
    """How often a training step multiplies matrices of which types."""
    objective = Objective(2.0, 0.9, weight_decay=0.0, clip_norm=1.0)
    trainable, frozen = boxes.partition(params)
    state, rate = optimizer_of(objective).init(trainable), np.float32(1e-3)
    step = functools.partial(train_step, model, model, objective)

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield tuple(operand.aval.dtype.name for operand in equation.invars)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    jaxpr = jax.make_jaxpr(step)(trainable, state, rate, frozen, params, batch)
    return collections.Counter(walk(jaxpr.jaxpr))


def test_bfloat16_products_train_float32_parameters(small, pruned, calibration):
    model, params = pruned
    half = TrainOptions(steps=2, compute="bfloat16")
    transform = distill(teacher=small, alpha=1.0, train=half)
    same, trained, report = transform(model, params, calibration=calibration)
    assert same.compute == "float32"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))
    plain = distill(teacher=small, alpha=1.0, train=TrainOptions(steps=2))(
        model, params, calibration=calibration
    )[2]
    assert report.curve[0].loss == pytest.approx(plain.curve[0].loss, rel=0.05)
    assert report.curve[0].soft != plain.curve[0].soft
    half = products(model.clone(compute="bfloat16"), params, calibration[0])
    full = products(model, params, calibration[0])
    assert set(full) == {("float32", "float32")}
    # Of student and teacher the products with six matrices a layer and the embedding, and their
    # two gradients in the student; attention alone stays as it was.
    weights = 6 * model.config.decoder.num_layers + 1
    assert half["bfloat16", "bfloat16"] == (1 + 3) * weights
    assert half.total() == full.total()


def test_a_chain_teaches_with_the_model_it_was_given(small, calibration):
    model, params = small
    rng = jax.random.key(0)
    step = prune.structured(heads=0.25, neurons=0.5, score="magnitude")
    recipe = chain(step, distill(alpha=1.0, train=TrainOptions(steps=2)))
    _, actual, _ = recipe(model, params, calibration=calibration, rng=rng)
    smaller, shrunk, _ = step(model, params)
    explicit = distill(teacher=(model, params), alpha=1.0, train=TrainOptions(steps=2))
    _, expected, _ = explicit(
        smaller, shrunk, calibration=calibration, rng=jax.random.fold_in(rng, 1)
    )
    for name, array in arrays_of(actual).items():
        np.testing.assert_array_equal(array, arrays_of(expected)[name])


@pytest.mark.slow
def test_a_student_is_healed_after_pruning_and_after_rounding(small, calibration):
    model, params = small
    recipe = chain(
        prune.structured(heads=0.25, neurons=0.5, score="magnitude"),
        distill(alpha=1.0, train=TrainOptions(steps=20, learning_rate=0.003)),
        quantize.rtn("int3-g16", where="^decoder/"),
        distill(alpha=1.0, train=TrainOptions(steps=20, learning_rate=0.003)),
    )
    call = {"calibration": calibration, "rng": jax.random.key(0)}
    smaller, compressed, report = recipe(model, params, **call)
    first, second = report.curve[:20], report.curve[20:]
    assert [point.step for point in second] == list(range(1, 21))
    assert np.mean([point.soft for point in first[-4:]]) < 0.6 * first[0].soft
    assert np.mean([point.soft for point in second[-4:]]) < 0.8 * second[0].soft
    # Codes and scales are those that rounding left; embeddings and norms went on.
    rounded = chain(*recipe.transforms[:3])(model, params, **call)[1]
    old, new = arrays_of(rounded), arrays_of(compressed)
    assert jax.tree.structure(rounded) == jax.tree.structure(compressed)
    still = {name for name in old if np.array_equal(old[name], new[name])}
    assert still == {name for name in old if name.endswith((".data", ".scale"))}
    assert boxes.stored_bytes(compressed) < 0.5 * boxes.stored_bytes(params)
    assert smaller.config.decoder.neurons(0) == 64


def test_any_module_that_gives_logits_learns(calibration):
    class Bigram(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(40)(nn.Embed(40, 8)(tokens))

    model = Bigram()
    student, teacher = (init(model, calibration[0]["tokens"], seed=i)["params"] for i in range(2))
    transform = distill(
        teacher=(model, teacher), alpha=1.0, train=TrainOptions(steps=30, learning_rate=0.03)
    )
    _, _, report = transform(model, student, calibration=calibration)
    assert report.curve[-1].loss < 0.5 * report.curve[0].loss
    with pytest.raises(RecipeError, match="no field 'compute'"):
        distill(teacher=(model, teacher), train=TrainOptions(compute="bfloat16"))(
            model, student, calibration=calibration
        )


def test_a_classifier_has_no_next_token_to_learn(small, calibration):
    class First(nn.Module):
        """Predicts three classes, and does not say that it is a classifier."""

        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(3)(nn.Embed(40, 4)(tokens)[:, 0])

    model = First()
    params, other = (init(model, calibration[0]["tokens"], seed=i)["params"] for i in range(2))
    transform = distill(teacher=(model, other), train=TrainOptions(steps=1))
    expected = (
        r"distill: the student returns logits \[4, 3\] for tokens \[4, 12\]; .*for a classifier"
    )
    with pytest.raises(RecipeError, match=expected):
        transform(model, params, calibration=calibration)
    with pytest.raises(RecipeError, match=r"distill: the teacher returns logits \[4, 3\]"):
        transform(*small, calibration=calibration)
    with pytest.raises(RecipeError, match=r"the model returns logits \[4, 3\]"):
        mean_loss(model, params, calibration[0])


def test_each_batch_comes_once_before_any_comes_again():
    data = in_order(list(range(5)), jax.random.key(0))
    rounds = [[next(data) for _ in range(5)] for _ in range(3)]
    assert all(sorted(numbers) == list(range(5)) for numbers in rounds)
    assert rounds[0] != rounds[1]
    data = in_order(list(range(3)), None)
    assert [next(data) for _ in range(4)] == [0, 1, 2, 0]


def test_the_learning_rate_rises_and_falls():
    rates = schedule(100, 1e-3, 0.1)
    assert len(rates) == 100
    assert rates.argmax() == 9
    assert rates[9] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4)
    assert (np.diff(rates[9:]) < 0).all()
    assert len(schedule(1, 1e-3, 0.1)) == 1


def test_what_cannot_be_distilled_is_refused(small, pruned, calibration, make_model):
    model, params = pruned
    with pytest.raises(DataError, match="needs calibration="):
        distill(teacher=small)(model, params)
    with pytest.raises(DataError, match="read only once"):
        distill(teacher=small)(model, params, calibration=iter(calibration))
    with pytest.raises(RecipeError, match="its own teacher"):
        distill()(model, params, calibration=calibration)
    with pytest.raises(RecipeError, match="predicts 40 tokens, its teacher 41"):
        distill(teacher=make_model(vocab_size=41))(model, params, calibration=calibration)
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), small[1])
    with pytest.raises(RecipeError, match="loss is nan at step"):
        distill(teacher=(small[0], broken), train=TrainOptions(steps=2))(
            model, params, calibration=calibration
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": {"steps": 0}}, "steps must be a whole number"),
        ({"train": {"step": 1}}, "train has no option 'step'; known: steps"),
        ({"train": 3}, "train must be TrainOptions"),
        ({"temperature": 0.0}, "must be positive"),
        ({"alpha": 1.5}, "alpha must be in 0..1"),
        ({"train": {"compute": "int8"}}, "compute must be one of"),
        ({"teacher": 3}, "teacher must be"),
        ({"where": "("}, "not a regular expression"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        distill(**options)


class Bigram(nn.Module):
    """Predicts the next token from the last: compiles in no time."""

    width: int = 8

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(40)(nn.Embed(40, self.width)(tokens))


@pytest.fixture(scope="module")
def bigrams():
    """Student and teacher of one model."""
    model = Bigram()
    tokens = np.zeros((1, 2), np.int32)
    return model, *(init(model, tokens, seed=seed)["params"] for seed in range(2))


def test_accumulated_batches_are_one_big_batch(bigrams, calibration):
    model, student, teacher = bigrams
    rng = np.random.default_rng(0)
    weighed = [{**batch, "loss_mask": rng.random((4, 12))} for batch in calibration]
    joined = {name: np.concatenate([batch[name] for batch in weighed]) for name in weighed[0]}
    options = {"steps": 6, "learning_rate": 0.02}
    transform = distill((model, teacher), train=TrainOptions(**options))
    accumulating = distill((model, teacher), train=TrainOptions(accumulate=4, **options))
    _, actual, parts = accumulating(model, student, calibration=weighed)
    _, expected, complete = transform(model, student, calibration=[joined])
    _, other, _ = transform(model, student, calibration=weighed)
    for name, array in arrays_of(actual).items():
        np.testing.assert_allclose(array, arrays_of(expected)[name], rtol=1e-4, atol=1e-5)
    assert not np.allclose(arrays_of(actual)[name], arrays_of(other)[name], atol=1e-3)
    for one, all_at_once in zip(parts.curve, complete.curve, strict=True):
        assert one.loss == pytest.approx(all_at_once.loss, rel=1e-5)
        assert one.hard == pytest.approx(all_at_once.hard, rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_that_is_not_finite_stops_at_its_step(bigrams, calibration, accumulate):
    model, student, teacher = bigrams
    read = []

    class Poisoned:
        """The batches of steps 1 and 2 are sound, one of step 3 is not; no length, so in order."""

        def __iter__(self):
            for index in range(100):
                read.append(index)
                bad = index == 3 * accumulate - 1
                weights = np.full((4, 12), np.nan if bad else 1.0)
                yield {**calibration[index % 4], "loss_mask": weights}

    transform = distill((model, teacher), train=TrainOptions(steps=9, accumulate=accumulate))
    with pytest.raises(TrainingError, match="loss is nan at step 3") as caught:
        transform(model, student, calibration=Poisoned())
    assert caught.value.step == 3
    assert len(read) == 3 * accumulate
    healthy = arrays_of(caught.value.params)
    assert all(np.isfinite(array).all() for array in healthy.values())
    assert any(not np.array_equal(healthy[name], arrays_of(student)[name]) for name in healthy)


def test_a_gradient_that_is_not_finite_stops_too(calibration):
    class Root(nn.Module):
        """At zero the loss is finite and its derivative is not."""

        @nn.compact
        def __call__(self, tokens):
            scores = nn.Embed(40, 40)(tokens)
            return scores + jnp.sqrt(self.param("root", nn.initializers.zeros, ()))

    model = Root()
    params, other = (
        jax.jit(model.init)(jax.random.key(seed), calibration[0]["tokens"])["params"]
        for seed in (0, 1)
    )
    with pytest.raises(TrainingError, match=r"gradient's norm is (nan|inf) at step 1;") as caught:
        distill(teacher=(model, other), train=TrainOptions(steps=3))(
            model, params, calibration=calibration
        )
    for name, array in arrays_of(caught.value.params).items():
        np.testing.assert_array_equal(array, arrays_of(params)[name])


def test_the_options_of_the_loop_survive_json():
    transform = distill(train=TrainOptions(steps=3, accumulate=2))
    assert recipe_from_json(to_json(transform)) == transform
    with pytest.raises(RecipeError, match="accumulate must be a whole number"):
        distill(train=TrainOptions(accumulate=0))
