"""Batches of several kinds in stated proportion."""

import collections
import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge.compress import TrainOptions, distill
from glm_edge.compress.batches import in_proportion
from glm_edge.compress.recipes import recipe_from_json, to_json
from glm_edge.errors import DataError, RecipeError


class Senses(nn.Module):
    """Predicts from the last token and from the sum of what it sees and hears."""

    @nn.compact
    def __call__(self, tokens, images=None, audio=None):
        logits = nn.Embed(6, 6, name="tokens")(tokens)
        for name, array in (("images", images), ("audio", audio)):
            weight = self.param(name, nn.initializers.ones, (6,))
            if array is not None:
                logits += weight * jnp.sum(array)
        return logits


MIXTURE = {"text": 0.5, "images": 0.3, "audio": 0.2}


def data():
    """Three batches of text, two of images and one of audio, numbered by their tokens."""
    kinds = ["text", "images", "text", "audio", "images", "text"]
    results = []
    for number, kind in enumerate(kinds):
        batch = {"tokens": np.full((1, 3), number)}
        results.append(batch if kind == "text" else {**batch, kind: np.zeros((1, 2, 2, 1))})
    return results


def numbers(count, skip=0, rng=None, mixture=MIXTURE):
    order = in_proportion(data(), mixture, rng, skip)
    return [int(batch["tokens"][0, 0]) for batch in itertools.islice(order, count)]


KIND = {0: "text", 2: "text", 5: "text", 1: "images", 4: "images", 3: "audio"}


@pytest.mark.parametrize("rng", [None, jax.random.key(1)])
def test_each_kind_has_its_share_at_any_time(rng):
    result = numbers(200, rng=rng)
    counts = collections.Counter()
    for done, number in enumerate(result, start=1):
        counts[KIND[number]] += 1
        for kind, share in MIXTURE.items():
            assert abs(counts[kind] - share * done) < 1.0 + 1e-6
    assert counts == {"text": 100, "images": 60, "audio": 40}


def test_each_batch_of_a_kind_comes_once_before_any_comes_again():
    results = [number for number in numbers(60, rng=jax.random.key(0)) if KIND[number] == "text"]
    rounds = [tuple(results[first : first + 3]) for first in range(0, 30, 3)]
    assert all(sorted(numbers) == [0, 2, 5] for numbers in rounds)
    assert len(set(rounds)) > 1


def test_skipping_goes_on_where_an_earlier_run_was():
    complete = numbers(50, rng=jax.random.key(2))
    for skip in (1, 7, 31):
        assert numbers(50 - skip, skip, jax.random.key(2)) == complete[skip:]
    assert numbers(50, rng=jax.random.key(2)) == complete
    assert numbers(50, rng=jax.random.key(3)) != complete


def test_shares_have_any_unit_and_other_kinds_are_left_out():
    assert numbers(20, mixture={"text": 5, "images": 3, "audio": 2}) == numbers(20)
    assert {KIND[number] for number in numbers(20, mixture={"text": 1, "audio": 1})} == {
        "text",
        "audio",
    }


def test_mixtures_without_a_meaning_are_refused():
    transform = distill(mixture=MIXTURE)
    assert recipe_from_json(to_json(transform)) == transform
    with pytest.raises(RecipeError, match=r"positive shares of text, images, audio, not 0.0 of"):
        distill(mixture={"text": 0.0})
    with pytest.raises(RecipeError, match="of 'video'"):
        distill(mixture={"video": 1.0})
    with pytest.raises(RecipeError, match="names no kind"):
        distill(mixture={})
    with pytest.raises(RecipeError, match="must hold shares by kind"):
        distill(mixture=3)
    with pytest.raises(DataError, match="includes audio, but no calibration batch"):
        next(in_proportion(data()[:3], MIXTURE, None))
    with pytest.raises(DataError, match="needs calibration with a length"):
        next(in_proportion(iter(data()), MIXTURE, None))


def test_a_mixture_goes_on_after_a_kill_as_if_left_alone(tmp_path):
    model, read = Senses(), []
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    student, teacher = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
        for _ in range(2)
    )

    class Counted(list):
        def __getitem__(self, index):
            read.append(KIND[index])
            return super().__getitem__(index)

    batches = Counted(
        {name: array + (name != "tokens") for name, array in batch.items()} for batch in data()
    )
    call = {"calibration": batches, "rng": jax.random.key(0)}
    options = {"steps": 10, "save_every": 3, "accumulate": 2}
    transform = distill((model, teacher), mixture=MIXTURE, train=TrainOptions(**options))
    _, expected, complete = transform(model, student, **call)
    assert collections.Counter(read[-20:]) == {"text": 10, "images": 6, "audio": 4}

    def stop(*_):
        raise KeyboardInterrupt

    transform = dataclasses.replace(transform, train=TrainOptions(state_dir=tmp_path, **options))
    with pytest.raises(KeyboardInterrupt):
        transform(model, student, **call, progress=stop)
    _, actual, report = transform(model, student, **call)
    assert report.curve == complete.curve
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_glm_learns_from_text_images_and_speech(make_member, batch_of):
    model, teacher = make_member("nano")
    config, read, original = model.config, [], []
    senses = {"images": config.image_token_id, "audio": config.audio_token_id}
    for seed in range(6):
        complete = batch_of(model, rows=4, seed=seed)
        for kind in MIXTURE:
            tokens = complete["tokens"]
            for sense, placeholder in senses.items():
                tokens = np.where((tokens == placeholder) & (sense != kind), 10, tokens)
            original.append(
                {"tokens": tokens, **({kind: complete[kind]} if kind in senses else {})}
            )

    def kind_of(batch):
        return next((kind for kind in senses if kind in batch), "text")

    class Counted(list):
        def __getitem__(self, index):
            read.append(kind_of(super().__getitem__(index)))
            return super().__getitem__(index)

    rng = np.random.default_rng(0)
    student = jax.tree.map(
        lambda leaf: leaf * jnp.float32(rng.uniform(0.7, 1.3, leaf.shape)), teacher
    )
    transform = distill(
        (model, teacher),
        alpha=1.0,
        temperature=1.0,
        mixture=MIXTURE,
        train=TrainOptions(steps=60, learning_rate=0.003),
    )
    call = {"calibration": Counted(original), "rng": jax.random.key(0)}
    _, taught, report = transform(model, student, **call)
    assert not report.notes
    assert collections.Counter(read[-60:]) == {"text": 30, "images": 18, "audio": 12}
    for name in ("vision", "speech", "decoder"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), taught[name], student[name])
        assert all(jax.tree.leaves(moved)), name
    for kind in MIXTURE:
        soft = [
            point.soft for point, of in zip(report.curve, read[-60:], strict=True) if of == kind
        ]
        assert soft[-1] < 0.6 * soft[0], kind
