"""The engine on a model in JAX: tokens and scores against `generate`."""

import jax
import numpy as np
import pytest

import glm_edge as ge
from glm_edge.errors import DataError
from glm_edge.generate import (
    DecodeOptions,
    Sampling,
    drop_vision_tokens,
    early_exit,
    generate,
)
from glm_edge.preprocess import Inputs
from glm_edge.serve import Engine, JaxBackend, Request, draws, jax_backend
from tests.tiny_models import AUDIO, IMAGE, init_glm, tiny_config

DRAWN = Sampling(temperature=1.2, top_k=20, top_p=0.95)
COUNT, BLOCK = 8, 32


@pytest.fixture(scope="module")
def make_engine():
    """Runs requests together on a new engine; returns their tokens, ends and counters."""

    def run(model, params, requests, cache_dtype="float32", one_by_one=False, exits=None):
        backend = JaxBackend(model, params, 3, 160, cache_dtype, lengths=(8, 32), exits=exits)
        engine = Engine(backend)
        engine.start()
        if one_by_one:
            results = [list(engine.submit(request)) for request in requests]
        else:
            results = [list(h) for h in [engine.submit(request) for request in requests]]
        engine.close()
        return results

    return run


@pytest.fixture(scope="module", params=[(), (1, 1, 2)], ids=["plain", "mrope"])
def model_of(request):
    decoder = {"mrope_section": request.param, "max_position_embeddings": 256}
    return init_glm(tiny_config(decoder, {}, {}, eos_token_ids=(0,)))


def prompts_of(config):
    """Prompts of text, an image, two images of different sizes, and a recording."""
    rng = np.random.default_rng(0)

    def text(length):
        return rng.integers(11, 48, length)

    height, width = config.vision_tower.image_size
    images = [rng.random((height, width, 3), np.float32), rng.random((8, 16, 3), np.float32)]
    counts = [config.vision_tower.num_tokens, config.vision_tower.num_tokens // 2]
    speech = config.speech_encoder
    mel = rng.normal(size=(1, speech.num_frames, speech.mel_bins)).astype(np.float32)
    pictured = [text(5), [IMAGE] * counts[0], text(4)]
    return [
        Inputs([text(3)]),
        Inputs([text(70)]),
        Inputs([np.concatenate(pictured)], images=[images[0]]),
        Inputs([np.concatenate([*pictured, [IMAGE] * counts[1], text(9)])], images=images),
        Inputs([np.concatenate([text(2), [AUDIO] * speech.num_tokens, text(6)])], audio=mel),
        Inputs([text(33)]),
    ]


def tokens_of(events):
    assert events[-1].error is None
    return [event.token for event in events[:-1]]


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_tokens_equal_those_of_generate(model_of, make_engine, cache_dtype):
    model, params = model_of
    prompts = prompts_of(model.config)
    if model.config.decoder.mrope_section and cache_dtype == "int8":
        prompts = prompts[2:4]
    samplings = [(Sampling(), DRAWN)[index % 2] for index in range(len(prompts))]
    requests = [
        Request(inputs=prompt, max_new_tokens=COUNT, sampling=sampling, seed=index)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    results = make_engine(model, params, requests, cache_dtype)
    options = DecodeOptions(cache_dtype=cache_dtype)
    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        key = jax.random.key(index)
        alone = generate(
            model, params, prompt, COUNT, sampling, stop_tokens=(), rng=key, options=options
        )
        assert (index, tokens_of(results[index])) == (index, alone.tokens[0].tolist())


def test_reused_rows_give_the_scores_of_computed_ones(model_of, make_engine):
    model, params = model_of
    prompt = prompts_of(model.config)[3]
    tokens = np.concatenate([prompt.tokens[0], np.arange(11, 40)])
    shorter, longer = (Inputs([tokens[:end]], images=prompt.images) for end in (40, None))
    request = Request(inputs=longer, max_new_tokens=COUNT, logprobs=True)
    alone = make_engine(model, params, [request])[0]
    first, second = make_engine(
        model, params, [Request(inputs=shorter, max_new_tokens=2), request], one_by_one=True
    )
    assert first[-1].usage.cached_tokens == 0
    assert second[-1].usage.cached_tokens == BLOCK
    assert tokens_of(second) == tokens_of(alone)
    for one, other in zip(alone[:-1], second[:-1], strict=True):
        np.testing.assert_allclose(
            [value for _, value in one.top], [value for _, value in other.top], atol=1e-5
        )


def test_drafts_and_boxed_parameters_give_the_same_tokens(model_of, make_engine):
    model, params = model_of
    _, boxed, _ = ge.quantize.rtn("int8-channel")(model, params)
    prompt = prompts_of(model.config)[1]
    plain = Request(inputs=prompt, max_new_tokens=COUNT)
    tokens = tokens_of(make_engine(model, boxed, [plain])[0])
    assert tokens == generate(model, boxed, prompt, COUNT, stop_tokens=()).tokens[0].tolist()
    drafted = Request(inputs=prompt, max_new_tokens=COUNT, draft=tokens)
    events = make_engine(model, boxed, [drafted])[0]
    assert tokens_of(events) == tokens
    assert events[-1].usage.accepted_draft_tokens == COUNT - 2


def test_early_exit_is_a_choice_of_each_request(model_of, make_engine):
    model, params = model_of
    exits = early_exit(model, after=[1], threshold=0.03)
    prompt = prompts_of(model.config)[0]
    common = {"inputs": prompt, "max_new_tokens": COUNT, "sampling": DRAWN, "seed": 3}
    requests = [Request(**common, exit_threshold=0.03), Request(**common)]
    early, full = make_engine(model, params, requests, exits=exits)

    def alone(options):
        key = jax.random.key(3)
        return generate(
            model, params, prompt, COUNT, DRAWN, stop_tokens=(), rng=key, options=options
        )

    exited = alone(DecodeOptions(early_exit=exits))
    assert tokens_of(early) == exited.tokens[0].tolist()
    assert tokens_of(full) == alone(DecodeOptions()).tokens[0].tolist()
    skipped = model.config.decoder.num_layers * COUNT - int(exited.layers.sum())
    assert early[-1].usage.skipped_layers == skipped > 0 == full[-1].usage.skipped_layers
    with pytest.raises(DataError, match="no exits"):
        make_engine(model, params, requests[:1])


@pytest.mark.parametrize("score", ["norm", "novelty"])
def test_dropped_vision_tokens_are_those_of_generate(model_of, make_engine, score):
    model, params = model_of
    options = drop_vision_tokens(model, 0.4, score, layer=0)
    prompt = prompts_of(model.config)[3]
    common = {"max_new_tokens": COUNT, "sampling": DRAWN, "seed": 1}
    request = Request(inputs=prompt, vision_tokens=options, **common)
    events = make_engine(model, params, [request])[0]
    decode = DecodeOptions(vision_tokens=options)
    key = jax.random.key(1)
    alone = generate(model, params, prompt, COUNT, DRAWN, stop_tokens=(), rng=key, options=decode)
    assert tokens_of(events) == alone.tokens[0].tolist()
    usage = events[-1].usage
    assert (usage.dropped_image_tokens, usage.image_tokens) == (3, 3)
    attention = Request(inputs=prompt, vision_tokens=drop_vision_tokens(model, 0.5))
    with pytest.raises(DataError, match="layer=0"):
        make_engine(model, params, [attention])


def test_warm_up_leaves_nothing_to_compile(model_of):
    model, params = model_of
    engine = Engine(JaxBackend(model, params, 2, 100, lengths=(8, 16)))
    engine.warm_up()
    programs = jax_backend._extend, jax_backend._step, draws._draw
    before = [program._cache_size() for program in programs]
    engine.start()
    prompts = prompts_of(model.config)
    handles = [
        engine.submit(Request(inputs=prompt, max_new_tokens=3))
        for prompt in prompts
        if prompt.tokens.shape[1] < 90
    ]
    for handle in handles:
        handle.result()
    engine.close()
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots must be positive"),
        ({"capacity": 10_000_000}, "capacity in 1"),
        ({"cache_dtype": "int7"}, "cache_dtype"),
    ],
)
def test_impossible_sizes_are_refused(model_of, options, message):
    with pytest.raises(DataError, match=message):
        JaxBackend(*model_of, **options)
