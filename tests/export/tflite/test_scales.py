"""Scales that a file cannot hold become ones that it can, with codes rounded anew."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.export.tflite.weights import to_constant
from glm_edge.kernels import quantization
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format

SMALLEST = 2.0**-24


def grouped(weight, dtype="float32", **scales):
    """int4 in groups of 32, a scale for each of 7 steps; `scales` replaces those of rows."""
    form = Format("int4", 32, scale_dtype=dtype)
    scale = np.abs(weight.reshape(len(weight), -1, 32)).max(-1) / 7
    for row, value in scales.items():
        scale[int(row[1:])] = value
    scale = jnp.asarray(scale, dtype)
    codes = quantization.quantize(jnp.asarray(weight), scale, None, "int4")
    return boxes.quantized(codes, scale, None, form)


def weight(seed=0, rows=4, columns=64):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-5, 1e-6, 1e-7, 1e-9, 1e-30, 0.0])
def test_constant_of_small_groups_is_the_nearest_that_is_held(size, dtype):
    dense = weight()
    dense[1] *= size
    dense[2, :32] *= size
    box = grouped(dense, dtype)
    constant, stored, conversions = to_constant("w", box)
    assert constant.scale.dtype == np.float16
    read = constant.scale.astype(np.float32)
    assert read.min() >= SMALLEST
    # XNNPACK reads the first eight bits.
    np.testing.assert_array_equal(read.astype(ml_dtypes.bfloat16).astype(np.float32), read)
    np.testing.assert_array_equal(read, np.asarray(stored.scale).astype(np.float32))
    rounded, original = (np.asarray(boxes.dense(each)) for each in (stored, box))
    # Half a step of the scale that is held, and what bfloat16 takes of the given one.
    steps = np.repeat(read, 32, axis=1)
    limit = np.where(steps > 2.0**-17, 8 * 2.0**-8, 0.51) * steps
    assert (np.abs(rounded - original) <= limit).all()
    raised = [c for c in conversions if "outside the range of float16" in c.rule]
    scale = np.asarray(box.scale).astype(np.float32)
    assert bool(raised) == bool((np.abs(read - scale) > 2.0**-8 * scale).any())


def test_constant_of_zero_scales_changes_no_value():
    dense = weight()
    dense[1] = 0.0
    box = grouped(dense, "bfloat16", _1=0.0)
    _, stored, conversions = to_constant("w", box)
    np.testing.assert_array_equal(boxes.dense(stored), boxes.dense(box))
    (conversion,) = conversions
    assert "2 of 8 scales outside the range of float16" in conversion.rule
    assert not conversion.changes_values


def test_constant_of_channels_has_normal_positive_scales():
    codes = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (4, 8)), jnp.int8)
    scale = jnp.asarray([[1.0], [0.0], [1e-42], [-0.5]])
    box = boxes.quantized(codes, scale, None, Format("int8"))
    constant, stored, conversions = to_constant("w", box)
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_array_equal(constant.scale, np.array([1.0, tiny, tiny, 0.5], np.float32))
    anew = np.asarray(stored.codes())
    np.testing.assert_array_equal(anew[0], codes[0])
    assert not anew[1:3].any()
    np.testing.assert_array_equal(anew[3], np.clip(-np.asarray(codes[3], int), -128, 127))
    assert "3 of 4 scales outside the range of float32" in conversions[0].rule


def test_constant_of_groups_beyond_float16_is_refused():
    with pytest.raises(
        ExportError, match=r"w: a scale of 9.99e\+05 exceeds the range of float16.*use at most"
    ):
        to_constant("w", grouped(weight(), _2=1e6))


def test_small_groups_run_and_agree(small_config, random_params, tmp_path):
    sizes = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64}
    config = small_config(**sizes, vocab_size=64)
    none = dict.fromkeys(("vision", "speech", "image_token_id", "audio_token_id"))
    model = MultimodalGLM(dataclasses.replace(config, **none))

    def box(path, leaf):
        if not path.endswith("gate_up_proj/weight"):
            return leaf
        dense = np.array(leaf)
        dense[7], dense[9, :32], dense[11] = dense[7] * 1e-9, dense[9, :32] * 1e-9, 0.0
        return grouped(dense, "bfloat16", _11=0.0)

    params = boxes.map_with_path(box, random_params(model))
    exported = export.tflite(model, params, tmp_path / "a.tflite", (), 16)
    assert any("outside the range of" in c.rule for c in exported.conversions)
    windows = [export.Window(np.arange(3, 11, dtype=np.int32))]
    result = exported.verify(windows, free_running=0)
    assert result.passed
    assert result.max_abs_error < 1e-3
