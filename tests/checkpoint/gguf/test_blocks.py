"""Values of GGUF's blocks, compared with two independent implementations."""

import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.checkpoint.gguf.blocks import box, dequantize
from tests.gguf_writer import dequantized, random_tensor

KINDS = ("Q4_0", "Q4_1", "Q8_0")


def stored(kind, shape=(3, 96)):
    tensor = random_tensor(kind, shape, np.random.default_rng(0))
    return tensor, np.frombuffer(tensor[2], np.uint8).reshape(shape[0], -1)


@pytest.mark.parametrize("kind", [*KINDS, "F32", "F16", "BF16"])
def test_dequantize_matches_a_loop_over_blocks(kind):
    tensor, raw = stored(kind)
    values = dequantize(raw, kind)
    assert values.shape == (3, 96)
    np.testing.assert_array_equal(values.astype(np.float32), dequantized(tensor))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_matches_the_package_gguf(kind):
    reference = pytest.importorskip("gguf", reason="needs the extra `models`")
    _, raw = stored(kind)
    expected = reference.quants.dequantize(raw, reference.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(dequantize(raw, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_the_same_in_chunks(kind, monkeypatch):
    _, raw = stored(kind)
    expected = dequantize(raw, kind)
    monkeypatch.setattr("glm_edge.checkpoint.gguf.blocks.CHUNK_BYTES", 1)
    np.testing.assert_array_equal(dequantize(raw, kind), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_box_of_symmetric_blocks_has_their_exact_values(kind):
    _, raw = stored(kind)
    boxed = box(raw, kind)
    assert str(boxed.format) == ("int4" if kind == "Q4_0" else "int8") + "-g32-scale=float16"
    np.testing.assert_array_equal(boxes.dense(boxed), dequantize(raw, kind))


def test_box_of_affine_blocks_has_their_codes_and_values():
    _, raw = stored("Q4_1")
    boxed, values = box(raw, "Q4_1"), dequantize(raw, "Q4_1")
    assert str(boxed.format) == "int4-g32-affine-scale=float16-zero=float32"
    scales = raw.reshape(3, 3, 20)[..., :2].copy().view("<f2")[..., 0]
    np.testing.assert_array_equal(boxed.scale, scales)
    nibbles = raw.reshape(3, 3, 20)[..., 4:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], -1).reshape(3, 96).astype(int)
    np.testing.assert_array_equal(np.asarray(boxed.codes()) + 8, codes)
    # The rounded zero point costs less than 2^-21 of the largest weight of a block.
    largest = np.abs(values).reshape(3, 3, 32).max(-1, keepdims=True)
    error = np.abs(np.asarray(boxes.dense(boxed)) - values).reshape(3, 3, 32)
    assert (error <= 2.0**-21 * largest).all()


def test_box_of_blocks_of_equal_values_is_exact():
    # A block of equal weights has scale 0 and its weight as smallest value, or only zeros.
    blocks = np.zeros((2, 20), np.uint8)
    blocks[0, 2:4] = np.array([-0.75], "<f2").view(np.uint8)
    blocks[:, 4:] = 0xA3
    values = np.asarray(boxes.dense(box(blocks, "Q4_1")))
    np.testing.assert_array_equal(values, np.repeat([[-0.75], [0.0]], 32, axis=1))
