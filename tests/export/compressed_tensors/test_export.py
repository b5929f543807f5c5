"""Directories of compressed-tensors: what they hold, what has no place there, reading them back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from experiments.golden import make_round_trip
from glm_edge import params as boxes
from glm_edge.checkpoint.safetensors import SafetensorsFile
from glm_edge.errors import CheckpointError, ExportError, OutputError
from glm_edge.params import Format
from tests.export.compressed_tensors.boxed import (
    CONFIG,
    DECODER,
    FIELDS,
    FORMATS,
    MIXED,
    QUICK,
    TINY,
    boxed,
    quantization_of,
    rounded,
)
from tests.marks import slow_unless

DOWN = "decoder/layers/0/mlp/down_proj/weight"
HF_DOWN = "model.layers.0.mlp.down_proj"


def assert_same_tree(stored, expected):
    assert jax.tree.structure(stored) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("format", slow_unless(QUICK.__contains__, [*FORMATS, MIXED]), ids=str)
def test_load_returns_the_same_boxes(dense, write, format):
    model, params = dense
    params = boxed(params, format)
    result = write(model, params)
    read_model, read = ge.load(result.path)
    assert read_model.config.decoder == model.config.decoder
    assert_same_tree(read, params)
    assert result.conversions == ()
    inspection = result.verify()
    quantized = sum(map(boxes.is_box, dict(boxes.path_items(params)).values()))
    assert (inspection.quantized, inspection.dense) == (quantized, 29 - quantized)
    assert "no engine ran" in str(inspection)


def test_boxes_keep_the_type_of_a_bfloat16_model(write):
    model, params = make_round_trip.build(FIELDS, "bfloat16")
    params = boxed(params, "int4-g32", dtype="bfloat16")
    result = write(model, params)
    assert json.loads((result.path / CONFIG).read_text())["dtype"] == "bfloat16"
    assert_same_tree(ge.load(result.path)[1], params)


def test_one_scheme_targets_the_class_and_ignores_dense_modules(dense, write):
    model, params = dense
    result = write(model, boxed(params, "int4-g32", where=r"^decoder/layers/0/"))
    written = quantization_of(result.path)
    assert written["format"] == "pack-quantized"
    (group,) = written["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 32)
    layer = "model.layers.1."
    assert set(written["ignore"]) == {
        "lm_head",
        *(f"{layer}self_attn.{name}_proj" for name in "qkvo"),
        f"{layer}mlp.gate_up_proj",
        f"{layer}mlp.down_proj",
    }


def test_several_schemes_target_modules_by_name(dense, write):
    model, params = dense
    written = quantization_of(write(model, boxed(params, MIXED)).path)
    groups = {g["weights"]["num_bits"]: g["targets"] for g in written["config_groups"].values()}
    assert HF_DOWN in groups[4]
    assert "model.layers.1.self_attn.k_proj" in groups[8]
    assert len(groups[4]) == 4
    assert len(groups[8]) == 8
    assert written["ignore"] == ["lm_head"]


def test_a_tied_head_is_ignored(write):
    model, params = make_round_trip.build(FIELDS | {"tie_word_embeddings": True})
    result = write(model, boxed(params, "int8-channel"))
    assert quantization_of(result.path)["ignore"] == ["lm_head"]
    assert ge.load(result.path)[0].config.decoder.tie_embeddings


@pytest.mark.parametrize(
    ("format", "stored"),
    slow_unless(
        lambda case: case[0] == "int3-g32",
        [("int3-g32", "int4-g32"), ("int2-g32-affine", "int4-g32-affine"), ("int6", "int8")],
    ),
)
def test_narrower_integers_are_written_wider_and_listed(dense, write, format, stored):
    model, params = dense
    params = boxed(params, format)
    result = write(model, params)
    assert len(result.conversions) == 12
    assert "the same integers and scales" in str(result.conversions[0])
    box = dict(boxes.path_items(ge.load(result.path)[1]))[DOWN]
    original = dict(boxes.path_items(params))[DOWN]
    assert str(box.format) == str(Format.parse(stored))
    np.testing.assert_array_equal(box.rows(), original.rows())


def test_one_scale_per_matrix_becomes_one_per_row(dense, write):
    model, params = dense
    params = boxed(params, "int8-tensor")
    result = write(model, params)
    assert "one scale per matrix" in str(result.conversions[0])
    box = dict(boxes.path_items(ge.load(result.path)[1]))[DOWN]
    np.testing.assert_array_equal(box.rows(), dict(boxes.path_items(params))[DOWN].rows())


def test_masked_weights_are_written_dense(dense, write):
    model, params = dense
    params = boxed(params, "int8-channel", where="attention")
    params = boxes.map_with_path(
        lambda path, leaf: boxes.mask(leaf, jnp.asarray(leaf > 0)) if path == DOWN else leaf, params
    )
    result = write(model, params)
    assert [change.path for change in result.conversions] == [DOWN]
    down = dict(boxes.path_items(ge.load(result.path)[1]))[DOWN]
    np.testing.assert_array_equal(down, boxes.dense(dict(boxes.path_items(params))[DOWN]))


def test_int8_activations_are_declared_as_int_quantized(dense, write):
    model, params = dense
    params = boxed(params, "int8-channel")
    result = write(model, params, activations="int8_dynamic")
    written = quantization_of(result.path)
    assert written["format"] == "int-quantized"
    inputs = written["config_groups"]["group_0"]["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
    file = SafetensorsFile(result.path / "model.safetensors")
    assert file.tensors[f"{HF_DOWN}.weight"].dtype == "I8"
    assert_same_tree(ge.load(result.path)[1], params)


def test_shards_are_read_back(dense, write):
    model, params = dense
    params = boxed(params, "int4-g32")
    result = write(model, params, shard_bytes=10_000)
    assert len(list(result.path.glob("*.safetensors"))) > 3
    result.verify()


def test_companions_of_the_source_are_copied(tmp_path, dense):
    model, params = dense
    source = ge.shipped("nano")
    result = ge.export.compressed_tensors(
        model, boxed(params, "int4-g32"), tmp_path / "out", source=source
    )
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (result.path / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    "name", slow_unless(lambda name: name == "glm4v", ["glm4v", "glmasr", "glm_ocr"])
)
def test_encoders_are_written_and_read_back(write, name):
    model, params = make_round_trip.build(TINY[name])
    params = boxed(params, "int8-channel", where=r"^(decoder|vision|speech)/layers/")
    result = write(model, params)
    assert_same_tree(ge.load(result.path)[1], params)
    encoders = [path for path, leaf in boxes.path_items(params) if boxes.is_box(leaf)]
    assert any(not path.startswith("decoder") for path in encoders)


@pytest.mark.parametrize(
    ("formats", "options", "pattern"),
    [
        ({DECODER: "nf4-g32"}, {}, "nf4-g32 cannot .* its levels are not integer multiples"),
        ({DECODER: "ternary-g32"}, {}, "the runtime has no kernel for ternary in groups; use"),
        ({DECODER: "ternary"}, {}, "the runtime has no kernel for ternary; use integers of 8 or"),
        ({"^embed": "int8"}, {}, "^embed/weight: .* read embedding and head dense only"),
        ({"^head": "int8"}, {}, "^head/weight: .* read embedding and head dense only"),
        (
            {"q_proj": "int4-g32", "[kv]_proj": "int8"},
            {},
            "q_proj and model.layers.0.self_attn.k_proj have different formats, but engines",
        ),
        ({"[qk]_proj": "int8"}, {}, "have different formats, but engines load them as one"),
        ({"^none": "int8"}, {}, "no weight is quantized; save the model with ge.save"),
        ({DECODER: "int4-g32"}, {"activations": "int8_dynamic"}, "int4-g32 cannot .* use int8 per"),
        ({DECODER: "int8-affine"}, {"activations": "int8_dynamic"}, "int8-channel-affine cannot"),
        ({DECODER: "int8"}, {"activations": "int4"}, "activations 'int4' is unknown"),
    ],
)
def test_weights_without_a_home_are_refused(tmp_path, dense, formats, options, pattern):
    model, params = dense
    with pytest.raises(ExportError, match=pattern) as caught:
        ge.export.compressed_tensors(model, boxed(params, formats), tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_zero_points_between_levels_are_refused(tmp_path, dense):
    model, params = dense
    box = rounded(params["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"],
                  Format.parse("int4-g32-affine"))  # fmt: skip
    box = box.replace(
        zero=jnp.full(box.zero.shape, 0.5, jnp.float16),
        format=Format.parse("int4-g32-affine-zero=float16"),
    )
    changed = boxes.map_with_path(lambda path, leaf: box if path == DOWN else leaf, params)
    with pytest.raises(ExportError, match=f"{DOWN}: .* zero points must be integers"):
        ge.export.compressed_tensors(model, changed, tmp_path / "out")


def test_models_without_a_config_are_refused(tmp_path, dense):
    model, params = ge.load(ge.shipped("nano"))
    with pytest.raises(ExportError, match=r"config\.json cannot express this model"):
        ge.export.compressed_tensors(model, params, tmp_path / "out")


def test_an_existing_directory_is_replaced_only_on_request(dense, write):
    model, params = dense
    params = boxed(params, "int4-g32")
    result = write(model, params)
    with pytest.raises(OutputError, match="exists and is not empty"):
        ge.export.compressed_tensors(model, params, result.path)
    write(model, params, overwrite=True)


def test_verify_notices_other_weights(dense, write):
    model, params = dense
    result = write(model, boxed(params, "int4-g32"))
    with pytest.raises(ExportError, match="takes no options"):
        result.verify(threshold=0.9)
    other = jax.tree.map(lambda array: array, params)
    other["decoder"]["norm"]["weight"] = params["decoder"]["norm"]["weight"] * 2
    shutil.rmtree(result.path)
    write(model, boxed(other, "int4-g32"))
    with pytest.raises(ExportError, match="decoder/norm/weight differs from the model's"):
        result.verify()


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"format": "float-quantized"}, "'format' is 'float-quantized', which is unsupported"),
        ({"quantization_status": "frozen"}, "'quantization_status' is 'frozen'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "'kv_cache_scheme' is unsupported"),
        ({"config_groups": None}, "'config_groups' is missing"),
        ({"config_groups": {}}, "do not fit the schemes of config_groups: none"),
        (
            {"config_groups": {"g": {"weights": {"num_bits": 8}}}},
            "fit the schemes .*: int8-channel",
        ),
        ({"config_groups": {"g": {"weights": {"num_bits": 9}}}}, "'num_bits' is 9; it must be 2"),
        ({"config_groups": {"g": {"weights": {"type": "float"}}}}, "'type' is 'float'"),
        ({"config_groups": {"g": {"weights": {"strategy": "tensor"}}}}, "'strategy' is 'tensor'"),
        (
            {"config_groups": {"g": {"weights": {}, "input_activations": {"dynamic": False}}}},
            "static ranges of activations are unsupported",
        ),
    ],
)
def test_unsupported_options_are_named_when_read(dense, write, change, pattern):
    model, params = dense
    result = write(model, boxed(params, "int4-g32"))
    fields = json.loads((result.path / CONFIG).read_text())
    fields["quantization_config"] |= change
    (result.path / CONFIG).write_text(json.dumps(fields))
    with pytest.raises((CheckpointError, ge.errors.ConfigError), match=pattern) as caught:
        ge.load(result.path)
    assert "\n" not in str(caught.value)
