"""Inputs made by hand: checks, mappings and pytrees."""

import jax
import numpy as np
import pytest

from glm_edge.errors import DataError
from glm_edge.preprocess import Inputs

TOKENS = [[5, 6, 7], [8, 9, 0]]


def test_inputs_of_tokens_have_no_padding():
    inputs = Inputs(TOKENS)
    np.testing.assert_array_equal(inputs.tokens, TOKENS)
    assert inputs.valid.all()
    assert inputs.valid.shape == (2, 3)
    assert list(inputs) == ["tokens", "valid"]


def test_inputs_are_a_mapping_of_what_they_hold():
    image = np.zeros((4, 4, 3))
    inputs = Inputs(TOKENS, valid=[[1, 1, 1], [1, 1, 0]], images=[image])
    assert list(inputs) == ["tokens", "valid", "images"]
    assert dict(**inputs)["images"][0] is image
    assert inputs["valid"].dtype == bool
    assert inputs.get("audio") is None
    with pytest.raises(KeyError):
        inputs["audio"]


def test_inputs_of_reads_inputs_mappings_and_arrays():
    inputs = Inputs(TOKENS, valid=[[1, 1, 1], [1, 1, 0]])
    assert Inputs.of(inputs) is inputs
    for source in (dict(inputs), {"tokens": TOKENS, "valid": inputs.valid, "images": None}):
        read = Inputs.of(source)
        np.testing.assert_array_equal(read.tokens, inputs.tokens)
        np.testing.assert_array_equal(read.valid, inputs.valid)
    assert Inputs.of(np.array(TOKENS)).valid.all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"tokens": TOKENS, "image": []}, "inputs have no 'image'; known: tokens, valid, images"),
        ({"valid": TOKENS}, "inputs lack 'tokens'; known: tokens"),
        ({"tokens": TOKENS, "valid": [[True]]}, r"valid has shape \(1, 1\), the prompts \(2, 3\)"),
        ("tap the star", "prompts must be numbers"),
        ([[0.5]], "prompts must be integers"),
        ([[]], "prompts must be integers"),
    ],
)
def test_inputs_of_refuses_other_sources(source, message):
    with pytest.raises(DataError, match=message):
        Inputs.of(source)


def test_inputs_are_a_pytree_of_their_arrays():
    inputs = Inputs(TOKENS, images=[np.zeros((4, 4, 3)), np.ones((8, 4, 3))])
    assert [leaf.shape for leaf in jax.tree.leaves(inputs)] == [
        (2, 3),
        (2, 3),
        (4, 4, 3),
        (8, 4, 3),
    ]
    total = jax.jit(lambda inputs: inputs.tokens.sum() + inputs.images[1].sum())(inputs)
    assert total == np.sum(TOKENS) + 96
