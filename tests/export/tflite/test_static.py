"""Files that multiply on calibrated int8 grids give the products of JAX on the same grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import ExportError
from glm_edge.export.tflite.flatbuffer import ActivationGrid, FlatModel
from glm_edge.export.tflite.weights import to_constant
from glm_edge.params import Format, Quantized

multiplied = jax.jit(boxes.linear, static_argnums=2)
LAYER = "decoder/layers/0"
GATE_UP = f"{LAYER}/mlp/gate_up_proj/weight"
GROUPED = f"{LAYER}/mlp/down_proj/weight"
STATIC = {
    f"{LAYER}/{name}/weight"
    for name in (
        *(f"attention/{side}_proj" for side in "qkvo"),
        "mlp/gate_up_proj",
    )
}


def with_grids(box: Quantized, inputs: ActivationGrid, outputs: ActivationGrid) -> Quantized:
    grids = {
        "input_scale": np.float32(inputs.scale),
        "input_zero": np.int8(inputs.zero),
        "output_scale": np.float32(outputs.scale),
        "output_zero": np.int8(outputs.zero),
    }
    return box.replace(**jax.device_put(grids))


@pytest.fixture(scope="module")
def calibrated(text_model, text_params, quantize, mapped):
    """A text model of int8, int4 per channel and int4 in groups, and its parameters."""
    tokens = np.random.default_rng(0).integers(10, 320, (4, 32)).astype(np.int32)

    def box(path, leaf):
        if not boxes.is_matrix(path, leaf):
            return leaf
        forms = {GROUPED: Format.parse("int4-g32"), GATE_UP: Format("int4")}
        return quantize(leaf, forms.get(path, Format("int8")))

    params = mapped(box, text_params)
    calibrate = ge.quantize.activations()
    return text_model, calibrate(text_model, params, [{"tokens": tokens}])[1]


@pytest.fixture(scope="module")
def written(calibrated, tmp_path_factory):
    """Its file."""
    path = tmp_path_factory.mktemp("static") / "a.tflite"
    return export.tflite(*calibrated, path, (32,), 32, prefill_logits=True, forced_lengths=())


@pytest.mark.parametrize("form", [Format("int8"), Format("int4")], ids=str)
def test_one_product_has_the_bits_of_the_static_kernel(form, quantize, product, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1, 16, 256)) + 0.3).astype(np.float32)
    box = quantize(rng.normal(size=(48, 256)).astype(np.float32), form)
    products = x[0] @ np.asarray(box.unbox()).T
    box = with_grids(
        box, ActivationGrid(5.0 / 255, -19), ActivationGrid(0.8 * np.ptp(products) / 255, 7)
    )
    effective, conversions = product(box, tmp_path / "a.tflite")
    assert not conversions
    runner = Interpreter(str(tmp_path / "a.tflite")).get_signature_runner("product_16")
    actual = runner(x=x)["y"]
    expected = np.asarray(multiplied(x, effective, "int8_static"))
    np.testing.assert_array_equal(actual, expected)
    steps = expected / float(box.output_scale) + 7
    assert steps.min() < -127.9 or steps.max() > 126.9, "nothing clips"
    dynamic = multiplied(x, effective, "int8_dynamic")
    assert np.abs(actual - dynamic).max() > float(box.output_scale)


def test_static_file_has_the_grids_bit_for_bit(written, calibrated):
    """File holds our grids bit for bit and says what it leaves out."""
    stored, original = export.read_constants(written.path), dict(boxes.path_items(calibrated[1]))
    effective = dict(boxes.path_items(written.params))
    assert {path for path, constant in stored.items() if constant.inputs} == STATIC
    for path in STATIC:
        box = original[path]
        for side, grid in (("input", stored[path].inputs), ("output", stored[path].outputs)):
            assert np.float32(grid.scale) == np.asarray(getattr(box, f"{side}_scale"))
            assert grid.zero == int(getattr(box, f"{side}_zero"))
            assert getattr(effective[path], f"{side}_scale") is not None
        assert stored[path].data.tobytes() == np.asarray(box.data).tobytes()
    assert [str(c) for c in written.conversions] == [
        f"{GROUPED}: static ranges omitted because int4-g32 has no kernel for them: the runtime "
        "rounds each row to its own range"
    ]
    assert effective[GROUPED].input_scale is None
    assert effective[GROUPED].output_scale is None


def test_matrices_that_read_one_tensor_share_its_rounding(written):
    graph = FlatModel(written.path.read_bytes())
    for subgraph in graph.model.subgraphs:
        names = [graph.operator_name(operator) for operator in subgraph.operators]
        if "FULLY_CONNECTED" in names:
            # q, k and v; o; gate and up.
            assert names.count("QUANTIZE") == 3
            assert names.count("DEQUANTIZE") == len(STATIC)


def test_file_agrees_with_jax_on_its_grids(written):
    result = written.verify(free_running=2, isolated=False)
    assert result.compute == "int8_static"
    assert result.agreement >= 0.99
    assert export.read_metadata(written.path)["verified"] is True
    other = written.verify(compute="int8_dynamic", free_running=0, check=False, isolated=False)
    assert other.mean_kl > 10 * result.mean_kl


def test_a_static_product_is_no_hybrid_one_for_delegates(written):
    rows = [
        row
        for row in export.compatibility(written.path).rows
        if row.operator == "FULLY_CONNECTED" and row.types.endswith("-> int8")
    ]
    assert sum(row.count for row in rows) == 2 * len(STATIC)
    assert all("float activations" not in row.verdicts["qnn"].reason for row in rows)
    assert {row.verdicts["coreml"].accepted for row in rows} == {"no"}


def test_static_ranges_without_a_kernel_are_named(quantize):
    """Static ranges that no kernel reads are left out and named."""
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    full = with_grids(
        quantize(weight, Format("int8")), ActivationGrid(0.02, 3), ActivationGrid(0.1, -5)
    )
    constant, effective, conversions = to_constant("embed/weight", full)
    assert (constant.inputs, effective.input_scale, effective.output_scale) == (None, None, None)
    assert "because it is also used for lookups" in str(conversions[0])
    partial = full.replace(output_scale=None, output_zero=None)
    constant, effective, conversions = to_constant("w", partial)
    assert (constant.inputs, effective.input_scale) == (None, None)
    assert "because its products have none" in str(conversions[0])
    assert conversions[0].changes_values
    narrow = with_grids(
        quantize(weight, Format("int6")), ActivationGrid(0.02, 3), ActivationGrid(0.1, -5)
    )
    constant, effective, _ = to_constant("w", narrow)
    assert constant.type == "int8"
    assert (constant.inputs.zero, constant.outputs.zero) == (3, -5)
    assert float(effective.output_scale) == pytest.approx(0.1)
    with pytest.raises(ExportError, match=r"w: output_scale is 0\.0"):
        to_constant("w", full.replace(output_scale=jnp.float32(0)))
