"""Directories of compressed-tensors: their values in its library, transformers and `ge.load`."""

import json
import re
import shutil
from pathlib import Path

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

CONFIG = "config.json"
TINY = Path(__file__).parents[1] / "checkpoint" / "tiny_configs.json"
FIELDS = {
    "model_type": "glm4",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "eos_token_id": [2, 3],
    "pad_token_id": 2,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 9000.0,
        "partial_rotary_factor": 0.5,
    },
}
DECODER = r"^decoder/"
DOWN, GATE = "decoder/layers/0/mlp/down_proj/weight", "decoder/layers/0/mlp/gate_up_proj/weight"
HF_DOWN = "model.layers.0.mlp.down_proj"
# Logits of a random model; its head is scaled so that they are of the order of 1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def dense():
    model, params = make_round_trip.build(FIELDS)
    params["head"]["weight"] = params["head"]["weight"] / 4
    return model, params


def boxed(params, format: str | dict[str, str], where: str = DECODER, dtype: str = "float32"):
    """Round the matrices of a tree in numpy: one format, or one per pattern."""
    formats = {where: format} if isinstance(format, str) else format

    def box(path, leaf):
        chosen = [text for pattern, text in formats.items() if re.search(pattern, path)]
        if not chosen or not boxes.is_matrix(path, leaf):
            return leaf
        return rounded(leaf, Format.parse(chosen[0]), dtype)

    return boxes.map_with_path(box, params)


def rounded(leaf, form: Format, dtype: str = "float32"):
    weight = np.asarray(leaf, np.float32)
    groups = form.scale_shape(weight.shape)[1]
    low, high = -(2 ** (int(form.bits) - 1)), 2 ** (int(form.bits) - 1) - 1
    if form.qtype.startswith(("ternary", "nf4")):
        low, high = -1, 1
    grouped = weight.reshape(len(weight), groups, -1)
    if form.symmetric:
        scale, zero = np.abs(grouped).max(-1) / -low, None
    else:
        scale = (grouped.max(-1) - grouped.min(-1)) / (high - low)
        zero = np.clip(np.round(low - grouped.min(-1) / scale), low, high)
    if form.group_size == "tensor":
        scale = scale.max(keepdims=True)
    scale = np.asarray(jnp.asarray(scale, form.scale_dtype))
    steps = grouped / scale.astype(np.float32)[..., None] + (0 if zero is None else zero[..., None])
    codes = np.clip(np.round(steps), low, high).astype(np.int8).reshape(weight.shape)
    return boxes.quantized(
        jnp.asarray(codes), jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero, jnp.int8), form, dtype=dtype,
    )  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """Return a function that writes and ignores the missing tokenizer."""

    def write(model, params, **options):
        with pytest.warns(UserWarning, match="without a tokenizer"):
            return ge.export.compressed_tensors(model, params, tmp_path / "out", **options)

    return write


def assert_same_tree(stored, expected):
    assert jax.tree.structure(stored) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def quantization_of(directory):
    return json.loads((directory / CONFIG).read_text())["quantization_config"]


FORMATS = (
    "int4-g32",
    "int4-g16-affine",
    "int8-channel",
    "int8-channel-affine-scale=bfloat16",
    "int4-channel-scale=float16",
    "int8-g32",
)
MIXED = {r"^decoder/.*attention": "int8-channel", r"^decoder/.*mlp": "int4-g32"}


@pytest.mark.parametrize("format", [*FORMATS, MIXED], ids=str)
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
    [("int3-g32", "int4-g32"), ("int2-g32-affine", "int4-g32-affine"), ("int6", "int8")],
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
    "name", ["glm4v", "glmasr", pytest.param("glm_ocr", marks=pytest.mark.slow)]
)
def test_encoders_are_written_and_read_back(write, name):
    model, params = make_round_trip.build(json.loads(TINY.read_text())[name])
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


@pytest.mark.parametrize("format", [*FORMATS, "int3-g32", "int8-tensor"])
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
    [
        ("int4-g32", False, "float"),
        ("int8-channel", True, "float"),
        ("int4-g16-affine-scale=float32", True, "float"),
        (MIXED, False, "float"),
        ("int8-channel", True, "int8_dynamic"),
    ],
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
