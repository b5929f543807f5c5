"""Prompts that lose vision tokens, against a decoder without a cache that hides them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.common import tap_eval, tap_items
from glm_edge.errors import RecipeError
from glm_edge.generate import (
    DecodeOptions,
    Setting,
    VisionTokens,
    drop_vision_tokens,
    generate,
    steps,
    stream,
    sweep,
)
from glm_edge.generate.decoding import GREEDY
from glm_edge.generate.prompts import Prompt
from glm_edge.models.text import TextEncoder
from glm_edge.preprocess import Inputs

IMAGE, VOCABULARY, STEPS, WIDTH = 5, 48, 6, 48
LAYERS, FEATURES, LENGTH = 2, 16, 38
OPTIONS = {"max_new_tokens": STEPS, "stop_tokens": (), "return_logits": True}


@pytest.fixture(scope="module")
def prompts():
    """Two rows that fill more than one bucket of 32, an image each in another place."""
    rng = np.random.default_rng(0)
    text = rng.integers(11, VOCABULARY, (2, LENGTH - FEATURES))
    rows = [[*text[0, :3], *[IMAGE] * FEATURES, *text[0, 3:]], [*[IMAGE] * FEATURES, *text[1]]]
    images = [rng.normal(size=(32, 32, 3)).astype(np.float32) for _ in rows]
    return rows, images


def padded(rows, images=None):
    """Rows as `Inputs`, the last padded on its right and the others on their left."""
    tokens = np.full((len(rows), LENGTH + 2), IMAGE)
    valid = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        start = 0 if index == len(rows) - 1 else LENGTH + 2 - len(row)
        tokens[index, start : start + len(row)] = row
        valid[index, start : start + len(row)] = True
    return Inputs(tokens, valid=valid, images=images)


@functools.partial(jax.jit, static_argnums=0)
def complete(model, params, tokens, image):
    """Embedded prompt, positions and what follows, and inputs and attention of each layer."""

    def run(module):
        positions, following = module.start_positions(tokens, None, [image])
        x = module.embed_inputs(tokens, [image])[0]
        return x, positions, following, module.decoder(x, positions)[1]

    result, sown = model.apply({"params": params}, method=run, mutable=["attention"])
    layers = sown["attention"]["decoder"]["layers"]
    return *result, [layers[str(i)]["attention"]["weights"][0] for i in range(LAYERS)]


def chosen(result, row, score, layer, keep):
    """Places of the vision tokens that stay, in float64."""
    _, _, _, hidden, weights = result
    x, image = np.float64(hidden[layer][0]), np.array(row) == IMAGE
    places = np.flatnonzero(image)
    if score == "norm":
        scores = np.linalg.norm(x, axis=1)
    elif score == "novelty":
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        scores = np.full(len(row), 2.0)
        for at in places[1:]:
            scores[at] = 1 - max(unit[at] @ unit[other] for other in places if other < at)
    else:
        heads = np.float64(weights[layer - 1][0]).reshape(-1, len(row), len(row))
        scores = heads[:, ~image].mean((0, 1))
    return np.sort(places[np.argsort(-scores[places], kind="stable")][:keep])


@functools.partial(jax.jit, static_argnums=0)
def scores_of(model, params, ids, embedded, positions, masks):
    """Scores [WIDTH, V] where each layer has a mask of its own and the prompt is embedded."""

    def run(module):
        x = module.embed(ids[None]).at[:, :LENGTH].set(embedded)
        for index in range(LAYERS):
            angle, mask, slot = module.decoder.prepare(x, positions, masks[index, None, None], None)
            x, _ = module.decoder.run_layer(index, x, angle, mask, None, slot)
        return module.predict(module.decoder.norm(x))[0]

    return model.apply({"params": params}, method=run)


def uncached(model, params, row, result, retained, layer):
    """Tokens and scores of greedy decoding where dropped tokens are hidden, not taken away.

    Layers before `layer` show them to the prompt, and no layer shows them to what follows.
    """
    embedded, positions, following, _, _ = result
    dropped = np.setdiff1d(np.flatnonzero(np.array(row) == IMAGE), retained)
    causal = np.tril(np.ones((WIDTH, WIDTH), bool))
    late = causal & ~np.isin(np.arange(WIDTH), dropped)
    early = np.where(np.arange(WIDTH)[:, None] < LENGTH, causal, late)
    masks = np.stack([early if index < layer else late for index in range(LAYERS)])
    after = following[0] + np.arange(WIDTH - LENGTH)
    after = np.broadcast_to(after, (*positions.shape[:-1], WIDTH - LENGTH))
    positions, ids, scores = np.concatenate([positions, after], axis=-1), [*row], []
    for _ in range(STEPS):
        filled = np.array(ids + [11] * (WIDTH - len(ids)))
        logits = scores_of(model, params, filled, embedded, positions, masks)
        scores.append(np.asarray(logits[len(ids) - 1]))
        ids.append(int(scores[-1].argmax()))
    return ids[LENGTH:], np.stack(scores)


@pytest.mark.parametrize(
    ("mrope", "score", "layer"),
    [
        pytest.param((), "norm", 0, marks=pytest.mark.slow),
        ((1, 1, 2), "novelty", 0),
        ((1, 1, 2), "attention", 1),
        pytest.param((), "attention", 2, marks=pytest.mark.slow),
        ((1, 1, 2), "norm", LAYERS),
    ],
)
def test_token_pruning_drops_the_lowest_scores_only(make_model, prompts, mrope, score, layer):
    """Dropped tokens are those that score lowest and nothing else changes."""
    model, params = make_model(num_layers=LAYERS, mrope_section=mrope)
    rows, images = prompts
    pruning = DecodeOptions(vision_tokens=drop_vision_tokens(model, 0.4, score, layer))
    result, plain = (
        jax.device_get(vars(generate(model, params, padded(rows, images), **OPTIONS, **more)))
        for more in ({"options": pruning}, {})
    )
    assert np.abs(result["logits"][:, 1] - plain["logits"][:, 1]).max() > 1e-2
    for index, (row, image) in enumerate(zip(rows, images, strict=True)):
        observed = jax.device_get(complete(model, params, np.array([row]), image))
        retained = chosen(observed, row, score, layer, keep=7)
        ids, scores = uncached(model, params, row, observed, retained, layer)
        np.testing.assert_allclose(result["logits"][index], scores, atol=1e-4)
        assert result["tokens"][index].tolist() == ids


def test_the_cache_holds_what_is_left(make_model, prompts):
    model, params = make_model(num_layers=LAYERS, mrope_section=(1, 1, 2))
    rows, images = prompts
    inputs, slots = padded(rows, images), {}
    for keep in (1.0, 0.5):
        drop = drop_vision_tokens(model, keep, layer=1)
        options = DecodeOptions(cache_dtype="int8", vision_tokens=drop)
        prompt = Prompt.of(model.config, inputs, STEPS)
        state = steps.start(model, params, prompt, GREEDY, None, options)
        rows_seen = np.asarray(state.visible.sum(axis=1)) - prompt.room
        np.testing.assert_array_equal(rows_seen, inputs.valid.sum(axis=1) - FEATURES * (1 - keep))
        slots[keep] = int(state.cache["length"])
        assert {leaf.shape[1] for leaf in jax.tree.leaves(state.cache["layers"])} == {
            slots[keep] + prompt.room
        }
        # A column of 4 features advances by 4: positions are those of the whole prompt.
        np.testing.assert_array_equal(state.position, inputs.valid.sum(axis=1) - FEATURES + 4 - 1)
    assert slots == {1.0: 64, 0.5: 32}


def test_rows_do_not_depend_on_each_other_nor_on_having_an_image(make_model, prompts):
    model, params = make_model(num_layers=LAYERS)
    rows, images = prompts
    rows = [rows[0], rows[1][FEATURES:], rows[1]]
    pruning = DecodeOptions(vision_tokens=drop_vision_tokens(model, 0.25, layer=1))

    def answer(inputs):
        return np.asarray(generate(model, params, inputs, STEPS, options=pruning).tokens).tolist()

    together = answer(padded(rows, images))
    assert answer(Inputs(rows[:1], images=images[:1]))[0] == together[0]
    last = Inputs([rows[2]], images=images[1:])
    streamed = list(stream(model, params, last, STEPS, options=pruning))
    assert np.concatenate(streamed).tolist() == together[2]
    assert answer([rows[1]])[0] == together[1]


def test_another_fraction_of_one_bucket_compiles_nothing_anew(make_model, prompts):
    # As above, where the first layer drops what is like others.
    model, params = make_model(num_layers=LAYERS, mrope_section=(1, 1, 2))
    rows, images = prompts
    compiled = []
    for keep in (0.3, 0.5, 0.6):
        pruning = DecodeOptions(vision_tokens=drop_vision_tokens(model, keep, "novelty", 0))
        generate(model, params, padded(rows, images), options=pruning, **OPTIONS)
        compiled.append(steps._prefill._cache_size() + steps.decode._cache_size())
    assert len(set(compiled)) == 1


# Sweeps are tested with early exits, generation that drops tokens above.
@pytest.mark.slow
def test_a_sweep_takes_fractions_of_vision_tokens(make_model, prompts):
    model, params = make_model(num_layers=LAYERS)
    rows, images = prompts
    settings = [
        Setting(f"{keep}", params, vision_tokens=drop_vision_tokens(model, keep, layer=1))
        for keep in (1.0, 0.3)
    ]
    answers = []
    actual = sweep(
        model,
        [Setting("all", params), *settings],
        [{"tokens": [rows[0]], "images": images[:1]}],
        lambda original: answers.append(original[0].tolist()) or 0.0,
        max_new_tokens=STEPS,
        rounds=1,
    )
    assert actual[1].agreement == 1.0
    for keep, original in zip((1.0, 0.3), answers[1:], strict=True):
        pruning = DecodeOptions(vision_tokens=drop_vision_tokens(model, keep, layer=1))
        expected = generate(
            model, params, Inputs([rows[0]], images=images[:1]), STEPS, options=pruning
        )
        assert original == expected.tokens.tolist()


def test_drop_vision_tokens_names_the_default_layer(make_model):
    model, _ = make_model(num_layers=4)
    assert drop_vision_tokens(model, 0.5) == VisionTokens(0.5, "attention", 2)


@pytest.mark.slow
def test_the_shipped_model_answers_on_half_of_a_screen():
    directory = ge.shipped("nano")
    model, params = ge.load(directory, dtype="float32")
    tokenizer = ge.load_tokenizer(directory)
    batch = next(tap_items.prompt_batches(tap_items.draw_items(4, 3), model.config, tokenizer, 4))
    inputs = Inputs.of(batch)
    options = {"max_new_tokens": tap_eval.ANSWER_TOKENS, "return_logits": True}
    expected = generate(model, params, inputs, **options)
    lengths = {}
    for keep in (1.0, 0.5):
        drop = drop_vision_tokens(model, keep)
        assert drop == VisionTokens(keep, "attention", 2)
        pruning = DecodeOptions(vision_tokens=drop)
        actual = generate(model, params, inputs, options=pruning, **options)
        assert np.isfinite(actual.logits).all()
        if keep == 1.0:
            np.testing.assert_array_equal(actual.tokens, expected.tokens)
            np.testing.assert_allclose(actual.logits[:, 0], expected.logits[:, 0], atol=1e-3)
        else:
            assert float(jnp.abs(actual.logits[:, 0] - expected.logits[:, 0]).max()) > 1e-2
        prompt = Prompt.of(model.config, inputs, tap_eval.ANSWER_TOKENS)
        state = steps.start(model, params, prompt, GREEDY, None, pruning)
        lengths[keep] = int(state.cache["length"])
        observed = np.asarray(state.visible.sum(axis=1)) - prompt.room
        gone = int((1 - keep) * model.config.vision.num_tokens)
        np.testing.assert_array_equal(observed, batch["valid"].sum(axis=1) - gone)
    assert lengths[0.5] < lengths[1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep must be above 0 and up to 1, not 0.0"),
        ({"keep": 1.5}, "keep must be above 0"),
        ({"keep": float("nan")}, "keep must be above 0"),
        ({"score": "taste"}, "score must be one of attention, norm, novelty"),
        ({"layer": 0}, r"layer must be in 1\.\.2 to score by attention, not 0"),
        ({"layer": 3}, r"layer must be in 1\.\.2"),
        ({"layer": 1.5}, r"layer must be in 1\.\.2"),
        ({"layer": -1, "score": "norm"}, r"layer must be in 0\.\.2 to score by norm"),
    ],
)
def test_options_without_a_meaning_are_refused(make_model, options, message):
    model, _ = make_model(num_layers=LAYERS)
    with pytest.raises(RecipeError, match=message):
        drop_vision_tokens(model, **{"keep": 0.5, **options})


def test_models_that_do_not_see_are_refused():
    with pytest.raises(RecipeError, match="this TextEncoder reads no images"):
        drop_vision_tokens(TextEncoder(ge.configs.TextConfig(8, 8, 1, 1, 8)), 0.5)
