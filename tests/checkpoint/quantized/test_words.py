"""Codes in 32-bit words: the layout, and the inverse."""

import numpy as np
import pytest

from glm_edge.checkpoint.hugging_face.quantized import words
from tests.checkpoint.quantized import packers


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 45])
def test_packed_rows_are_little_endian_integers(bits, columns, monkeypatch):
    monkeypatch.setattr(words, "CHUNK_CODES", 64)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, columns)).astype(np.uint8)
    packed = words.pack_words(codes, bits)
    assert packed.dtype == np.int32
    np.testing.assert_array_equal(packed, np.stack([packers.words(row, bits) for row in codes]))
    assert packed.shape[1] == words.num_words(columns, bits)
    np.testing.assert_array_equal(words.unpack_words(packed, columns, bits), codes)
