"""The table of what each format stores of a weight."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.export.common import weights
from glm_edge.kernels import quantization
from glm_edge.params import Format

FORMATS = [value for value in vars(weights).values() if isinstance(value, weights.WeightFormat)]


@pytest.mark.parametrize("target", FORMATS, ids=lambda target: f"{target.name}-{target.stacked}")
def test_stored_types_hold_all_codes(target):
    for table in (target.per_channel, target.in_groups):
        for qtype, stored in table.items():
            low, high = quantization.code_range(qtype)
            least, most = quantization.code_range(stored)
            assert least <= low
            assert high <= most


@pytest.mark.parametrize("target", [weights.ONNX, weights.COREML], ids=lambda target: target.name)
def test_to_weight_restores_affine_groups(target):
    form = Format("int4", 32, False)
    dense = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    scale, zero = jnp.full((4, 2), 0.25), jnp.full((4, 2), 3, jnp.int8)
    box = boxes.quantized(quantization.quantize(dense, scale, zero, "int4"), scale, zero, form)
    weight, conversions = weights.to_weight("w", box, target)
    assert (weight.type, weight.group_size, conversions) == ("int4", 32, [])
    np.testing.assert_array_equal(weights.dequantize(weight), box.unbox())
    assert weights.check_weights({"w": weight}, weights.to_params({"w": box}, {"w": weight}), "a")
    wrong = dataclasses.replace(weight, zero=weight.zero + 1)
    with pytest.raises(ExportError, match="8 zero of w differ from the model's"):
        weights.check_weights({"w": wrong}, {"w": box}, "a")


@pytest.mark.parametrize(
    "target",
    [target for target in FORMATS if "ternary" in target.per_channel],
    ids=lambda target: f"{target.name}-{target.stacked}",
)
def test_to_weight_refuses_zero_points_between_levels(target):
    scale = jnp.full((4, 2), 0.25, jnp.bfloat16)
    codes = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (4, 64)), jnp.int8)
    form = Format.parse("ternary-g32-affine")
    box = boxes.quantized(codes, scale, jnp.full((4, 2), 0.25), form)
    with pytest.raises(ExportError, match=r"w: ternary-g32-affine cannot .*without -affine"):
        weights.to_weight("w", box, target)
    if target.zero_points:
        integers = dataclasses.replace(form, zero_dtype="int8")
        box = boxes.quantized(codes, scale, jnp.ones((4, 2), jnp.int8), integers)
        weight, _ = weights.to_weight("w", box, target)
        np.testing.assert_array_equal(weights.dequantize(weight), box.unbox())
