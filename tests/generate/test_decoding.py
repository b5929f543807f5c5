"""Cached generation against the uncached forward pass, its stops, seeds, streams and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.errors import DataError
from glm_edge.generate import DecodeOptions, Sampling, generate, greedy, stream
from glm_edge.generate import steps as programs
from glm_edge.generate.prompts import bucket
from glm_edge.preprocess import Inputs

IMAGE, AUDIO, FIRST_TEXT, VOCABULARY = 5, 8, 11, 48
STEPS = 6
DRAWN = Sampling(temperature=1.5, top_k=30, top_p=0.95)
PENALIZED = Sampling(temperature=0.9, repetition_penalty=1.4, frequency_penalty=0.5)
VARIANTS = [
    {},
    {"partial_rotary_factor": 0.5, "attention_bias": True, "sandwich_norm": True},
    {"tie_embeddings": False, "rotary_interleaved": False},
    {"mrope_section": (1, 1, 2)},
]


def text_of(length, seed):
    return np.random.default_rng(seed).integers(FIRST_TEXT, VOCABULARY, length)


def spread(prompts, places, width):
    """Prompts as `(tokens, valid)`, the tokens of each row at the given slots."""
    tokens = np.full((len(prompts), width), IMAGE, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, (prompt, slots) in enumerate(zip(prompts, places, strict=True)):
        tokens[row, slots], valid[row, slots] = prompt, True
    return tokens, valid


@st.composite
def padded_batches(draw):
    """Prompts of several lengths, padded on the left, on the right, or anywhere."""
    # Each shape compiles a program; what varies beyond them is free.
    width, rows = draw(st.sampled_from([(1, 3), (9, 1), (31, 3)]))
    prompts, places = [], []
    for _ in range(rows):
        length = draw(st.integers(1, width))
        side = draw(st.sampled_from(["left", "right", "holes"]))
        start = {"left": width - length, "right": 0}.get(side)
        slots = np.arange(length) + (start or 0)
        if side == "holes":
            slots = np.sort(draw(st.permutations(range(width)))[:length])
        prompts.append(text_of(length, draw(st.integers(0, 999))))
        places.append(slots)
    return prompts, *spread(prompts, places, width)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
@settings(max_examples=12)
@given(batch=padded_batches())
def test_cached_generation_equals_running_everything_again(
    make_model, continue_uncached, variant, batch
):
    prompts, tokens, valid = batch
    model, params = make_model(**variant)
    result = generate(
        model,
        params,
        Inputs(tokens, valid=valid),
        max_new_tokens=STEPS,
        stop_tokens=(),
        return_logits=True,
    )
    for row, prompt in enumerate(prompts):
        ids, scores = continue_uncached(model, params, prompt, STEPS)
        np.testing.assert_allclose(result.logits[row], scores, atol=1e-4)
        assert result.tokens[row].tolist() == ids.tolist()
    assert result.lengths.tolist() == [STEPS] * len(prompts)


@pytest.mark.parametrize("variant", [{}, {"mrope_section": (1, 1, 2)}], ids=["rope", "mrope"])
@pytest.mark.parametrize("listed", [False, True])
def test_images_and_audio_in_padded_rows(make_model, continue_uncached, variant, listed):
    model, params = make_model(**variant)
    rng = np.random.default_rng(4)
    images = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
    audio = jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.float32)
    observed = [IMAGE] * 4 + [11] + [AUDIO] * 2
    prompts = [np.array([12, 13, *observed, 14]), np.array([*observed, 15])]
    tokens, valid = spread(prompts, [np.arange(10) + 2, [0, 1, 3, 4, 5, 7, 9, 10]], 12)
    options = {"max_new_tokens": STEPS, "stop_tokens": (IMAGE, AUDIO), "return_logits": True}
    given_images = list(images) if listed else images
    result = generate(
        model, params, Inputs(tokens, valid=valid, images=given_images, audio=audio), **options
    )
    for row, prompt in enumerate(prompts):
        ids, scores = continue_uncached(
            model, params, prompt, STEPS, images[row : row + 1], audio[row : row + 1], stops=(5, 8)
        )
        assert result.tokens[row, : len(ids)].tolist() == ids.tolist()
        np.testing.assert_allclose(result.logits[row, : len(ids)], scores, atol=1e-4)


def test_images_of_other_sizes_move_the_positions_that_follow(make_model, continue_uncached):
    model, params = make_model(mrope_section=(1, 1, 2))
    rng = np.random.default_rng(5)
    images = [jnp.asarray(rng.normal(size=(h, w, 3)), jnp.float32) for h, w in [(8, 24), (16, 16)]]
    prompts = [[12, *[IMAGE] * 3, 13, 14], [*[IMAGE] * 4, 15]]
    tokens, valid = spread(prompts, [np.arange(6), np.arange(5) + 3], 8)
    options = {"max_new_tokens": STEPS, "stop_tokens": (IMAGE, AUDIO)}
    result = generate(model, params, Inputs(tokens, valid=valid, images=images), **options).tokens
    for row, prompt in enumerate(prompts):
        ids, _ = continue_uncached(
            model, params, prompt, STEPS, [images[row]], stops=(IMAGE, AUDIO)
        )
        assert result[row, : len(ids)].tolist() == ids.tolist()


def test_recordings_in_chunks_of_several_lengths(make_model, continue_uncached):
    model, params = make_model()
    audio = jnp.asarray(np.random.default_rng(6).normal(size=(3, 16, 8)), jnp.float32)
    frames = jnp.array([16, 8, 16])
    prompts = [[12, *[AUDIO] * 3, 13], [*[AUDIO] * 2, 14]]
    tokens, valid = spread(prompts, [np.arange(5), np.arange(3) + 2], 5)
    options = {"max_new_tokens": STEPS, "stop_tokens": (IMAGE, AUDIO)}
    result = generate(
        model, params, Inputs(tokens, valid=valid, audio=audio, audio_frames=frames), **options
    ).tokens
    for row, chunks in enumerate([slice(0, 2), slice(2, 3)]):
        ids, _ = continue_uncached(
            model, params, prompts[row], STEPS, None, audio[chunks], frames[chunks], (IMAGE, AUDIO)
        )
        assert result[row, : len(ids)].tolist() == ids.tolist()


def test_a_row_stops_at_its_stop_token_and_repeats_it(make_model):
    model, params = make_model()
    tokens = np.stack([text_of(5, seed) for seed in range(3)])
    free = np.asarray(generate(model, params, tokens, max_new_tokens=20, stop_tokens=()).tokens)
    stop = next(int(token) for token in free[0] if token != free[0, 0])
    result = generate(model, params, tokens, max_new_tokens=20, stop_tokens=(stop,))
    for row in range(3):
        places = np.flatnonzero(free[row] == stop)
        length = places[0] if len(places) else 20
        assert result.lengths[row] == length
        assert result.tokens[row, :length].tolist() == free[row, :length].tolist()
        assert (result.tokens[row, length:] == stop).all()
    assert 0 < result.lengths[0] < 20


def test_generation_ends_when_all_rows_have_stopped(make_model):
    model, params = make_model()
    tokens = text_of((1, 5), 0)
    free = generate(model, params, tokens, max_new_tokens=20, stop_tokens=()).tokens[0].tolist()
    steps = list(stream(model, params, tokens, max_new_tokens=20, stop_tokens=(free[2],)))
    assert len(steps) == free.index(free[2]) + 1
    options = {"stop_tokens": (free[2],), "max_new_tokens": 20, "return_logits": True}
    logits = generate(model, params, tokens, **options).logits[0]
    assert np.abs(logits[: len(steps)]).max(axis=1).min() > 0
    assert not logits[len(steps) :].any()


def test_stop_tokens_are_those_of_the_configuration_unless_given(make_model):
    model, params = make_model()
    tokens = text_of((8, 3), 0)
    options = {"max_new_tokens": 24, "sampling": Sampling(5.0)}
    result = generate(model, params, tokens, **options)
    assert result.lengths.min() < 24
    assert (result.tokens[jnp.arange(8), jnp.minimum(result.lengths, 23)] == 0)[
        result.lengths < 24
    ].all()
    assert (generate(model, params, tokens, stop_tokens=(), **options).lengths == 24).all()


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, PENALIZED], ids=["greedy", "drawn", "pen"])
def test_streaming_yields_the_tokens_of_the_batch_form(make_model, sampling):
    model, params = make_model()
    tokens, valid = spread([text_of(4, 1), text_of(7, 2)], [np.arange(4) + 3, np.arange(7)], 7)
    options = {"max_new_tokens": 10, "sampling": sampling, "rng": jax.random.key(7)}
    complete = generate(model, params, Inputs(tokens, valid=valid), **options).tokens
    steps = np.stack(list(stream(model, params, Inputs(tokens, valid=valid), **options)), axis=1)
    assert steps.tolist() == complete[:, : steps.shape[1]].tolist()


def test_penalties_act_on_what_was_generated(make_model):
    model, params = make_model()
    tokens = text_of((1, 5), 3)
    options = {"max_new_tokens": VOCABULARY, "stop_tokens": ()}
    result = generate(model, params, tokens, sampling=Sampling(frequency_penalty=1e6), **options)
    assert sorted(result.tokens[0].tolist()) == list(range(VOCABULARY))
    result = generate(model, params, tokens, sampling=Sampling(repetition_penalty=1e6), **options)
    fresh = result.tokens[0, :3].tolist()
    assert len({*fresh, *tokens[0].tolist()}) == 3 + len(set(tokens[0].tolist()))


def test_the_frequency_penalty_counts_each_time(make_model):
    model, params = make_model()
    penalty = 0.4
    options = {"max_new_tokens": 32, "stop_tokens": (), "return_logits": True}
    result = generate(
        model, params, text_of((1, 5), 3), sampling=Sampling(frequency_penalty=penalty), **options
    )
    counts = np.zeros(VOCABULARY)
    for token, logits in zip(result.tokens[0], result.logits[0], strict=True):
        assert token == np.argmax(logits - penalty * counts)
        counts[token] += 1
    assert counts.max() >= 3


def test_the_same_key_gives_the_same_tokens(make_model):
    model, params = make_model()
    tokens = text_of((2, 6), 4)

    def draw(seed):
        options = {"max_new_tokens": 12, "sampling": DRAWN, "stop_tokens": ()}
        return generate(model, params, tokens, rng=jax.random.key(seed), **options).tokens.tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert draw(0)[0] != draw(0)[1]
    even = generate(
        model, params, tokens, max_new_tokens=12, sampling=Sampling(1e6), stop_tokens=()
    )
    assert min(len(set(row)) for row in even.tokens.tolist()) > 6


def test_a_row_does_not_depend_on_the_others_nor_on_padding(make_model):
    model, params = make_model()
    prompts = [text_of(length, length) for length in (3, 9, 6)]
    keys = jax.random.split(jax.random.key(2), 3)
    options = {"max_new_tokens": 12, "sampling": PENALIZED, "stop_tokens": ()}
    tokens, valid = spread(prompts, [np.arange(len(p)) + 1 for p in prompts], 12)
    padded = Inputs(tokens, valid=valid)
    together = generate(model, params, padded, rng=keys, **options).tokens
    for row, prompt in enumerate(prompts):
        alone = generate(model, params, prompt[None], rng=keys[row : row + 1], **options).tokens
        assert alone[0].tolist() == together[row].tolist()
    first = generate(model, params, prompts[0][None], rng=jax.random.key(5), **options).tokens
    rows = generate(model, params, padded, rng=jax.random.key(5), **options).tokens
    assert first[0].tolist() == rows[0].tolist()


def test_lengths_of_one_bucket_compile_once(make_model):
    model, params = make_model(num_layers=1)
    compiled = []
    for length, steps in ((3, 2), (32, 9), (17, 32)):
        generate(model, params, text_of((1, length), 0), max_new_tokens=steps)
        compiled.append(programs._prefill._cache_size() + programs.decode._cache_size())
    assert len(set(compiled)) == 1


def test_buckets_hold_their_length_and_waste_little():
    sizes = [bucket(length) for length in range(1, 8193)]
    for length, size in enumerate(sizes, start=1):
        assert length <= size < length + max(32, length / 4)
    assert len(set(sizes)) == 28


def test_greedy_is_generation_at_temperature_zero(make_model):
    model, params = make_model()
    tokens = text_of((2, 6), 5)
    result = greedy(model, params, tokens, max_new_tokens=8)
    assert result.shape == (2, 8)
    assert result.tolist() == generate(model, params, tokens, max_new_tokens=8).tokens.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 3))}, "integers"),
        ({"tokens": np.zeros(3, int)}, "integers"),
        ({"tokens": np.full((1, 3), VOCABULARY)}, f"token {VOCABULARY} is not in 0..47"),
        ({"tokens": np.full((1, 3), -1)}, "token -1"),
        ({"valid": np.ones((1, 2), bool)}, "valid has shape"),
        ({"valid": np.array([[False] * 3])}, "prompt 0 holds padding only"),
        ({"tokens": [[1, 2], [3]]}, "prompts must be rows of one length"),
        ({"tokens": [["a"]]}, "prompts must be numbers"),
        ({"valid": [[True], [True, True]]}, "valid must be rows of one length"),
        ({"pixels": 1}, "inputs have no 'pixels'; known: tokens, valid, images, audio"),
        ({"options": {"cache_dtype": "int8"}}, "options must be a DecodeOptions, got"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be an integer, got 2\.5"),
        ({"max_new_tokens": "4"}, "max_new_tokens must be an integer, got '4'"),
        ({"max_new_tokens": 10**12}, "at most 1048576, got 1000000000000"),
        ({"max_new_tokens": 8190}, "3 positions and 8190 new tokens exceed the 8192 .*=8189"),
        ({"stop_tokens": [VOCABULARY]}, f"stop_tokens: {VOCABULARY} is not in 0..47"),
        ({"stop_tokens": [-1]}, "stop_tokens: -1"),
        ({"stop_tokens": [1.0]}, r"stop_tokens must be token ids, got \[1\.0\]"),
        ({"stop_tokens": 5}, "stop_tokens must be token ids, got 5"),
        ({"sampling": 0.7}, r"sampling must be a Sampling, got 0\.7"),
        ({"rng": 3, "sampling": DRAWN}, "rng must be a key"),
        ({"rng": jnp.stack([jax.random.key(0)] * 2), "sampling": DRAWN}, "rng must be"),
    ],
    ids=range(23),
)
def test_unfit_input_is_named(make_model, change, message):
    model, params = make_model()
    arrays = {name: change[name] for name in ("tokens", "valid", "pixels") if name in change}
    options = {name: value for name, value in change.items() if name not in arrays}
    inputs = {"tokens": np.full((1, 3), 12), **arrays}
    with pytest.raises(DataError, match=message):
        generate(model, params, inputs, **options)


@pytest.mark.parametrize("mrope", [(), (1, 1, 2)])
def test_generation_beyond_the_context_is_asked_for(make_model, mrope):
    model, params = make_model(num_layers=1, max_position_embeddings=10, mrope_section=mrope)
    prompts = np.full((2, 7), 12)
    valid = np.ones((2, 7), bool)
    valid[1, :2] = False
    inputs, beyond = Inputs(prompts, valid=valid), DecodeOptions(beyond_context=True)
    for run in (generate, lambda *args, **options: list(stream(*args, **options))):
        with pytest.raises(DataError, match=r"7 positions and 4 new tokens exceed the 10"):
            run(model, params, inputs, max_new_tokens=4)
        run(model, params, inputs, max_new_tokens=3)
        run(model, params, inputs, max_new_tokens=4, options=beyond)
    with pytest.raises(DataError, match="shorten the prompt"):
        generate(model, params, np.full((1, 10), 12), max_new_tokens=1)


def test_an_image_takes_the_positions_of_its_grid(make_model):
    model, params = make_model(num_layers=1, max_position_embeddings=9, mrope_section=(1, 1, 2))
    # An image of 2 x 2 features takes 2 positions of three axes, though 4 tokens.
    tokens = np.full((1, 8), 12)
    tokens[0, :4] = IMAGE
    images = [jnp.zeros((16, 16, 3))]
    generate(model, params, Inputs(tokens, images=images), max_new_tokens=3, stop_tokens=())
    with pytest.raises(DataError, match="6 positions and 4 new tokens exceed the 9"):
        generate(model, params, Inputs(tokens, images=images), max_new_tokens=4)


@pytest.mark.parametrize("options", [{}, {"sampling": DRAWN}])
def test_scores_that_are_not_finite_are_refused(make_model, options):
    model, params = make_model(num_layers=1)
    table = params["embed"]["weight"].at[20].set(jnp.nan)
    damaged = {**params, "embed": {"weight": table}}
    with pytest.raises(DataError, match="prompt 0: the model's scores are NaN or infinite"):
        generate(model, damaged, np.full((2, 3), 12), max_new_tokens=2, **options)
    with pytest.raises(DataError, match="NaN or infinite"):
        list(stream(model, damaged, np.full((1, 3), 12), max_new_tokens=2, **options))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_placeholders_and_features_must_be_as_many(make_model, rows, listed):
    model, params = make_model()
    tokens = np.full((rows, 6), 12)
    tokens[-1, :3] = IMAGE
    images = jnp.zeros((rows, 16, 16, 3))
    gives = 4 * rows if listed else 4
    with pytest.raises(DataError, match=f"3 placeholders of vision, the input gives {gives}"):
        generate(model, params, Inputs(tokens, images=list(images) if listed else images))


def test_a_row_may_have_no_image(make_model):
    model, params = make_model()
    tokens = np.full((2, 6), 12)
    tokens[1, :4] = IMAGE
    images = jnp.zeros((2, 16, 16, 3))
    options = {"max_new_tokens": 4, "stop_tokens": ()}
    result = generate(model, params, Inputs(tokens, images=images), **options).tokens
    assert result[0].tolist() == generate(model, params, tokens[:1], **options).tokens[0].tolist()


def test_a_bfloat16_cache_gives_nearly_the_same_scores(make_model):
    model, params = make_model()
    prompt = text_of(9, 3)[None]
    exact = generate(model, params, prompt, max_new_tokens=STEPS, return_logits=True)
    bfloat16 = DecodeOptions(cache_dtype=jnp.bfloat16)
    result = generate(model, params, prompt, max_new_tokens=1, options=bfloat16, return_logits=True)
    scale = float(jnp.abs(exact.logits[:, 0]).max())
    difference = float(jnp.abs(result.logits[:, 0] - exact.logits[:, 0]).max())
    assert 0 < difference < 0.02 * scale
