"""GPTQ and AWQ checkpoints of others as boxes: values, formats, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import glm_edge as ge
from glm_edge import params as boxes
from glm_edge.checkpoint.lazy import open_lazily
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.errors import CheckpointError, ConfigError
from tests.checkpoint.quantized import packers

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 16,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
LAYER = "decoder/layers/0/"


def path_of(module: str) -> str:
    return f"{LAYER}{module.replace('self_attn', 'attention').replace('.', '/')}/weight"


def drawn(bits=4, group_size=16, symmetric=False):
    """Draw every module of the layer."""
    modules = {}
    for seed, (name, shape) in enumerate(packers.MODULES.items()):
        modules[name] = packers.draw(shape, bits, group_size, seed)
        if symmetric:
            modules[name]["zeros"][:] = 2 ** (bits - 1)
    return modules


def write_gptq(directory, modules, bits=4, offset=1, **options):
    quantization = GPTQ | {"bits": bits} | options
    packed = {name: packers.gptq(matrix, bits, offset) for name, matrix in modules.items()}
    return packers.write(directory, quantization, packed)


def write_awq(directory, modules, **options):
    packed = {name: packers.awq(matrix) for name, matrix in modules.items()}
    return packers.write(directory, AWQ | options, packed)


def assert_values(params, modules, format: str):
    leaves = dict(boxes.path_items(params))
    assert sum(boxes.is_box(leaf) for leaf in leaves.values()) == len(modules)
    for name, matrix in modules.items():
        box = leaves[path_of(name)]
        assert str(box.format) == format
        assert box.dtype == "float16"
        np.testing.assert_array_equal(box.rows(), packers.dequantized(matrix))


def change_tensor(directory, name, change):
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {key: file.read(key) for key in file.tensors}
    changed = change(tensors.pop(name))
    write_safetensors(file.path, tensors | ({} if changed is None else {name: changed}))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("bits", "group_size", "grouping"),
    [(4, 16, "g16"), (4, -1, "channel"), (8, 16, "g16"), (3, 32, "g32"), (2, 16, "g16")],
)
def test_load_reads_gptq_of_both_conventions(tmp_path, offset, bits, group_size, grouping):
    modules = drawn(bits, group_size)
    stored_format = {0: "gptq_v2", 1: "gptq"}[offset]
    directory = write_gptq(
        tmp_path / "q", modules, bits, offset, group_size=group_size,
        checkpoint_format=stored_format,
    )  # fmt: skip
    _, params = ge.load(directory)
    assert_values(params, modules, f"int{bits}-{grouping}-affine-scale=float16")


def test_load_reads_symmetric_gptq_without_zero_points(tmp_path):
    modules = drawn(symmetric=True)
    model, params = ge.load(write_gptq(tmp_path / "q", modules, sym=True))
    assert_values(params, modules, "int4-g16-scale=float16")
    logits, _ = jax.jit(model.apply)({"params": params}, jnp.ones((1, 3), jnp.int32))
    assert np.isfinite(logits).all()


def test_load_reads_awq(tmp_path):
    modules = drawn()
    model, params = ge.load(write_awq(tmp_path / "q", modules))
    assert_values(params, modules, "int4-g16-affine-scale=float16")
    assert ge.build(tmp_path / "q").config == model.config


def test_load_reads_the_older_names_of_awq_options(tmp_path):
    modules = drawn()
    write_awq(tmp_path / "q", modules)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"
    }  # fmt: skip
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert_values(ge.load(tmp_path / "q")[1], modules, "int4-g16-affine-scale=float16")


def test_load_places_boxes_on_a_mesh(tmp_path):
    directory = write_awq(tmp_path / "q", drawn())
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    box = ge.load(directory, mesh=mesh)[1]["decoder"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(box))


def test_open_lazily_reads_one_box(tmp_path):
    modules = drawn()
    directory = write_awq(tmp_path / "q", modules)
    opened = open_lazily(directory)
    _, params = ge.load(directory)
    leaves = dict(boxes.path_items(params))
    abstract = opened.abstract
    assert {path: boxes.is_box(leaf) for path, leaf in abstract.items()} == {
        path: boxes.is_box(leaf) for path, leaf in leaves.items()
    }
    path = path_of("mlp.down_proj")
    box = opened.read([path])[path]
    assert jax.tree.structure(box) == jax.tree.structure(leaves[path])
    np.testing.assert_array_equal(box.data, leaves[path].data)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract[path]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), box
    )


def test_load_drops_only_a_bias_of_zeros(tmp_path):
    directory = write_gptq(tmp_path / "q", drawn())
    name = "model.layers.0.mlp.down_proj.bias"
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {key: file.read(key) for key in file.tensors}
    write_safetensors(file.path, tensors | {name: np.zeros(32, np.float16)})
    assert path_of("mlp.down_proj") in dict(boxes.path_items(ge.load(directory)[1]))
    write_safetensors(file.path, tensors | {name: np.ones(32, np.float16)})
    with pytest.raises(CheckpointError, match=r"down_proj\.bias' has no place"):
        ge.load(directory)


def test_load_splits_a_fused_matrix_of_the_older_dialect(tmp_path):
    """chatglm stores queries, keys and values as one matrix."""
    fields = {
        "model_type": "chatglm", "padded_vocab_size": 37, "num_layers": 1, "hidden_size": 32,
        "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
        "kv_channels": 8, "ffn_hidden_size": 64, "add_qkv_bias": False, "torch_dtype": "float16",
    }  # fmt: skip
    layer = "transformer.encoder.layers.0"
    modules = {
        "self_attention.query_key_value": (64, 32),
        "self_attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (128, 32),
        "mlp.dense_4h_to_h": (32, 64),
    }
    matrices = {
        name: packers.draw(shape, 4, 16, seed) for seed, (name, shape) in enumerate(modules.items())
    }
    tensors = {
        "transformer.embedding.word_embeddings.weight": np.ones((37, 32), np.float16),
        "transformer.encoder.final_layernorm.weight": np.ones(32, np.float16),
        "transformer.output_layer.weight": np.ones((37, 32), np.float16),
        f"{layer}.input_layernorm.weight": np.ones(32, np.float16),
        f"{layer}.post_attention_layernorm.weight": np.ones(32, np.float16),
    }
    for name, matrix in matrices.items():
        parts = packers.gptq(matrix, 4, 1)
        tensors |= {f"{layer}.{name}.{suffix}": array for suffix, array in parts.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": GPTQ}))
    attention = ge.load(tmp_path)[1]["decoder"]["layers"]["0"]["attention"]
    rows = packers.dequantized(matrices["self_attention.query_key_value"])
    for name, part in (("q_proj", rows[:32]), ("k_proj", rows[32:48]), ("v_proj", rows[48:])):
        np.testing.assert_array_equal(attention[name]["weight"].rows(), part)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"quant_method": "bitsandbytes"}, "'quant_method' is 'bitsandbytes', which is unsupp"),
        ({"quant_method": None}, "'quant_method' is None"),
        ({"bits": 5}, "'bits' is 5, which is unsupported; it must be 2 or 3 or 4 or 8"),
        ({"bits": None}, "'bits' is missing"),
        ({"group_size": 0}, "'group_size' is 0; it must be a positive integer"),
        ({"checkpoint_format": "marlin"}, "'checkpoint_format' is 'marlin'"),
        ({"pack_dtype": "int64"}, "'pack_dtype' is 'int64'"),
        ({"dynamic": {"+:.*mlp": {"bits": 8}}}, "options per module are unsupported"),
        ({"rotation": "hadamard"}, r"'rotation' \('hadamard'\) is unsupported"),
    ],
)
def test_unsupported_gptq_options_are_named(tmp_path, options, pattern):
    directory = write_gptq(tmp_path / "q", drawn())
    fields = json.loads((directory / "config.json").read_text())
    fields["quantization_config"] |= options
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=pattern):
        ge.load(directory)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"version": "gemv"}, "'version' is 'gemv', which is unsupported; it must be 'gemm'"),
        ({"zero_point": False}, "'zero_point' is False"),
        ({"bits": 8}, "'bits' is 8"),
    ],
)
def test_unsupported_awq_options_are_named(tmp_path, options, pattern):
    with pytest.raises(ConfigError, match=pattern):
        ge.load(write_awq(tmp_path / "q", drawn(), **options))


Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "change", "pattern"),
    [
        (f"{Q_PROJ}.qweight", lambda array: array.astype(np.int64), "has type I64, it must be I32"),
        (f"{Q_PROJ}.qweight", lambda array: array[:2], r"q_proj.qweight': has shape \(2, 32\)"),
        (f"{Q_PROJ}.qweight", lambda array: None, r"q_proj\.weight' is missing"),
        (f"{Q_PROJ}.qzeros", lambda array: None, r"'model\S+q_proj.qzeros' is missing"),
        (f"{Q_PROJ}.qzeros", lambda array: array[:1], r"the model needs \(2, 4\)"),
        (f"{Q_PROJ}.scales", lambda array: array.T.copy(), r"the model needs \(2, 32\)"),
        (f"{Q_PROJ}.scales", lambda array: array * np.inf, "is inf at"),
        (f"{Q_PROJ}.g_idx", lambda array: array[::-1].copy(), "groups are not adjacent columns"),
        (f"{Q_PROJ}.g_idx", lambda array: array[:16], "qweight': has shape"),
    ],
)
def test_damaged_gptq_tensors_are_named(tmp_path, name, change, pattern):
    directory = write_gptq(tmp_path / "q", drawn())
    with np.errstate(invalid="ignore"):
        change_tensor(directory, name, change)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        ge.load(directory)
    assert "\n" not in str(caught.value)


def test_a_matrix_of_another_shape_is_refused(tmp_path):
    modules = drawn()
    modules["mlp.down_proj"] = packers.draw((32, 32), 4, 16, 0)
    with pytest.raises(CheckpointError, match=r"down_proj.*has shape \(32, 32\).*\(32, 64\)"):
        ge.load(write_gptq(tmp_path / "q", modules))


def test_the_wrong_convention_of_a_symmetric_checkpoint_is_noticed(tmp_path):
    directory = write_gptq(tmp_path / "q", drawn(symmetric=True), offset=0, sym=True)
    with pytest.raises(CheckpointError, match=r"zero point 9, .*each is 8; is '"):
        ge.load(directory)


def test_a_module_stored_twice_is_refused(tmp_path):
    directory = write_gptq(tmp_path / "q", drawn())
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {key: file.read(key) for key in file.tensors}
    write_safetensors(file.path, tensors | {f"{DOWN}.weight": np.ones((32, 64), np.float16)})
    with pytest.raises(CheckpointError, match=r"down_proj.weight': the module is also stored as"):
        ge.load(directory)


def test_packed_codes_without_options_are_named(tmp_path):
    directory = write_gptq(tmp_path / "q", drawn())
    fields = json.loads((directory / "config.json").read_text())
    del fields["quantization_config"]
    (directory / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"no field 'quantization_config', but tensor '\S+qw"):
        ge.load(directory)


def test_quantized_norms_are_refused(tmp_path):
    directory = write_gptq(tmp_path / "q", drawn())
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {key: file.read(key) for key in file.tensors}
    del tensors["model.norm.weight"]
    parts = packers.gptq(packers.draw((8, 32), 4, 16, 0), 4, 1)
    tensors |= {f"model.norm.{suffix}": array for suffix, array in parts.items()}
    write_safetensors(file.path, tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight': has shape \(8, 32\)"):
        ge.load(directory)
