"""Sampling rules against plain loops in float64, and against transformers' processors."""

import math

import jax
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.errors import ConfigError
from glm_edge.generate.sampling import Sampling, process_logits, sample

ROWS, VOCABULARY = 3, 40

# Each combination of rules compiles a program; the values are free.
COMBINATIONS = (
    ("repetition_penalty", "frequency_penalty"),
    ("temperature", "top_p"),
    ("temperature", "top_k", "frequency_penalty"),
    ("temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty"),
)
VALUES = {
    "temperature": st.sampled_from([0.3, 1.0, 1.7]),
    "top_k": st.just(7),
    "top_p": st.sampled_from([1e-6, 0.3, 0.85, 0.999]),
    "repetition_penalty": st.sampled_from([1.3, 0.7]),
    "frequency_penalty": st.sampled_from([0.2, -0.5]),
}
few_samplings = st.sampled_from(COMBINATIONS).flatmap(
    lambda rules: st.builds(Sampling, **{rule: VALUES[rule] for rule in rules})
)
all_samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([None, 1, 7, 1000]),
    top_p=st.sampled_from([None, 1e-6, 0.3, 0.85, 0.999, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.2, -0.5]),
)


def scores_of(seed):
    """Scores, prompt tokens, and counts of generated ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(ROWS, VOCABULARY)).astype(np.float32)
    in_prompt = rng.random((ROWS, VOCABULARY)) < 0.2
    counts = rng.integers(0, 3, (ROWS, VOCABULARY)) * (rng.random((ROWS, VOCABULARY)) < 0.3)
    return logits, in_prompt, counts.astype(np.int32)


def by_loops(row, in_prompt, counts, sampling):
    """Scores of one row after all rules, in float64, one token at a time."""
    scores = [float(score) for score in row]
    for token in range(len(scores)):
        if in_prompt[token] or counts[token]:
            penalty = sampling.repetition_penalty
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        scores[token] -= sampling.frequency_penalty * int(counts[token])
    if sampling.temperature == 0:
        return scores
    scores = [score / sampling.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    retained = order[: sampling.top_k]
    least = sampling.top_p if sampling.uses("top_p") else math.inf
    weights = {token: math.exp(scores[token] - scores[order[0]]) for token in retained}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for token in retained:
        if nucleus and mass >= least:
            break
        nucleus.append(token)
        mass += weights[token] / total
    return [score if token in nucleus else -math.inf for token, score in enumerate(scores)]


process = jax.jit(process_logits)


def check_rules(sampling, seed):
    logits, in_prompt, counts = scores_of(seed)
    actual = process(logits, sampling, in_prompt, counts)
    expected = [by_loops(*row, sampling) for row in zip(logits, in_prompt, counts, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(few_samplings, st.integers(0, 2**16))
def test_rules_equal_plain_loops(sampling, seed):
    check_rules(sampling, seed)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=1000), Sampling(2.0, 1, 1.0)])
def test_rules_that_change_little_equal_plain_loops(sampling):
    check_rules(sampling, 5)


@pytest.mark.slow
@settings(max_examples=40)
@given(all_samplings, st.integers(0, 2**16))
def test_all_combinations_of_rules_equal_plain_loops(sampling, seed):
    check_rules(sampling, seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.3},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 0.01},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.8},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_rules_equal_those_of_transformers(fields, seed):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sampling = Sampling(**fields)
    logits, in_prompt, counts = scores_of(seed)
    text = [np.flatnonzero(row) for row in in_prompt | (counts > 0)]
    width = max(len(row) for row in text)
    ids = torch.tensor(np.stack([np.resize(row, width) for row in text]))
    scores = torch.tensor(logits)
    rules = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
    }
    for field, rule in rules.items():
        if sampling.uses(field) if field != "top_k" else sampling.top_k:
            scores = rule(getattr(sampling, field))(ids, scores)
    result = process(logits, sampling, in_prompt, counts)
    np.testing.assert_allclose(result, scores.numpy(), rtol=1e-6, atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    draws, sampling = 20_000, Sampling(temperature=0.8, top_k=6)
    logits = scores_of(1)[0][:1]
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(sample)(logits.repeat(draws, axis=0), sampling, keys)
    expected = scipy.special.softmax(np.asarray(process(logits, sampling))[0])
    actual = np.bincount(tokens, minlength=VOCABULARY) / draws
    assert (expected > 0).sum() == 6
    np.testing.assert_allclose(actual, expected, atol=5 * math.sqrt(0.25 / draws))
    assert not actual[expected == 0].any()


def test_a_tiny_top_p_and_top_1_take_the_likeliest_token():
    logits = scores_of(2)[0]
    keys = jax.random.split(jax.random.key(1), ROWS)
    for sampling in (Sampling(5.0, top_p=1e-9), Sampling(5.0, top_k=1)):
        assert jax.jit(sample)(logits, sampling, keys).tolist() == logits.argmax(-1).tolist()


def test_equally_likely_tokens_stay_or_go_together():
    logits = np.log(np.float32([[0.4, 0.2, 0.2, 0.2]]))
    retained = np.asarray(process(logits, Sampling(1.0, top_p=0.5))) > -np.inf
    assert retained.tolist() == [[True, True, True, True]]


def test_values_do_not_compile_anew_but_rules_do():
    @jax.jit
    def traced(sampling):
        traces.append(sampling)
        return sampling.temperature

    traces = []
    for sampling in (Sampling(0.5), Sampling(0.7), Sampling(0.7, top_p=1.0)):
        traced(sampling)
    assert len(traces) == 1
    for sampling in (Sampling(), Sampling(0.5, top_p=0.9), Sampling(0.5, top_k=3)):
        traced(sampling)
    assert len(traces) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", math.inf),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ConfigError, match=f"sampling: {field} must be"):
        Sampling(**{field: value})
