"""Sparsity over time: functions of the step, an optimizer that prunes, and rounds with training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_edge import params as boxes
from glm_edge.compress import TrainOptions, chain, prune, recipe_from_json, to_json
from glm_edge.compress.distill.state import StateDirectory
from glm_edge.errors import RecipeError


@pytest.fixture
def small(make_model):
    return make_model(num_layers=1)


def test_schedules_are_their_formulas():
    steps = np.arange(0, 140)
    cubic = prune.cubic(0.8, begin=10, end=110, initial=0.1)
    done = np.clip((steps - 10) / 100, 0, 1)
    expected = np.where(steps >= 10, 0.8 + (0.1 - 0.8) * (1 - done) ** 3, 0.0)
    np.testing.assert_allclose(jax.jit(jax.vmap(cubic))(steps), expected, atol=1e-6)
    once = jax.jit(jax.vmap(prune.one_shot(0.5, step=3)))(steps)
    np.testing.assert_allclose(once, np.where(steps >= 3, 0.5, 0.0))
    stairs = np.asarray(jax.jit(jax.vmap(prune.staircase(0.3, 10, 60, 0.05, 6)))(steps))
    assert not stairs[:10].any()
    for index in range(6):
        level = 0.05 * (index + 1)
        np.testing.assert_allclose(stairs[10 * (index + 1)], level, atol=1e-6)
        np.testing.assert_allclose(stairs[10 * (index + 1) + 9], level, atol=1e-6)
    np.testing.assert_allclose(stairs[60:], 0.3, atol=1e-6)


@pytest.fixture(scope="module")
def problem():
    """Least squares: parameters, and the gradient at any others."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(64, 16)), rng.normal(size=(64, 8))
    weights = {"a": {"weight": rng.normal(size=(8, 16))}, "b": {"bias": np.zeros(8)}}
    weights = jax.tree.map(jnp.float32, weights)

    @jax.jit
    def gradient(params):
        def loss(params):
            weight = boxes.dense(params["a"]["weight"])
            return jnp.mean(jnp.square(x @ weight.T + params["b"]["bias"] - target))

        return jax.grad(loss)(params)

    return weights, gradient


def train(optimizer, params, gradient, steps):
    """Yields `(parameters, state)` after each step."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@pytest.mark.parametrize("score", ["magnitude", "sensitivity"])
def test_masks_follow_the_schedule_and_masked_weights_stay_zero(problem, score):
    params, gradient = problem
    sparsity = prune.cubic(0.75, begin=5, end=25)
    optimizer = prune.scheduled(optax.adam(0.05), sparsity, score=score, every=5)
    before = np.ones((8, 16), bool)
    for step, (now, state) in enumerate(train(optimizer, params, gradient, 40)):
        keep = np.asarray(state.masks["a"]["weight"])
        assert state.masks["b"]["bias"] is None
        assert not np.any(keep & ~before)
        assert (~keep).sum() == round(float(sparsity(step - step % 5)) * 128)
        np.testing.assert_array_equal(np.asarray(now["a"]["weight"])[~keep], 0.0)
        before = keep
    assert (~keep).sum() == 96
    assert float(jnp.abs(now["b"]["bias"]).min()) > 0


def test_a_first_mask_takes_the_smallest_weights(problem):
    params, gradient = problem
    optimizer = prune.scheduled(optax.sgd(0.0), prune.one_shot(0.5))
    now, state = next(train(optimizer, params, gradient, 1))
    expected = prune.mask(0.5)(None, {"weight": params["a"]["weight"]})[1]["weight"]
    np.testing.assert_array_equal(state.masks["a"]["weight"], expected.mask)
    boxed = prune.boxed(now, state)
    np.testing.assert_array_equal(boxed["a"]["weight"].unbox(), expected.unbox())
    assert not boxes.is_box(boxed["b"]["bias"])


def test_without_sparsity_the_optimizer_is_its_own(problem):
    params, gradient = problem
    plain = list(train(optax.adam(0.01), params, gradient, 5))[-1][0]
    wrapped = prune.scheduled(optax.adam(0.01), prune.one_shot(0.5, step=100))
    results = list(train(wrapped, params, gradient, 5))[-1][0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), results, plain)


def test_a_spike_of_a_schedule_leaves_a_weight(problem):
    params, gradient = problem
    levels = jnp.float32([0, 0, 0, 1, 0, jnp.nan, 0])
    optimizer = prune.scheduled(optax.sgd(0.1), lambda step: levels[jnp.minimum(step, 6)], every=1)
    zeros = [
        int((~np.asarray(state.masks["a"]["weight"])).sum())
        for _, state in train(optimizer, params, gradient, 6)
    ]
    assert zeros == [0, 0, 0, 127, 127, 127]


@pytest.mark.parametrize(("shape", "units"), [("2:4", (32, 4)), ("channel", (8, 16))])
def test_shapes_are_kept_while_training(problem, shape, units):
    params, gradient = problem
    optimizer = prune.scheduled(optax.sgd(0.1), prune.one_shot(0.5), shape=shape)
    *_, (now, state) = train(optimizer, params, gradient, 3)
    keep = np.asarray(state.masks["a"]["weight"]).reshape(units)
    if shape == "2:4":
        assert set(keep.sum(1).tolist()) == {2}
    else:
        assert sorted(keep.sum(1).tolist()) == [0] * 4 + [16] * 4
    assert int((np.asarray(now["a"]["weight"]) == 0).sum()) == 64


def test_what_partition_gives_can_be_trained(problem):
    params, _ = problem
    _, masked, _ = prune.mask(0.25)(None, {"weight": params["a"]["weight"]})
    complete = {"a": masked, "b": params["b"]}
    trainable, frozen = boxes.partition(complete)
    optimizer = prune.scheduled(optax.sgd(0.1), prune.one_shot(0.5))

    @jax.jit
    def step(trainable, state):
        grads = jax.grad(
            lambda t: jnp.sum(jnp.square(boxes.dense(boxes.combine(t, frozen)["a"]["weight"])))
        )(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    trained, state = step(trainable, optimizer.init(trainable))
    trained = boxes.combine(trained, frozen)
    boxed = prune.boxed(trained, state)["a"]["weight"]
    assert bool(jnp.all(masked["weight"].mask | ~boxed.mask))
    assert int((~boxed.mask).sum()) == 64


def test_rounds_of_pruning_and_training_are_a_recipe(small, calibration):
    model, params = small
    recipe = prune.iterative(
        0.3,
        initial=0.1,
        rounds=3,
        where="layers/0/mlp",
        alpha=0.0,
        train=TrainOptions(steps=2, learning_rate=0.001),
    )
    assert recipe_from_json(to_json(recipe)) == recipe
    names = [step.name for step in recipe.transforms]
    assert names == ["prune.mask", "distill"] * 3
    levels = [step.sparsity for step in recipe.transforms[::2]]
    np.testing.assert_allclose(levels, [0.1, 0.2, 0.3])
    _, pruned, report = recipe(model, params, calibration, rng=jax.random.key(0))
    ratios = [row.keep_ratio for row in report.rows if row.transform == "prune.mask"]
    np.testing.assert_allclose(ratios, np.repeat([0.9, 0.8, 0.7], 2), atol=1e-3)
    assert len(report.curve) == 6
    rates = np.array([point.learning_rate for point in report.curve]).reshape(3, 2)
    assert np.all(rates[:, 0] == rates[0, 0])
    assert np.all(rates[:, 1] < rates[:, 0])
    box = pruned["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    np.testing.assert_array_equal(box.unbox()[~box.mask], 0.0)
    assert bool(
        jnp.any(box.unbox() != params["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"])
    )


def test_rounds_that_were_killed_go_on_to_the_same_bytes(small, calibration, tmp_path, monkeypatch):
    model, params = small

    def rounds(state_dir=None):
        recipe = prune.iterative(
            0.3,
            initial=0.1,
            rounds=3,
            where="layers/0/mlp",
            alpha=0.0,
            train=TrainOptions(steps=2, learning_rate=0.001, state_dir=state_dir, save_every=1),
        )
        assert recipe_from_json(to_json(recipe)) == recipe
        return recipe(model, params, calibration, rng=jax.random.key(0))

    saves, save = [], StateDirectory.save

    def counted(directory, *state):
        save(directory, *state)
        saves.append(directory.path.name)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateDirectory, "save", counted)
    with pytest.raises(KeyboardInterrupt):
        rounds(tmp_path)
    assert saves == ["round_1", "round_1", "round_2"]
    _, actual, report = rounds(str(tmp_path))
    assert saves[3:] == ["round_2", "round_3", "round_3"]
    _, expected, alone = rounds()
    assert report.curve == alone.curve
    leaves, others = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (actual, expected))
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (_, leaf), (_, other) in zip(leaves, others, strict=True):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def test_a_cubic_rise_has_large_steps_first():
    recipe = prune.iterative(0.8, initial=0.1, rounds=4, rise="cubic")
    levels = [step.sparsity for step in recipe.transforms[::2]]
    np.testing.assert_allclose(levels, 0.8 - 0.7 * np.array([1, 2 / 3, 1 / 3, 0]) ** 3, atol=1e-6)
    assert chain(recipe) == recipe


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: prune.one_shot(1.0), "one_shot: sparsity must be at least 0 and below 1"),
        (lambda: prune.cubic(1.2, 0, 10), "cubic: final must be at least 0 and below 1"),
        (lambda: prune.cubic(0.5, 10, 10), "begin must be below end"),
        (lambda: prune.staircase(0.3, 0, 10, rounds=1), "2 or more rounds"),
        (lambda: prune.staircase(0.3, 0, 10, initial=0.4), "sparsity must rise"),
        (lambda: prune.iterative(0.3, initial=0.3), "sparsity must rise"),
        (lambda: prune.iterative(1.0), "sparsity must be at least 0 and below 1"),
        (lambda: prune.iterative(0.3, rise="step"), "rise must be"),
        (lambda: prune.iterative(0.3, train=TrainOptions(steps=0)), "steps must be"),
        (lambda: prune.scheduled(optax.sgd(1), prune.one_shot(0.5), "wanda"), "score must be"),
        (lambda: prune.scheduled(optax.sgd(1), prune.one_shot(0.5), shape="head"), "score must be"),
        (lambda: prune.scheduled(optax.sgd(1), prune.one_shot(0.5), every=0), "every must be"),
        (lambda: prune.scheduled(optax.sgd(1), lambda step: 1.0), "gives 1 at step 0; it must be"),
        (lambda: prune.scheduled(optax.sgd(1), lambda step: step / 1000), "1.024 at step 1024"),
        (lambda: prune.scheduled(optax.sgd(1), lambda step: -0.1), "gives -0.1 at step 0"),
        (lambda: prune.scheduled(optax.sgd(1), lambda step: jnp.nan), "gives nan at step 0"),
    ],
)
def test_arguments_without_meaning_are_refused(build, message):
    with pytest.raises(RecipeError, match=message):
        build()


def test_what_does_not_fit_the_parameters_is_refused(problem):
    params, gradient = problem
    with pytest.raises(RecipeError, match="matches none"):
        prune.scheduled(optax.sgd(1.0), prune.one_shot(0.5), where="head").init(params)
    with pytest.raises(RecipeError, match="do not divide into groups of 3"):
        prune.scheduled(optax.sgd(1.0), prune.one_shot(0.5), shape="2:3").init(params)
    optimizer = prune.scheduled(optax.sgd(1.0), prune.one_shot(0.5))
    with pytest.raises(RecipeError, match="update needs params="):
        optimizer.update(gradient(params), optimizer.init(params))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.chain(optax.clip_by_global_norm(1.0), inner),
        lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
        lambda inner: optax.chain(optax.chain(inner)),
    ],
)
def test_masks_are_found_within_other_optimizers(problem, wrap):
    params, gradient = problem
    optimizer = wrap(prune.scheduled(optax.adamw(1e-2), prune.one_shot(0.5), every=1))
    *_, (trained, state) = train(optimizer, params, gradient, 4)
    weight = prune.boxed(trained, state)["a"]["weight"]
    assert float(weight.mask.mean()) == 0.5
    np.testing.assert_array_equal(weight.unbox(), trained["a"]["weight"])


def test_masks_that_a_later_transformation_undoes_are_refused(problem):
    params, gradient = problem
    inner = prune.scheduled(optax.adam(1e-2), prune.one_shot(0.5))
    optimizer = optax.chain(inner, optax.add_decayed_weights(0.1))
    state = optimizer.init(params)
    updates, state = optimizer.update(gradient(params), state, params)
    after = optax.apply_updates(params, updates)
    message = "masked weights are not zero after its update; put transformations that follow it"
    with pytest.raises(RecipeError, match=message):
        prune.boxed(after, state)
    with pytest.raises(RecipeError, match=message):
        optimizer.update(gradient(after), state, after)

    def jitted():
        jax.block_until_ready(jax.jit(optimizer.update)(gradient(after), state, after))
        jax.effects_barrier()

    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jitted()


def test_states_without_one_set_of_masks_are_refused(problem):
    params, _ = problem
    pruning = prune.scheduled(optax.sgd(1.0), prune.one_shot(0.5))
    for optimizer, count in ((optax.adam(1e-3), 0), (optax.chain(pruning, pruning), 2)):
        with pytest.raises(RecipeError, match=f"one prune.scheduled, not of {count}"):
            prune.boxed(params, optimizer.init(params))


def test_attention_is_scheduled_along_its_inputs():
    params = {"query": {"kernel": jnp.arange(1.0, 65).reshape(8, 2, 4), "bias": jnp.ones((2, 4))}}
    optimizer = prune.scheduled(optax.sgd(0.0), prune.one_shot(0.5), shape="2:4")
    updates, state = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    keep = prune.boxed(optax.apply_updates(params, updates), state)["query"]["kernel"].mask
    np.testing.assert_array_equal(keep[:, 0, 0], [False, False, True, True] * 2)
    bare = {"query": {"kernel": params["query"]["kernel"]}}
    with pytest.raises(RecipeError, match=r"query/kernel \[8, 2, 4\]: its shape does not define"):
        optimizer.init(bare)
