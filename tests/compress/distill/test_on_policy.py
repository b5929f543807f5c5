"""Batches that a student goes on with itself."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import OnPolicy, TrainOptions, batches, distill
from glm_edge.compress.distill import on_policy
from glm_edge.compress.distill.losses import divergence
from glm_edge.compress.recipes import recipe_from_json, to_json
from glm_edge.errors import DataError, RecipeError
from glm_edge.generate import generate
from tests.tiny_models import init


@pytest.fixture(scope="module")
def texts(make_shallow):
    """A model that reads and writes text only."""
    model, params = make_shallow("tied")
    only = dataclasses.replace(model.config, image_token_id=None, audio_token_id=None)
    return model.clone(config=only), params


apply = jax.jit(batches.apply_batch, static_argnums=0)


def write(model, params, batch, prompt=None, temperature=0.0, number=0):
    batch, parts = batches.to_device(model, batch), boxes.partition(params)
    written = on_policy.written(model, *parts, batch, prompt, temperature, None, number)
    return written, np.asarray(written["tokens"]), np.asarray(written["loss_mask"])


def test_the_likeliest_tokens_are_those_of_generate(texts):
    model, params = texts
    tokens = np.random.default_rng(0).integers(12, 48, (6, 30)).astype(np.int32)
    expected = np.array(generate(model, params, tokens[:, :20], max_new_tokens=10).tokens)
    stop = int(expected[0, 3])
    stopping = model.clone(config=dataclasses.replace(model.config, eos_token_ids=(stop,)))
    lengths = np.full(6, 10)
    for row, actual in enumerate(expected):
        if stop in actual:
            lengths[row] = 1 + np.argmax(actual == stop)
            actual[lengths[row] :] = stop
    assert lengths.min() < 10
    _, actual, weights = write(stopping, params, {"tokens": tokens}, prompt=20)
    np.testing.assert_array_equal(actual[:, :20], tokens[:, :20])
    np.testing.assert_array_equal(actual[:, 20:], expected)
    # The stop token is taught too, and nothing after it.
    taught = (np.arange(30) >= 19) & (np.arange(30) < 19 + lengths[:, None])
    np.testing.assert_array_equal(weights, taught)


@pytest.mark.parametrize("name", ["sandwich", pytest.param("nano", marks=pytest.mark.slow)])
def test_prompts_of_any_length_and_kind_are_gone_on_with(make_shallow, batch_of, name):
    model, params = make_shallow(name)
    batch = batch_of(model, rows=3)
    starts = np.array([18, 21, 23])
    batch["loss_mask"] = (np.arange(24) >= starts[:, None] - 1).astype(np.float32)
    written, tokens, weights = write(model, params, batch)
    np.testing.assert_array_equal(weights[:, :-1], batch["loss_mask"][:, :-1])
    logits = np.array(apply(model, params, written))
    logits[..., [model.config.image_token_id, model.config.audio_token_id]] = -np.inf
    for row, start in enumerate(starts):
        np.testing.assert_array_equal(tokens[row, :start], batch["tokens"][row, :start])
        best = logits[row, start - 1 : -1].argmax(axis=-1)
        np.testing.assert_array_equal(tokens[row, start:], best)


def test_placeholders_stay(make_member, batch_of):
    model, _ = make_member("nano")
    batch = batch_of(model, rows=2)
    last = np.flatnonzero(batch["tokens"][0] == model.config.audio_token_id)[-1]
    assert on_policy.first_written(model, batch, 2).tolist() == [last + 1] * 2
    batch["tokens"][1, 12:] = 20
    first = on_policy.first_written(model, batch, None)
    assert first[0] == last + 1
    assert first[1] == 1 + np.flatnonzero(batch["tokens"][1] == model.config.image_token_id)[-1]


def test_tokens_are_drawn_as_often_as_the_student_says(texts):
    model, params = texts
    rows = 3000
    batch = {"tokens": np.tile(np.int32([[20, 30, 25, 21]]), (rows, 1))}
    scores = np.float64(apply(model, params, {"tokens": batch["tokens"][:1]})[0, 2]) / 2.0
    expected = np.exp(scores) / np.exp(scores).sum()
    _, tokens, _ = write(model, params, batch, prompt=3, temperature=2.0)
    actual = np.bincount(tokens[:, 3], minlength=48) / rows
    assert np.all(np.abs(actual - expected) <= 5 * np.sqrt(expected * (1 - expected) / rows))
    _, again, _ = write(model, params, batch, prompt=3, temperature=2.0)
    _, other, _ = write(model, params, batch, prompt=3, temperature=2.0, number=1)
    np.testing.assert_array_equal(tokens, again)
    assert not np.array_equal(tokens, other)


def test_divergences_match_loops():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(7), size=(2, 3))
    for beta in (0.0, 0.3, 1.0):
        middle = beta * p + (1 - beta) * q
        expected = beta * np.sum(p * np.log(p / middle), -1)
        expected += (1 - beta) * np.sum(q * np.log(q / middle), -1)
        if beta in (0.0, 1.0):
            one, other = (p, q) if beta == 0.0 else (q, p)
            expected = np.sum(one * np.log(one / other), -1)
        actual = divergence(jnp.log(p), jnp.log(q), beta)
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def pair(make_model):
    """Student and teacher of one small model."""
    model, teacher = make_model(num_layers=1)
    student = jax.tree.map(
        lambda leaf: leaf + np.float32(0.05 * np.sin(np.arange(leaf.size))).reshape(leaf.shape),
        jax.device_get(teacher),
    )
    return model, student, teacher


OPTIONS = {
    "on_policy": OnPolicy(share=0.5, prompt=4),
    "beta": 1.0,
    "temperature": 1.0,
    "alpha": 0.5,
}


def test_a_student_learns_from_what_it_says_itself(pair, calibration):
    model, student, teacher = pair
    transform = distill(
        (model, teacher), train=TrainOptions(steps=30, learning_rate=0.003), **OPTIONS
    )
    _, _, report = transform(model, student, calibration=calibration, rng=jax.random.key(0))
    local = [on_policy.is_written(0.5, jax.random.key(0), number) for number in range(30)]
    assert 5 < sum(local) < 25
    for point, is_own in zip(report.curve, local, strict=True):
        share = 1.0 if is_own else 0.5
        expected = share * point.soft + (1 - share) * point.hard
        assert point.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_what_a_student_says_teaches_it_the_teachers_view(pair, calibration):
    model, student, teacher = pair
    # Labels that the teacher does not agree with would pull the other way.
    alone = {**OPTIONS, "on_policy": OnPolicy(prompt=4), "alpha": 1.0}
    transform = distill(
        (model, teacher), train=TrainOptions(steps=40, learning_rate=0.003), **alone
    )
    _, _, report = transform(model, student, calibration=calibration, rng=jax.random.key(0))
    losses = [point.soft for point in report.curve]
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])


def test_it_goes_on_after_a_kill_as_if_left_alone(pair, calibration, tmp_path):
    model, student, teacher = pair
    call = {"calibration": calibration, "rng": jax.random.key(1)}

    def stop(*_):
        raise KeyboardInterrupt

    training = TrainOptions(steps=6, save_every=2)
    expected = distill((model, teacher), train=training, **OPTIONS)(model, student, **call)
    training = TrainOptions(steps=6, save_every=2, state_dir=tmp_path / "state")
    interrupted = distill((model, teacher), train=training, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, student, **call, progress=stop)
    actual = interrupted(model, student, **call)
    assert actual[2].curve == expected[2].curve
    for one, other in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_array_equal(one, other)


class Plain(nn.Module):
    """Gives logits and has no cache."""

    @nn.compact
    def __call__(self, tokens):
        return nn.Embed(40, 40)(tokens)


def test_what_cannot_be_gone_on_with_is_refused(pair, calibration):
    model, student, teacher = pair
    plain = Plain()
    params = init(plain, calibration[0]["tokens"])["params"]
    with pytest.raises(RecipeError, match="needs a model that generates, a GLM; Plain has no"):
        distill((model, teacher), on_policy=OnPolicy(), train=TrainOptions(steps=1))(
            plain, params, calibration=calibration
        )
    transform = distill(
        (model, teacher), on_policy=OnPolicy(prompt=12), train=TrainOptions(steps=1)
    )
    with pytest.raises(DataError, match="prompts fill all 12 tokens"):
        transform(model, student, calibration=calibration)
    masked = [{**calibration[0], "mask": np.ones((4, 1, 12, 12), bool)}]
    with pytest.raises(DataError, match="cannot continue a batch that holds 'mask'"):
        transform(model, student, calibration=masked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_policy": {"share": 1.5}}, "share must be above 0 and at most 1, not 1.5"),
        ({"on_policy": {"share": 0.0}}, "share must be above 0 and at most 1, not 0.0"),
        ({"beta": -0.1}, r"beta must be in 0\.\.1"),
        ({"on_policy": {"prompt": 0}}, "prompt must be a whole number"),
        ({"on_policy": 0.5}, r"on_policy must be OnPolicy\(share=…\), not 0.5"),
        ({"on_policy": {"temperature": float("nan")}}, "temperature must be finite"),
        ({"on_policy": {"temperature": -1.0}}, "temperature must not be negative"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        distill(**options)


def test_options_survive_json():
    transform = distill(on_policy=OnPolicy(share=0.5, prompt=8, temperature=0.7), beta=1.0)
    assert recipe_from_json(to_json(transform)) == transform
