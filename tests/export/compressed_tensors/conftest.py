"""A small dense model, and the export of a model."""

import pytest

import glm_edge as ge
from experiments.golden import make_round_trip
from tests.export.compressed_tensors.boxed import FIELDS


@pytest.fixture(scope="module")
def dense():
    model, params = make_round_trip.build(FIELDS)
    # Logits of the order of 1, so that an absolute tolerance is also a relative one.
    params["head"]["weight"] = params["head"]["weight"] / 4
    return model, params


@pytest.fixture
def write(tmp_path):
    """Return a function that writes and ignores the missing tokenizer."""

    def write(model, params, **options):
        with pytest.warns(UserWarning, match="without a tokenizer"):
            return ge.export.compressed_tensors(model, params, tmp_path / "out", **options)

    return write
