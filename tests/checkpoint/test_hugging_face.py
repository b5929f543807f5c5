"""Hugging Face directories: the decoder against a float64 loop, and all that can be wrong."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glm_edge as ge
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.errors import CheckpointError, ConfigError


def reference_logits(fields, tensors, tokens, partial):
    """A GLM decoder in plain float64 loops: [T] tokens to [T, V] scores."""
    get = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    size, length = fields["head_dim"], len(tokens)
    rotary = int(size * partial)

    def rms(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + fields["rms_norm_eps"]) * weight

    def turn(x, position):
        turned = x.copy()
        for pair in range(rotary // 2):
            angle = position * fields["rope_theta"] ** (-2 * pair / rotary)
            even, odd = x[2 * pair], x[2 * pair + 1]
            turned[2 * pair] = even * np.cos(angle) - odd * np.sin(angle)
            turned[2 * pair + 1] = odd * np.cos(angle) + even * np.sin(angle)
        return turned

    x = get["model.embed_tokens.weight"][tokens]
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        normed = rms(x, get[prefix + "input_layernorm.weight"])
        projected = {}
        for name in "qkv":
            projected[name] = normed @ get[f"{prefix}self_attn.{name}_proj.weight"].T
            projected[name] += get.get(f"{prefix}self_attn.{name}_proj.bias", 0.0)
        mixed = np.zeros((length, heads * size))
        for head in range(heads):
            local = slice(head * size, (head + 1) * size)
            shared = head // (heads // kv_heads)
            kv = slice(shared * size, (shared + 1) * size)
            for t in range(length):
                query = turn(projected["q"][t, local], t)
                keys = [turn(projected["k"][s, kv], s) for s in range(t + 1)]
                scores = np.array([query @ key for key in keys]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[t, local] = sum(w * projected["v"][s, kv] for s, w in enumerate(weights))
        x = x + mixed @ get[prefix + "self_attn.o_proj.weight"].T
        normed = rms(x, get[prefix + "post_attention_layernorm.weight"])
        fused = normed @ get[prefix + "mlp.gate_up_proj.weight"].T
        gate, up = np.split(fused, 2, axis=-1)
        x = x + (up * gate / (1 + np.exp(-gate))) @ get[prefix + "mlp.down_proj.weight"].T
    final = rms(x, get["model.norm.weight"])
    tied = fields["tie_word_embeddings"]
    return final @ get["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def v5(fields):
    """The same configuration in transformers 5's spelling."""
    fields = dict(fields)
    names = ("rope_theta", "partial_rotary_factor")
    rope = {name: fields.pop(name) for name in names if name in fields}
    return fields | {"rope_parameters": {"rope_type": "default", **rope}}


CASES = {
    "edge_tied_bf16": ({}, 1.0, np.dtype(jnp.bfloat16), 1, False),
    "edge_tied_v5_fp16": ({}, 1.0, np.dtype(np.float16), 1, True),
    "glm4_9b_untied_bias_partial_sharded": (
        {"tie_word_embeddings": False, "attention_bias": True, "partial_rotary_factor": 0.5},
        0.5,
        np.dtype(np.float32),
        3,
        False,
    ),
    "one_kv_head_v5_sharded": (
        {"num_key_value_heads": 1, "num_attention_heads": 3, "partial_rotary_factor": 0.75},
        0.75,
        np.dtype(np.float32),
        2,
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_match_a_float64_loop(case, fields, make_tensors, write_hugging_face):
    changes, partial, dtype, shards, new_spelling = CASES[case]
    fields |= changes
    stored = {
        name: tensor.astype(dtype)
        for name, tensor in make_tensors(fields, np.random.default_rng(3)).items()
    }
    directory = write_hugging_face(v5(fields) if new_spelling else fields, stored, shards)
    model, params = ge.load(directory)
    tokens = np.array([5, 36, 0, 7, 7, 21, 14])
    actual = jax.jit(model.apply)({"params": params}, tokens[None])[0][0]
    expected = reference_logits(fields, stored, tokens, partial)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_config_is_read(fields, tensors, write_hugging_face):
    config = ge.load(write_hugging_face(fields, tensors))[0].config
    assert config.name == "hf"
    assert config.eos_token_ids == (2, 9)
    assert config.pad_token_id == 2
    assert config.decoder.max_position_embeddings == 64
    assert config.vision is None
    assert config.speech is None


def test_defaults_are_those_of_transformers(fields, make_tensors, write_hugging_face):
    names = (
        "rms_norm_eps",
        "rope_theta",
        "partial_rotary_factor",
        "attention_bias",
        "eos_token_id",
    )
    for name in (*names, "tie_word_embeddings", "max_position_embeddings", "pad_token_id"):
        fields.pop(name)
    original = fields | {"attention_bias": True, "tie_word_embeddings": False}
    tensors = make_tensors(original, np.random.default_rng(0))
    config = ge.load(write_hugging_face(fields, tensors))[0].config
    assert config.decoder.rms_norm_eps == 1.5625e-7
    assert config.decoder.partial_rotary_factor == 0.5
    assert config.decoder.rope_theta == 10000.0
    assert config.decoder.attention_bias
    assert not config.decoder.tie_embeddings
    assert config.decoder.max_position_embeddings == 131072
    assert config.eos_token_ids == ()
    assert config.pad_token_id is None


def test_new_rope_spelling_wins_over_the_old(fields, tensors, write_hugging_face):
    fields["rope_parameters"] = {"rope_theta": 5000.0, "partial_rotary_factor": None}
    fields["partial_rotary_factor"] = 0.5
    decoder = ge.load(write_hugging_face(fields, tensors))[0].config.decoder
    assert (decoder.rope_theta, decoder.partial_rotary_factor) == (5000.0, 0.5)


def test_a_redundant_head_and_rotary_buffers_are_ignored(fields, tensors, write_hugging_face):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    _, params = ge.load(write_hugging_face(fields, tensors))
    assert sorted(params) == ["decoder", "embed"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_dtype_is_kept_or_cast(fields, tensors, write_hugging_face, dtype):
    stored = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    _, params = ge.load(write_hugging_face(fields, stored), dtype=dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype or "bfloat16"}
    name = "model.layers.1.mlp.down_proj.weight"
    result = params["decoder"]["layers"]["1"]["mlp"]["down_proj"]["weight"]
    np.testing.assert_array_equal(result, stored[name].astype(dtype or jnp.bfloat16))


def test_weights_do_not_alias_the_file(fields, tensors, write_hugging_face):
    directory = write_hugging_face(fields, tensors)
    _, params = ge.load(directory)
    before = np.array(params["embed"]["weight"])
    size = (directory / "model.safetensors").stat().st_size
    (directory / "model.safetensors").write_bytes(b"\xff" * size)
    np.testing.assert_array_equal(params["embed"]["weight"], before)


@pytest.mark.parametrize("format", [None, "hugging_face", "safetensors", "orbax"])
def test_a_loaded_model_saves(tmp_path, fields, tensors, write_hugging_face, format):
    model, params = ge.load(write_hugging_face(fields, tensors))
    ge.save(model, params, tmp_path / "out", format=format)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("model_type" in written) == (format in (None, "hugging_face"))
    assert (written.get("format") == "glm_edge") == (format in ("safetensors", "orbax"))
    read_model, read = ge.load(tmp_path / "out")
    assert read_model.config == model.config
    jax.tree.map(np.testing.assert_array_equal, read, params)


def refused(directory, kind, pattern):
    with pytest.raises(kind, match=pattern) as excinfo:
        ge.load(directory)
    assert "\n" not in str(excinfo.value)
    assert str(directory) in str(excinfo.value)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    ],
)
def test_a_missing_width_is_named(fields, tensors, write_hugging_face, name):
    fields.pop(name)
    refused(write_hugging_face(fields, tensors), ConfigError, f"field '{name}' is missing")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is unknown; known: glm"),
        ({"model_type": None}, "model_type None is unknown"),
        ({"model_type": ["glm"]}, "is unknown"),
        ({"model_type": "glm_edge_v"}, "model_type 'glm_edge_v' is unknown"),
        ({"hidden_size": "24"}, "'hidden_size' is '24'; it must be a positive integer"),
        ({"hidden_size": 0}, "'hidden_size' is 0"),
        ({"hidden_size": True}, "'hidden_size' is True"),
        ({"hidden_size": 24.0}, "'hidden_size' is 24.0"),
        ({"rms_norm_eps": -1e-5}, "'rms_norm_eps' is -1e-05; it must be a positive number"),
        ({"rope_theta": "big"}, "'rope_theta' is 'big'"),
        ({"attention_bias": 1}, "'attention_bias' is 1; it must be true or false"),
        ({"eos_token_id": "end"}, "'eos_token_id' is 'end'; it must be a token id or"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', .* unsupported; it must be 'silu'"),
        ({"vision_config": {}}, "'boi_token_id' is missing"),
        ({"text_config": {"x": 1}}, r"'text_config' \({'x': 1}\) is unsupported"),
        ({"logit_scale": 0.5}, r"'logit_scale' \(0\.5\) is unsupported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: field 'quant_method' is None"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'type' is 'linear'"),
        ({"rope_scaling": {"factor": 2}}, r"rope_scaling: field 'factor' \(2\) is unsupported"),
        ({"rope_scaling": {"mrope_section": [1, 1, 2]}}, "'mrope_section' is unsupported for this"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: field 'rope_type' is 'yarn"),
        ({"rope_parameters": [1]}, "'rope_parameters' must be an object"),
        (
            {"num_attention_heads": 3},
            "'num_key_value_heads' is 2; it must divide 'num_attention_heads', which is 3",
        ),
        ({"partial_rotary_factor": 0.4}, "must be even"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(fields, tensors, write_hugging_face, change, pattern):
    refused(write_hugging_face(fields | change, tensors), ConfigError, pattern)


NAME = "model.layers.1.mlp.down_proj.weight"


def test_tensors_that_do_not_fit(fields, tensors, write_hugging_face):
    def check(changed, pattern):
        refused(write_hugging_face(fields, changed), CheckpointError, pattern)

    others = {name: tensor for name, tensor in tensors.items() if name != NAME}
    check(others, rf"tensor '{NAME}' is missing; .* needs it with shape \(24, 20\)")
    check(tensors | {"x": np.ones(2)}, "tensor 'x' has no place in the model")
    check(tensors | {"a": np.ones(2), "b": np.ones(1)}, r"'a' has no place .* \(and 1 more\)")
    check(
        others | {NAME: tensors[NAME].T},
        rf"tensor '{NAME}': has shape \(20, 24\), the model needs \(24, 20\)",
    )
    check(others | {NAME: np.ones((24, 20), np.int8)}, "has type I8, a weight must be one of")
    for bad in (np.nan, np.inf):
        spoiled = tensors[NAME].copy()
        spoiled[3, 4] = bad
        check(others | {NAME: spoiled}, rf"tensor '{NAME}' as float32: is {bad} at \[3, 4\]")


def test_nan_in_bfloat16_is_found(fields, tensors, write_hugging_face):
    spoiled = tensors[NAME].astype(jnp.bfloat16)
    spoiled[0, 1] = np.nan
    directory = write_hugging_face(fields, tensors | {NAME: spoiled})
    refused(directory, CheckpointError, rf"model\.safetensors: tensor '{NAME}' .* at \[0, 1\]")


def test_a_value_too_large_for_the_asked_type_is_refused(fields, tensors, write_hugging_face):
    directory = write_hugging_face(fields, tensors | {NAME: tensors[NAME] + 1e6})
    with pytest.raises(CheckpointError, match="as float16: is inf"):
        ge.load(directory, dtype="float16")


def test_an_untied_model_needs_its_head(fields, tensors, write_hugging_face):
    fields["tie_word_embeddings"] = False
    refused(write_hugging_face(fields, tensors), CheckpointError, r"'lm_head\.weight' is missing")


def test_missing_and_foreign_files(fields, tensors, write_hugging_face):
    directory = write_hugging_face(fields, tensors)
    os.truncate(directory / "model.safetensors", 3000)
    refused(directory, CheckpointError, "truncated")
    (directory / "model.safetensors").unlink()
    refused(directory, CheckpointError, r"has neither model\.safetensors nor")
    (directory / "pytorch_model.bin").write_bytes(b"PK")
    refused(directory, CheckpointError, r"pytorch_model\.bin is a pickle, convert it")
    shutil.copy(directory / "pytorch_model.bin", directory / "model.safetensors")
    refused(directory, CheckpointError, "too few for a safetensors file")


def test_shards_and_index_must_agree(fields, tensors, write_hugging_face):
    directory = write_hugging_face(fields, tensors, shards=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(path.name for path in directory.glob("*.safetensors"))

    def check(weight_map, pattern):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(directory, CheckpointError, pattern)

    weight_map = content["weight_map"]
    check(None, "'weight_map' must map")
    check({}, "'weight_map' must map")
    check(weight_map | {NAME: "../hf/x.safetensors"}, "must be a plain name")
    check(weight_map | {NAME: 7}, "cannot be read: No such file")
    other = next(name for name in shards if name != weight_map[NAME])
    check(weight_map | {NAME: other}, f"{other}: tensor '{NAME}' is missing")
    check(weight_map | {"new": other}, f"{other}: tensor 'new' is missing")
    index.write_text(json.dumps(content))
    file = SafetensorsFile(directory / shards[0])
    arrays = {name: np.array(file.read(name)) for name in file.tensors}
    duplicate = next(name for name in weight_map if weight_map[name] == shards[1])
    write_safetensors(directory / shards[0], arrays | {duplicate: tensors[duplicate]})
    refused(directory, CheckpointError, f"tensor '{duplicate}' is also in {shards[0]}")
    (directory / shards[1]).unlink()
    refused(directory, CheckpointError, f"{shards[1]}: cannot be read: No such file")


def test_a_single_file_beside_shards_is_refused(fields, tensors, write_hugging_face):
    directory = write_hugging_face(fields, tensors, shards=2)
    stray = directory / "model.safetensors"
    write_safetensors(stray, {name: array + 1 for name, array in tensors.items()})
    refused(directory, CheckpointError, "may be two models, so remove")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    _, params = ge.load(directory)
    np.testing.assert_array_equal(
        params["embed"]["weight"], tensors["model.embed_tokens.weight"] + 1
    )
    (directory / "adapter_config.json").write_text("{}")
    refused(directory, CheckpointError, "transformers would apply an adapter")


def test_shards_without_their_index_are_named(fields, tensors, write_hugging_face):
    directory = write_hugging_face(fields, tensors, shards=2)
    (directory / "model.safetensors.index.json").unlink()
    refused(directory, CheckpointError, "2 shards such as model-00001-of-00002.safetensors")
