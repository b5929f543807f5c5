import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from glm_edge.errors import DataError, RecipeError
from glm_edge.generate import (
    DecodeOptions,
    Setting,
    early_exit,
    fit_exits,
    generate,
    steps,
    stream,
    sweep,
)


@functools.partial(jax.jit, static_argnums=0)
def applied(model, variables, *inputs):
    return model.apply(variables, *inputs)


LAYERS, LENGTH, NEW = 3, 7, 10
# The same shapes everywhere, so that few programs are compiled; no token is -1.
OPTIONS = {"max_new_tokens": NEW, "stop_tokens": (), "return_logits": True}


@pytest.fixture(scope="module")
def deep(make_model):
    model, params = make_model(num_layers=LAYERS)
    # Logits of an untrained model are nearly alike: sharper ones make some tokens sure.
    params = {**params, "decoder": {**params["decoder"], "norm": {"weight": 6 * jnp.ones(32)}}}
    return model, params


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(10, 48, (2, LENGTH))


@pytest.fixture(scope="module")
def threshold(deep, prompts):
    """The median of what the first exit is sure of, so that some tokens stop and some do not."""
    model, params = deep
    exits = early_exit(model, (1, 2), 0.0)
    result = generate(model, params, prompts, options=DecodeOptions(early_exit=exits), **OPTIONS)
    sure = scipy.special.softmax(np.asarray(result.logits)[:, 1:], axis=-1).max(axis=-1)
    return float(np.median(sure))


def uncached(model, params, ids, depth):
    """Hidden states of every layer and logits, where position `t` is frozen after `depth[t]`."""

    def run(module):
        x = module.embed_inputs(ids)[0]
        angle, mask, slot = module.decoder.prepare(x, jnp.arange(ids.shape[1])[None], None, None)
        scores = []
        for layer in range(LAYERS):
            scores.append(module.predict(module.decoder.norm(x)))
            y, _ = module.decoder.run_layer(layer, x, angle, mask, None, slot)
            x = jnp.where((depth > layer)[..., None], y, x)
        return [*scores, module.predict(module.decoder.norm(x))]

    scores = jax.jit(lambda params: model.apply({"params": params}, method=run))(params)
    return [np.asarray(score) for score in scores]


def test_early_exit_per_token_with_later_tokens(deep, prompts, threshold):
    """Tokens stop where they are sure and later ones see what they left."""
    model, params = deep
    exits = early_exit(model, (1, 2), threshold)
    result = generate(model, params, prompts, options=DecodeOptions(early_exit=exits), **OPTIONS)
    layers = np.asarray(result.layers)
    assert (layers[:, 0] == LAYERS).all()
    assert len(set(layers[:, 1:].ravel())) > 1
    assert set(layers.ravel()) <= {1, 2, 3}
    ids = np.concatenate([prompts, np.asarray(result.tokens)], axis=1)[:, :-1]
    depth = np.concatenate([np.full((2, LENGTH), LAYERS), layers[:, 1:]], axis=1)
    scores = uncached(model, params, ids, depth)
    np.testing.assert_allclose(result.logits, scores[-1][:, LENGTH - 1 :], atol=1e-4)
    for exit_at in (1, 2):
        sure = scipy.special.softmax(scores[exit_at], axis=-1).max(axis=-1)[:, LENGTH:]
        ran = layers[:, 1:]
        assert (sure[ran == exit_at] >= threshold - 1e-5).all()
        assert (sure[ran > exit_at] < threshold + 1e-5).all()
    options = {"max_new_tokens": NEW, "stop_tokens": (), "options": DecodeOptions(early_exit=exits)}
    tokens = list(stream(model, params, prompts, **options))
    np.testing.assert_array_equal(np.stack(tokens, axis=1), result.tokens)


def test_rows_do_not_depend_on_each_other(deep, prompts, threshold):
    model, params = deep
    exiting = DecodeOptions(early_exit=early_exit(model, (1, 2), threshold))
    together = generate(model, params, prompts, options=exiting, **OPTIONS)
    # As in the sweep below, whose programs run again.
    options = {"max_new_tokens": NEW, "stop_tokens": (), "options": exiting}
    for row in (0, 1):
        alone = generate(model, params, prompts[row : row + 1], **options)
        np.testing.assert_array_equal(alone.tokens[0], np.asarray(together.tokens)[row])
        np.testing.assert_array_equal(alone.layers[0], np.asarray(together.layers)[row])


def test_the_ends_of_the_threshold(deep, prompts):
    model, params = deep
    complete = generate(model, params, prompts, **OPTIONS)
    assert complete.layers is None
    never_exits, first_exit = (
        DecodeOptions(early_exit=early_exit(model, (1, 2), threshold)) for threshold in (1.0, 0.0)
    )
    never = generate(model, params, prompts, options=never_exits, **OPTIONS)
    assert (np.asarray(never.layers) == LAYERS).all()
    np.testing.assert_array_equal(never.tokens, complete.tokens)
    np.testing.assert_allclose(never.logits, complete.logits, atol=1e-4)
    always = generate(model, params, prompts, options=first_exit, **OPTIONS)
    assert (np.asarray(always.layers)[:, 1:] == 1).all()


def test_another_threshold_compiles_nothing_anew(deep, prompts, threshold):
    model, params = deep
    compiled, layers = [], []
    for value in (threshold, 0.0, 0.95):
        exiting = DecodeOptions(early_exit=early_exit(model, (1, 2), value))
        result = generate(model, params, prompts, options=exiting, **OPTIONS)
        list(stream(model, params, prompts, 3, stop_tokens=(), options=exiting))
        layers.append(float(np.mean(result.layers)))
        programs = (steps._prefill, steps._first, steps.step, steps.decode)
        compiled.append([program._cache_size() for program in programs])
    assert compiled[0] == compiled[1] == compiled[2]
    assert len(set(layers)) > 1


def test_stopped_rows_run_no_layer(deep, prompts, threshold):
    model, params = deep
    exits = early_exit(model, (1, 2), threshold)
    plain = generate(model, params, prompts, options=DecodeOptions(early_exit=exits), **OPTIONS)
    stop = int(np.asarray(plain.tokens)[0, 3])
    options = {**OPTIONS, "stop_tokens": (stop,)}
    result = generate(model, params, prompts, options=DecodeOptions(early_exit=exits), **options)
    rows = jax.device_get((result.tokens, result.layers, result.lengths))
    for tokens, ran, length in zip(*rows, strict=True):
        assert (np.asarray(ran)[: length + 1] > 0).all()
        assert (np.asarray(ran)[length + 1 :] == 0).all()
        assert (np.asarray(tokens)[int(length) :] == stop).all()


def test_maps_are_least_squares_from_an_exit_to_the_last_layer(deep, prompts):
    model, params = deep
    data = [{"tokens": np.random.default_rng(i).integers(10, 48, (8, 12))} for i in range(3)]
    maps = fit_exits(model, params, data, (1, 2), ridge=1e-9)
    hidden = [applied(model, {"params": params}, batch["tokens"])[1]["hidden"] for batch in data]
    for index in (1, 2):
        x, y = (
            np.concatenate([np.asarray(h[at], np.float64).reshape(-1, 32) for h in hidden])
            for at in (index, LAYERS)
        )
        solved = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
        expected = np.c_[x, np.ones(len(x))] @ solved
        fitted = maps[str(index)]
        actual = x @ np.asarray(fitted["weight"], np.float64).T + np.asarray(fitted["bias"])
        np.testing.assert_allclose(actual, expected, atol=2e-3)
        assert np.mean((actual - y) ** 2) < np.mean((x - y) ** 2)
    always = early_exit(model, (2,), 0.0, maps)
    actual = generate(model, params, prompts, options=DecodeOptions(early_exit=always), **OPTIONS)
    ids = np.concatenate([prompts, np.asarray(actual.tokens)], axis=1)[:, : LENGTH + 1]
    depth = np.r_[np.full(LENGTH, LAYERS), 2][None].repeat(2, axis=0)

    def mapped(module):
        x = module.embed_inputs(ids)[0]
        angle, mask, slot = module.decoder.prepare(x, jnp.arange(ids.shape[1])[None], None, None)
        for layer in range(LAYERS):
            y, _ = module.decoder.run_layer(layer, x, angle, mask, None, slot)
            x = jnp.where((depth > layer)[..., None], y, x)
        x = x @ maps["2"]["weight"].T + maps["2"]["bias"]
        return module.predict(module.decoder.norm(x))

    run = jax.jit(functools.partial(model.apply, method=mapped))
    expected = np.asarray(run({"params": params}))[:, -1]
    np.testing.assert_allclose(np.asarray(actual.logits)[:, 1], expected, atol=1e-3)


def test_a_sweep_compares_every_setting_with_the_first(deep, prompts, threshold):
    model, params = deep
    settings = [
        Setting("all layers", params),
        Setting("never", params, early_exit(model, (1, 2), 1.0), 1.0),
        Setting("at once", params, early_exit(model, (1, 2), 0.0), 0.0),
    ]
    asked = []

    def score(answers):
        asked.append(answers)
        return float(len(asked))

    observed = []
    rows = sweep(
        model,
        settings,
        [{"tokens": prompts[:1]}],
        score,
        max_new_tokens=NEW,
        rounds=2,
        progress=lambda *args: observed.append(args),
    )
    assert [row.name for row in rows] == [setting.name for setting in settings]
    assert [row.accuracy for row in rows] == [1.0, 2.0, 3.0]
    assert [row.agreement for row in rows][:2] == [1.0, 1.0]
    assert [row.layers for row in rows] == [3.0, 3.0, 1.0]
    assert rows[0].speedup == rows[0].low == rows[0].high == 1.0
    assert all(row.tokens_per_second > 0 and row.low <= row.speedup <= row.high for row in rows)
    assert observed[-1] == ("sweep: rounds", 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.01}, r"threshold must be in 0\.\.1, not 1.01"),
        ({"threshold": -0.1}, r"threshold must be in 0\.\.1"),
        ({"threshold": float("nan")}, r"threshold must be in 0\.\.1"),
        ({"after": ()}, r"must name layers in 1\.\.2"),
        ({"after": (0, 1)}, r"must name layers in 1\.\.2"),
        ({"after": (3,)}, r"must name layers in 1\.\.2"),
        ({"maps": {"1": {}}}, "maps lack exit 2"),
    ],
)
def test_exits_without_a_meaning_are_refused(deep, options, message):
    with pytest.raises(RecipeError, match=message):
        early_exit(deep[0], **{"after": (1, 2), **options})


def test_fits_and_sweeps_without_data_are_refused(deep, prompts):
    model, params = deep
    with pytest.raises(DataError, match="no batches to fit on"):
        fit_exits(model, params, [], (1,))
    with pytest.raises(RecipeError, match="must name layers"):
        fit_exits(model, params, [{"tokens": prompts}], (7,))
    broken = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(np.nan), params)
    with pytest.raises(DataError, match="not finite"):
        fit_exits(model, broken, [{"tokens": prompts}], (1,))
    with pytest.raises(DataError, match="a setting and a question"):
        sweep(model, [], [{"tokens": prompts}], len, 4)
    with pytest.raises(DataError, match="images and audio as one array"):
        sweep(model, [Setting("all", params)], [{"tokens": prompts, "images": []}], len, 4)
