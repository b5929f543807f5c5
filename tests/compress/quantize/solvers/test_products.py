"""Gram matrices and drifts against float64 numpy."""

import numpy as np
import pytest

from glm_edge.compress.quantize.solvers import products

ROWS, WIDTH = 24, 20
rng = np.random.default_rng(0)
x, x0, weight = (
    rng.normal(size=shape).astype(np.float32) for shape in ((ROWS, WIDTH),) * 2 + ((6, WIDTH),)
)


@pytest.fixture
def narrow_strips(monkeypatch):
    """Strips of eight rows, the last of four."""
    monkeypatch.setattr(products, "_STRIP", 8)
    monkeypatch.setattr(products, "_WIDE", WIDTH)
    products.products.clear_cache()
    yield
    products.products.clear_cache()


def test_symmetric_joins_strips_to_the_gram_matrix(narrow_strips):
    halves = [products.products(part) for part in np.split(x, 2)]
    total = products.added(*halves)
    assert [strip.shape for strip in total.strips] == [(8, 20), (8, 12), (4, 4)]
    assert total.drift is None
    gram = np.asarray(products.symmetric(total.strips))
    np.testing.assert_allclose(gram, np.float64(x).T @ np.float64(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(gram, gram.T)


def test_products_of_drifts_with_and_without_weights():
    drift = (np.float64(x0) - x).T @ np.float64(x)
    for matrix, expected in ((None, drift), (weight, weight @ drift)):
        actual = products.products(x, x0, matrix)
        assert len(actual.strips) == 1
        np.testing.assert_allclose(actual.drift, expected, rtol=1e-4, atol=1e-4)


def test_energy_reads_half_of_a_symmetric_matrix(narrow_strips):
    gram = x.T @ x
    matrix = x0[:, :6][:WIDTH]
    expected = np.trace(np.float64(matrix).T @ np.float64(gram) @ np.float64(matrix))
    np.testing.assert_allclose(products.energy(gram, matrix), expected, rtol=1e-5)
    blocks = np.arange(WIDTH) // 8
    unread = np.where(blocks[:, None] > blocks, np.nan, gram)
    np.testing.assert_allclose(products.energy(unread, matrix), expected, rtol=1e-5)


def test_is_shorter_below_half_the_width_in_float32():
    assert products.is_shorter(9, 20, "float32")
    assert not products.is_shorter(10, 20, "float32")
    assert not products.is_shorter(1, 20, "bfloat16")
