"""Core ML packages hold our integers under the names of our functions; nothing here runs them."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_edge import export
from glm_edge import params as boxes
from glm_edge.errors import ExportError, MissingExtraError, OutputError
from glm_edge.export.common.jaxpr import limit_rank
from glm_edge.export.common.signatures import signatures
from glm_edge.export.coreml.export import coreml
from glm_edge.export.coreml.reader import METADATA, read_weights
from glm_edge.export.coreml.verify import inspect
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format, Quantized

coremltools = pytest.importorskip("coremltools")
pytest.importorskip("stablehlo_coreml")

SLOTS, LENGTH = 64, 8


BLOCKS = Format("int4", 32, scale_dtype="bfloat16")
FORMS = {
    "decoder/layers/0/attention/q_proj/weight": Format("int4"),
    "decoder/layers/0/attention/k_proj/weight": Format("int4", None, False),
    "decoder/layers/0/attention/v_proj/weight": Format("int8", 32),
    "decoder/layers/0/mlp/gate_up_proj/weight": Format("int2"),
    "decoder/layers/0/mlp/down_proj/weight": Format("int8", 64, False),
    "embed/weight": Format("int4"),
}


@pytest.fixture(scope="module")
def model(small_config):
    """One layer each: the converter takes a second or two a layer."""
    config = small_config()
    vision = dataclasses.replace(
        config.vision, image_size=(32, 32), num_layers=1, window=(4, 4), global_layers=()
    )
    return MultimodalGLM(dataclasses.replace(config, vision=vision))


@pytest.fixture(scope="module")
def dense_params(model, random_params):
    return random_params(model)


@pytest.fixture(scope="module")
def params(dense_params, quantize):
    """Its parameters in every form that a package can hold."""

    def box(path, leaf):
        if path.endswith("o_proj/weight") and path.startswith("decoder"):
            return np.asarray(leaf, np.float16)
        if not boxes.is_matrix(path, leaf) or path == "speech/linear_2/weight":
            return leaf
        form = BLOCKS if path.startswith("vision") else Format("int8")
        made = quantize(leaf, FORMS.get(path, form))
        return made if made.zero is None else made.replace(zero=made.zero + 1)

    return boxes.map_with_path(box, dense_params)


@pytest.fixture(scope="module")
def exported_coreml(model, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("coreml") / "small.mlpackage"
    return coreml(model, params, path, prefill_lengths=(LENGTH,), cache_slots=SLOTS)


@pytest.fixture(scope="module")
def specification(exported_coreml):
    return coremltools.models.MLModel(str(exported_coreml.path), skip_model_load=True).get_spec()


def test_package_holds_our_integers_and_scales_bit_for_bit(exported_coreml, params):
    stored = read_weights(exported_coreml.path)
    boxed = {p: leaf for p, leaf in boxes.path_items(params) if isinstance(leaf, Quantized)}
    assert stored.keys() == boxed.keys()
    assert stored.keys() > FORMS.keys()
    for path, weight in stored.items():
        leaf = boxed[path]
        assert weight.type == ("int8" if leaf.format.qtype == "int8" else "int4")
        assert weight.group_size == (leaf.format.group_size or 0)
        np.testing.assert_array_equal(weight.values, np.asarray(leaf.codes()))
        np.testing.assert_array_equal(weight.scale, np.asarray(leaf.scale.astype(jnp.float32)))
        if leaf.zero is not None:
            np.testing.assert_array_equal(weight.zero, np.asarray(leaf.zero))


def test_conversions_are_reported(exported_coreml):
    rules = {conversion.path: conversion.rule for conversion in exported_coreml.conversions}
    assert rules == {
        "decoder/layers/0/mlp/gate_up_proj/weight": "int2 written as int4: the same integers and "
        "scales",
        "decoder/layers/0/attention/o_proj/weight": "float16 written as float32",
    }
    assert not any(conversion.changes_values for conversion in exported_coreml.conversions)


def test_specification_names_our_functions_inputs_and_outputs(
    exported_coreml, specification, model
):
    described = {function.name: function for function in specification.description.functions}
    offered = {s.name: s for s in signatures(model, (LENGTH,), SLOTS)}
    assert described.keys() == offered.keys() == set(exported_coreml.signatures)
    # iOS 18, the first that has blocks of int4.
    assert specification.specificationVersion >= 9
    for name, signature in offered.items():
        shapes = {i.name: tuple(i.type.multiArrayType.shape) for i in described[name].input}
        assert shapes == {n: struct.shape for n, struct in signature.inputs.items()}
    outputs = {output.name for output in described["decode"].output}
    assert outputs >= {"logits", "kv_cache_k_0_out", "kv_cache_v_0_out"}
    described = json.loads(specification.description.metadata.userDefined[METADATA])
    assert described["cache_slots"] == SLOTS
    assert described["verified"] is False


def test_products_read_packed_constants(specification, params):
    block = specification.mlProgram.functions["decode"].block_specializations["CoreML8"]
    kinds = [operation.type for operation in block.operations]
    boxed = [p for p, leaf in boxes.path_items(params["decoder"]) if isinstance(leaf, Quantized)]
    # And the head, which is the embedding.
    assert kinds.count("constexpr_blockwise_shift_scale") == len(boxed) + 1
    packed = {
        operation.outputs[0].name
        for operation in block.operations
        if operation.type == "constexpr_blockwise_shift_scale"
    }
    read = {
        argument.name
        for operation in block.operations
        if operation.type == "matmul"
        for argument in operation.inputs["y"].arguments
    }
    assert packed <= read


def test_functions_share_their_weights(exported_coreml, specification):
    places = {}
    for function in specification.mlProgram.functions.values():
        for operation in function.block_specializations["CoreML8"].operations:
            if operation.type == "constexpr_blockwise_shift_scale":
                data = operation.inputs["data"].arguments[0].value.blobFileValue.offset
                places.setdefault(operation.outputs[0].name, []).append(data)
    assert {len(set(result)) for result in places.values()} == {1}
    # `embed`, `embed_8`, and the head in `decode`.
    assert len(places["embed_weight"]) == 3
    files = [file for file in exported_coreml.path.rglob("*") if file.is_file()]
    assert exported_coreml.file_bytes == sum(file.stat().st_size for file in files)


def test_what_cannot_run_is_read_and_says_so(exported_coreml, params):
    result = exported_coreml.verify()
    boxed = [path for path, leaf in boxes.path_items(params) if isinstance(leaf, Quantized)]
    assert (result.functions, result.weights) == (len(exported_coreml.signatures), len(boxed))
    assert "the package was not run" in str(result)
    assert export.read_metadata(exported_coreml.path)["verified"] is False
    with pytest.raises(
        ExportError, match="Core ML packages are not run, so verify takes no options"
    ):
        exported_coreml.verify(threshold=0.5)


def test_one_other_byte_of_a_weight_is_found(exported_coreml, model, tmp_path):
    path = "decoder/layers/0/attention/q_proj/weight"
    stored = read_weights(exported_coreml.path)[path]
    low, high = stored.values.reshape(-1)[0::2], stored.values.reshape(-1)[1::2]
    packed = ((low & 15) | ((high & 15) << 4)).astype(np.uint8).tobytes()
    changed = shutil.copytree(exported_coreml.path, tmp_path / "a.mlpackage")
    file = changed / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(file.read_bytes())
    content[content.index(packed)] ^= 1
    file.write_bytes(content)
    with pytest.raises(ExportError, match=f"damaged, .*1 values of {path}"):
        inspect(changed, model, exported_coreml.params)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match=f"^{changed}: "):
        inspect(changed, model, exported_coreml.params)


def test_a_package_of_other_functions_is_refused(exported_coreml, model, tmp_path):
    other = model.clone(config=dataclasses.replace(model.config, name="other"))
    with pytest.raises(ExportError, match="contains a different model than other"):
        inspect(exported_coreml.path, other, exported_coreml.params)
    changed = shutil.copytree(exported_coreml.path, tmp_path / "a.mlpackage")
    file = changed / "Data/com.apple.CoreML/model.mlmodel"
    specification = coremltools.proto.Model_pb2.Model()
    specification.ParseFromString(file.read_bytes())
    described = {function.name: function for function in specification.description.functions}
    described["decode"].input[0].type.multiArrayType.shape[0] += 1
    file.write_bytes(specification.SerializeToString())
    with pytest.raises(
        ExportError, match=r"not a complete glm_edge Core ML export.*inputs of decode"
    ):
        inspect(changed, model, exported_coreml.params)
    del specification.description.functions[-1]
    file.write_bytes(specification.SerializeToString())
    with pytest.raises(ExportError, match=r"not a complete glm_edge Core ML export.*functions"):
        inspect(changed, model, exported_coreml.params)
    with pytest.raises(ExportError, match="not a complete glm_edge Core ML export"):
        inspect(tmp_path, model, exported_coreml.params)


def test_codes_of_four_bits_are_packed(exported_coreml, specification, params):
    blob = exported_coreml.path / "Data/com.apple.CoreML/weights/weight.bin"
    content, lengths = blob.read_bytes(), {}
    for function in specification.mlProgram.functions.values():
        for operation in function.block_specializations["CoreML8"].operations:
            if operation.type == "constexpr_blockwise_shift_scale":
                at = operation.inputs["data"].arguments[0].value.blobFileValue.offset
                # The second number of the record before the bytes.
                length = int.from_bytes(content[at + 8 : at + 16], "little")
                lengths[operation.outputs[0].name] = length
    for path, leaf in boxes.path_items(params):
        if isinstance(leaf, Quantized):
            codes_a_byte = 1 if leaf.format.qtype == "int8" else 2
            assert lengths[path.replace("/", "_")] == leaf.codes().size // codes_a_byte


def test_a_disk_that_fills_up_is_an_error_of_output(model, params, tmp_path, monkeypatch):
    def full(*_):
        # As coremltools 9.0 says it.
        raise RuntimeError("[MIL FileWriter]: Unknown error occurred while writing data")

    monkeypatch.setattr(sys.modules["glm_edge.export.coreml.export"], "_function", full)
    with pytest.raises(OutputError, match=r"cannot be written: .*writing data"):
        coreml(model, params, tmp_path / "a.mlpackage", (), SLOTS)
    assert not list(tmp_path.iterdir())


def test_six_axes_become_five_with_the_same_result():
    def windows(x):
        cut = jnp.transpose(x.reshape(1, 2, 3, 4, 5, 6), (0, 1, 3, 2, 4, 5))
        cells = cut.reshape(1, 2, 4, 3, 30)
        return cut.reshape(8, -1), jnp.stack([cells, 2.0 * cells], axis=3).reshape(8, -1)

    def most_axes(function):
        equations = jax.make_jaxpr(function)(x).eqns
        return max(variable.aval.ndim for e in equations for variable in e.outvars)

    x = np.random.default_rng(0).normal(size=(1, 6, 4, 30)).astype(np.float32)
    assert most_axes(windows) == 6
    assert most_axes(limit_rank(windows)) == 5
    actual, expected = (jax.jit(function)(x) for function in (limit_rank(windows), windows))
    for result, reference in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(result, reference)


def test_what_cannot_be_written_is_refused(model, dense_params, quantize, tmp_path):
    with pytest.raises(ExportError, match=r"must end in \.mlpackage"):
        coreml(model, dense_params, tmp_path / "a")
    taken = tmp_path / "a.mlpackage"
    taken.mkdir()
    with pytest.raises(OutputError, match="exists"):
        coreml(model, dense_params, taken)
    path = "decoder/layers/0/mlp/down_proj/weight"

    def box(where, leaf):
        made = quantize(leaf, Format("int4", 32)) if where == path else leaf
        return (
            made
            if where != path
            else boxes.quantized(made.codes() & 15, made.scale, None, Format("nf4", 32))
        )

    with pytest.raises(ExportError, match="its levels are not integer multiples"):
        coreml(model, boxes.map_with_path(box, dense_params), tmp_path / "b.mlpackage")
    assert list(tmp_path.iterdir()) == [taken]


def test_a_missing_extra_is_named(model, params, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "coremltools", None)
    with pytest.raises(MissingExtraError, match="glm_edge\\[coreml\\]"):
        coreml(model, params, tmp_path / "a.mlpackage")
    assert not list(tmp_path.iterdir())
