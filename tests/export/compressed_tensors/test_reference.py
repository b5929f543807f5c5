"""The library compressed-tensors and transformers read the values of our boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.golden import make_round_trip
from experiments.golden.outputs import compute
from glm_edge import params as boxes
from tests.export.compressed_tensors.boxed import (
    FORMATS,
    MIXED,
    QUICK,
    TINY,
    boxed,
    quantization_of,
)
from tests.marks import slow_unless

TOLERANCE = 1e-5


@pytest.mark.parametrize(
    "format", slow_unless(QUICK.__contains__, [*FORMATS, "int3-g32", "int8-tensor"])
)
def test_its_library_decompresses_our_values_bit_for_bit(dense, write, format):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model, params = dense
    result = write(model, boxed(params, format))
    group = quantization_of(result.path)["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(**group)
    values = decompressed(result.path, scheme, library.PackedQuantizationCompressor, torch)
    for path, leaf in boxes.path_items(result.params):
        if boxes.is_box(leaf):
            np.testing.assert_array_equal(values[hugging_face_name(path)], leaf.rows())


def test_its_library_decompresses_int8_with_int8_activations(dense, write):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model, params = dense
    result = write(model, boxed(params, "int8-channel"), activations="int8_dynamic")
    group = quantization_of(result.path)["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme(**group)
    values = decompressed(result.path, scheme, library.IntQuantizationCompressor, torch)
    for path, leaf in boxes.path_items(result.params):
        if boxes.is_box(leaf):
            np.testing.assert_array_equal(values[hugging_face_name(path)], leaf.rows())


def hugging_face_name(path: str) -> str:
    module = path.removesuffix("/weight").replace("decoder", "model").replace("/", ".")
    return module.replace(".attention.", ".self_attn.")


def decompressed(directory, scheme, compressor, torch):
    """Return the float32 weight of every quantized module, from the library's code."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(directory / "model.safetensors")
    values = {}
    for scale in (name for name in tensors if name.endswith(".weight_scale")):
        module = scale.removesuffix(".weight_scale")
        parts = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{module}.weight")
        }
        # The library computes in the type of the scales.
        parts["weight_scale"] = parts["weight_scale"].to(torch.float32)
        values[module] = compressor.decompress(parts, scheme)["weight"].numpy()
    return values


@pytest.mark.parametrize(
    ("format", "dequantize", "activations"),
    slow_unless(
        lambda case: case[0] is MIXED or "affine" in case[0],
        [
            ("int4-g32", False, "float"),
            ("int8-channel", True, "float"),
            ("int4-g16-affine-scale=float32", True, "float"),
            (MIXED, False, "float"),
            ("int8-channel", True, "int8_dynamic"),
        ],
    ),
    ids=str,
)
def test_transformers_computes_the_same_logits(dense, write, format, dequantize, activations):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("compressed_tensors")
    model, params = dense
    params = boxed(params, format)
    result = write(model, params, activations=activations)
    options = {}
    if dequantize:
        # Without it, transformers 5.23 refuses the packed shape of zero points, and rounds
        # activations. With it, products of codes and scales have the type of the scales.
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        result.path, dtype=torch.float32, **options
    )
    tokens = np.random.default_rng(0).integers(4, 40, (2, 12))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    actual, _ = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens))
    assert 0.5 < np.abs(expected).max() < 5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4v", "glm_ocr", "glmasr"])
def test_transformers_computes_the_same_outputs_of_encoders(write, name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    pytest.importorskip("compressed_tensors")
    model, params = make_round_trip.build(TINY[name])
    formats = {r"^(vision|speech)/layers/": "int8-channel", r"^decoder/": "int4-channel"}
    params = boxed(params, formats)
    result = write(model, params)
    inputs = make_round_trip.draw_inputs(model)
    reference = make_round_trip.open_with_transformers(result.path)
    expected = make_round_trip.reference_outputs(reference, inputs)
    actual = compute(model, params, inputs, greedy_steps=0)
    assert expected
    for key, values in expected.items():
        limit = TOLERANCE * max(1, np.abs(values).max())
        np.testing.assert_allclose(actual[key], values, rtol=0, atol=limit)
