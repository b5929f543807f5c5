"""Cached generation against the uncached forward pass, its stops, seeds, streams and errors."""

import dataclasses

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
# Combinations of fields are tested without generation in tests/models/test_glm.py.
VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param(
        {"partial_rotary_factor": 0.5, "attention_bias": True, "sandwich_norm": True},
        marks=pytest.mark.slow,
        id="partial_rotary_factor-attention_bias-sandwich_norm",
    ),
    pytest.param(
        {"tie_embeddings": False, "rotary_interleaved": False},
        marks=pytest.mark.slow,
        id="tie_embeddings-rotary_interleaved",
    ),
    # Positions of three axes are tested with images below.
    pytest.param({"mrope_section": (1, 1, 2)}, marks=pytest.mark.slow, id="mrope_section"),
]
# Three rows and scores everywhere, so that few programs are compiled.
ROWS = 3
OPTIONS = {"max_new_tokens": STEPS, "stop_tokens": (), "return_logits": True}


def text_of(length, seed):
    return np.random.default_rng(seed).integers(FIRST_TEXT, VOCABULARY, length)


def run(model, params, inputs, **options):
    """Generates; the result is in numpy."""
    return jax.device_get(vars(generate(model, params, inputs, **OPTIONS | options)))


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
    # One bucket and one number of rows compile one program; what varies beyond them is free.
    width = draw(st.sampled_from([1, 9, 31]))
    prompts, places = [], []
    for _ in range(ROWS):
        length = draw(st.integers(1, width))
        side = draw(st.sampled_from(["left", "right", "holes"]))
        start = {"left": width - length, "right": 0}.get(side)
        slots = np.arange(length) + (start or 0)
        if side == "holes":
            slots = np.sort(draw(st.permutations(range(width)))[:length])
        prompts.append(text_of(length, draw(st.integers(0, 999))))
        places.append(slots)
    return prompts, *spread(prompts, places, width)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=12)
@given(batch=padded_batches())
def test_cached_generation_equals_running_everything_again(
    make_model, continue_uncached, variant, batch
):
    prompts, tokens, valid = batch
    model, params = make_model(**variant)
    result = run(model, params, Inputs(tokens, valid=valid))
    for row, prompt in enumerate(prompts):
        ids, scores = continue_uncached(model, params, prompt, STEPS)
        np.testing.assert_allclose(result["logits"][row], scores, atol=1e-4)
        assert result["tokens"][row].tolist() == ids.tolist()
    assert result["lengths"].tolist() == [STEPS] * len(prompts)


@pytest.fixture(scope="module")
def seen_and_heard():
    """Prompts, images and recordings: the last of three rows has neither."""
    rng = np.random.default_rng(4)
    images = rng.normal(size=(ROWS, 16, 16, 3)).astype(np.float32)
    audio = rng.normal(size=(ROWS, 16, 8)).astype(np.float32)
    observed = [IMAGE] * 4 + [11] + [AUDIO] * 2
    prompts = [np.array([12, 13, *observed, 14]), np.array([*observed, 15]), np.array([16, 17])]
    return prompts, images, audio


def seen_and_heard_inputs(prompts, images, audio, listed):
    """`Inputs` whose images are a list, of which no row without placeholders has one, or not."""
    places = [np.arange(10) + 2, np.array([0, 1, 3, 4, 5, 7, 9, 10]), np.array([3, 9])]
    places = [slots[-len(prompt) :] for prompt, slots in zip(prompts, places, strict=True)]
    tokens, valid = spread(prompts, places, 12)
    images = list(images[:2]) if listed else images
    return Inputs(tokens, valid=valid, images=images, audio=audio)


@pytest.mark.parametrize(
    ("variant", "listed"),
    [
        pytest.param({}, False, id="False-rope"),
        pytest.param({}, True, id="True-rope", marks=pytest.mark.slow),
        pytest.param({"mrope_section": (1, 1, 2)}, False, id="False-mrope", marks=pytest.mark.slow),
        # Images of other sizes are listed below.
        pytest.param({"mrope_section": (1, 1, 2)}, True, id="True-mrope", marks=pytest.mark.slow),
    ],
)
def test_images_and_audio_in_padded_rows(
    make_model, continue_uncached, seen_and_heard, variant, listed
):
    model, params = make_model(**variant)
    prompts, images, audio = seen_and_heard
    inputs = seen_and_heard_inputs(prompts, images, audio, listed)
    result = run(model, params, inputs, stop_tokens=(IMAGE, AUDIO))
    for row, prompt in enumerate(prompts):
        media = (images[row : row + 1], audio[row : row + 1]) if row < 2 else ()
        ids, scores = continue_uncached(model, params, prompt, STEPS, *media, stops=(IMAGE, AUDIO))
        assert result["tokens"][row, : len(ids)].tolist() == ids.tolist()
        np.testing.assert_allclose(result["logits"][row, : len(ids)], scores, atol=1e-4)


def test_images_of_other_sizes_move_the_positions_that_follow(make_model, continue_uncached):
    model, params = make_model(mrope_section=(1, 1, 2))
    rng = np.random.default_rng(5)
    images = [rng.normal(size=(h, w, 3)).astype(np.float32) for h, w in [(8, 24), (16, 16)]]
    prompts = [[12, *[IMAGE] * 3, 13, 14], [*[IMAGE] * 4, 15], [16]]
    tokens, valid = spread(prompts, [np.arange(6), np.arange(5) + 3, [2]], 8)
    inputs = Inputs(tokens, valid=valid, images=images)
    result = run(model, params, inputs, stop_tokens=(IMAGE, AUDIO))["tokens"]
    for row, prompt in enumerate(prompts[:2]):
        ids, _ = continue_uncached(
            model, params, prompt, STEPS, [images[row]], stops=(IMAGE, AUDIO)
        )
        assert result[row, : len(ids)].tolist() == ids.tolist()


def test_recordings_in_chunks_of_several_lengths(make_model, continue_uncached):
    model, params = make_model()
    audio = np.random.default_rng(6).normal(size=(3, 16, 8)).astype(np.float32)
    frames = np.array([16, 8, 16])
    prompts = [[12, *[AUDIO] * 3, 13], [*[AUDIO] * 2, 14], [15]]
    tokens, valid = spread(prompts, [np.arange(5), np.arange(3) + 2, [4]], 5)
    inputs = Inputs(tokens, valid=valid, audio=audio, audio_frames=frames)
    result = run(model, params, inputs, stop_tokens=(IMAGE, AUDIO))["tokens"]
    for row, chunks in enumerate([slice(0, 2), slice(2, 3)]):
        ids, _ = continue_uncached(
            model, params, prompts[row], STEPS, None, audio[chunks], frames[chunks], (IMAGE, AUDIO)
        )
        assert result[row, : len(ids)].tolist() == ids.tolist()


def test_a_row_stops_at_its_stop_token_and_repeats_it(make_model):
    model, params = make_model()
    tokens = np.stack([text_of(5, seed) for seed in range(3)])
    free = run(model, params, tokens, max_new_tokens=20)["tokens"]
    stop = next(int(token) for token in free[0] if token != free[0, 0])
    result = run(model, params, tokens, max_new_tokens=20, stop_tokens=(stop,))
    for row in range(3):
        places = np.flatnonzero(free[row] == stop)
        length = places[0] if len(places) else 20
        assert result["lengths"][row] == length
        assert result["tokens"][row, :length].tolist() == free[row, :length].tolist()
        assert (result["tokens"][row, length:] == stop).all()
    assert 0 < result["lengths"][0] < 20


def test_generation_ends_when_all_rows_have_stopped(make_model):
    model, params = make_model()
    tokens = text_of((1, 5), 0).repeat(ROWS, axis=0)
    free = run(model, params, tokens, max_new_tokens=20)["tokens"][0].tolist()
    steps = list(stream(model, params, tokens, max_new_tokens=20, stop_tokens=(free[2],)))
    assert len(steps) == free.index(free[2]) + 1
    logits = run(model, params, tokens, max_new_tokens=20, stop_tokens=(free[2],))["logits"][0]
    assert np.abs(logits[: len(steps)]).max(axis=1).min() > 0
    assert not logits[len(steps) :].any()


def test_stop_tokens_are_those_of_the_configuration_unless_given(make_model):
    model, params = make_model()
    tokens = text_of((ROWS, 3), 0)
    options = {"max_new_tokens": 24, "sampling": dataclasses.replace(DRAWN, temperature=50.0)}
    result = run(model, params, tokens, **options | {"stop_tokens": None})
    lengths = result["lengths"]
    assert lengths.min() < 24
    assert (result["tokens"][np.arange(ROWS), np.minimum(lengths, 23)] == 0)[lengths < 24].all()
    assert (run(model, params, tokens, **options)["lengths"] == 24).all()


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, PENALIZED], ids=["greedy", "drawn", "pen"])
def test_streaming_yields_the_tokens_of_the_batch_form(make_model, sampling):
    model, params = make_model()
    prompts = [text_of(4, 1), text_of(7, 2), text_of(1, 3)]
    tokens, valid = spread(prompts, [np.arange(4) + 3, np.arange(7), [5]], 7)
    inputs, options = Inputs(tokens, valid=valid), {"max_new_tokens": 10, "sampling": sampling}
    options |= {"rng": jax.random.key(7), "stop_tokens": None}
    complete = run(model, params, inputs, **options)["tokens"]
    steps = np.stack(list(stream(model, params, inputs, **options)), axis=1)
    assert steps.tolist() == complete[:, : steps.shape[1]].tolist()


def test_penalties_act_on_what_was_generated(make_model):
    model, params = make_model()
    prompt = text_of((1, 5), 3)
    # Penalties near their neutral values, so that one program runs all three pairs.
    frequency, repetition, both = (
        run(model, params, prompt, max_new_tokens=VOCABULARY, sampling=sampling)
        for sampling in (
            Sampling(repetition_penalty=1 + 1e-9, frequency_penalty=1e6),
            Sampling(repetition_penalty=1e6, frequency_penalty=1e-9),
            Sampling(repetition_penalty=1 + 1e-9, frequency_penalty=0.4),
        )
    )
    assert sorted(frequency["tokens"][0].tolist()) == list(range(VOCABULARY))
    fresh = repetition["tokens"][0, :3].tolist()
    assert len({*fresh, *prompt[0].tolist()}) == 3 + len(set(prompt[0].tolist()))
    # The frequency penalty counts each time.
    counts = np.zeros(VOCABULARY)
    for token, logits in zip(both["tokens"][0], both["logits"][0], strict=True):
        assert token == np.argmax(logits - 0.4 * counts)
        counts[token] += 1
    assert counts.max() >= 3


def test_the_same_key_gives_the_same_tokens(make_model):
    model, params = make_model()
    tokens = text_of((ROWS, 6), 4)

    def draw(seed, temperature=DRAWN.temperature):
        sampling = dataclasses.replace(DRAWN, temperature=temperature)
        options = {"max_new_tokens": 12, "sampling": sampling, "rng": jax.random.key(seed)}
        return run(model, params, tokens, **options)["tokens"].tolist()

    first = draw(0)
    assert draw(0) == first
    assert draw(1) != first
    assert first[0] != first[1]
    assert min(len(set(row)) for row in draw(0, temperature=1e6)) > 6


def test_a_row_does_not_depend_on_the_others_nor_on_padding(make_model):
    model, params = make_model()
    prompts = [text_of(length, length) for length in (3, 9, 6)]
    key = jax.random.key(5)
    keys = jax.random.split(jax.random.key(2), 3)
    options = {"max_new_tokens": 12, "sampling": PENALIZED}
    tokens, valid = spread(prompts, [np.arange(len(p)) + 1 for p in prompts], 12)
    padded = Inputs(tokens, valid=valid)
    together = run(model, params, padded, rng=keys, **options)["tokens"]
    for row, prompt in enumerate(prompts):
        alone = run(model, params, prompt[None], rng=keys[row : row + 1], **options)["tokens"]
        assert alone[0].tolist() == together[row].tolist()
    first = run(model, params, prompts[0][None], rng=key, **options)["tokens"]
    rows = run(model, params, padded, rng=key, **options)["tokens"]
    assert first[0].tolist() == rows[0].tolist()


def test_lengths_of_one_bucket_compile_once(make_model):
    model, params = make_model()
    compiled = []
    for length, steps, stops in ((3, 2, ()), (32, 9, (1,)), (17, 32, (1, 2, 3))):
        tokens = text_of((ROWS, length), 0)
        run(model, params, tokens, max_new_tokens=steps, stop_tokens=stops)
        compiled.append(programs._prefill._cache_size() + programs.decode._cache_size())
    assert len(set(compiled)) == 1


def test_buckets_hold_their_length_and_waste_little():
    sizes = [bucket(length) for length in range(1, 8193)]
    for length, size in enumerate(sizes, start=1):
        assert length <= size < length + max(32, length / 4)
    assert len(set(sizes)) == 28


def test_padded_stops_have_few_lengths():
    assert programs.padded_stops(()).tolist() == [-1] * 8
    assert programs.padded_stops(range(9)).tolist() == [*range(9), *[-1] * 7]


def test_greedy_is_generation_at_temperature_zero(make_model):
    model, params = make_model()
    tokens = text_of((ROWS, 6), 5)
    result = np.asarray(greedy(model, params, tokens, max_new_tokens=8))
    assert result.shape == (ROWS, 8)
    expected = run(model, params, tokens, max_new_tokens=8, stop_tokens=None)
    assert result.tolist() == expected["tokens"].tolist()


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


# Positions of three axes are those of the test below.
@pytest.mark.parametrize("mrope", [(), pytest.param((1, 1, 2), marks=pytest.mark.slow)])
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
        generate(model, params, np.full((2, 10), 12), max_new_tokens=1)


def test_an_image_takes_the_positions_of_its_grid(make_model):
    model, params = make_model(num_layers=1, max_position_embeddings=10, mrope_section=(1, 1, 2))
    # An image of 2 x 2 features takes 2 positions of three axes, though 4 tokens.
    tokens = np.full((2, 9), 12)
    tokens[0, :4] = IMAGE
    tokens[1, 1:5] = IMAGE
    inputs = Inputs(tokens, images=[np.zeros((16, 16, 3), np.float32)] * 2)
    generate(model, params, inputs, max_new_tokens=3, stop_tokens=())
    with pytest.raises(DataError, match="7 positions and 4 new tokens exceed the 10"):
        generate(model, params, inputs, max_new_tokens=4)


@pytest.mark.parametrize("options", [{}, {"sampling": DRAWN}])
def test_scores_that_are_not_finite_are_refused(make_model, options):
    model, params = make_model()
    table = np.array(params["embed"]["weight"])
    table[20] = np.nan
    damaged, prompts = {**params, "embed": {"weight": table}}, np.full((ROWS, 3), 12)
    with pytest.raises(DataError, match="prompt 0: the model's scores are NaN or infinite"):
        run(model, damaged, prompts, max_new_tokens=2, **options)
    with pytest.raises(DataError, match="NaN or infinite"):
        list(stream(model, damaged, prompts, max_new_tokens=2, **options))


# Shapes and models are those of the test of padded rows, whose programs run again.
@pytest.mark.parametrize(
    ("variant", "listed", "message"),
    [
        ({}, False, "prompt 0 holds 3 placeholders of vision, the input gives 4"),
        (
            {"mrope_section": (1, 1, 2)},
            True,
            "the prompts hold 7 placeholders of vision, the input gives 8",
        ),
    ],
    ids=["stacked", "listed"],
)
def test_placeholders_and_features_must_be_as_many(
    make_model, seen_and_heard, variant, listed, message
):
    model, params = make_model(**variant)
    prompts, *media = seen_and_heard
    short = [np.delete(prompts[0], 2), *prompts[1:]]
    with pytest.raises(DataError, match=message):
        run(model, params, seen_and_heard_inputs(short, *media, listed))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_placeholders_of_one_row_or_two_are_counted(make_model, rows, listed):
    model, params = make_model()
    tokens = np.full((rows, 6), 12)
    tokens[-1, :3] = IMAGE
    images = np.zeros((rows, 16, 16, 3), np.float32)
    gives = 4 * rows if listed else 4
    with pytest.raises(DataError, match=f"3 placeholders of vision, the input gives {gives}"):
        generate(model, params, Inputs(tokens, images=list(images) if listed else images))


def test_a_bfloat16_cache_gives_nearly_the_same_scores(make_model):
    model, params = make_model()
    prompt = text_of((ROWS, 9), 3)
    exact = run(model, params, prompt)["logits"][:, 0]
    bfloat16 = DecodeOptions(cache_dtype=jnp.bfloat16)
    result = run(model, params, prompt, max_new_tokens=1, options=bfloat16)["logits"][:, 0]
    assert 0 < np.abs(result - exact).max() < 0.02 * np.abs(exact).max()
