"""The dialects in which checkpoints are stored: each loads to the same model and parameters."""

import copy
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
from glm_edge.checkpoint.hugging_face import MEMBERS, read_config
from glm_edge.checkpoint.safetensors import SafetensorsFile, write_safetensors
from glm_edge.errors import CheckpointError, ConfigError

TINY = json.loads((Path(__file__).parent / "tiny_configs.json").read_text())
HEADS = [name for name in TINY if name.startswith("glm")]


def tensors_of(name, fields, params):
    """Tensors of a member by the names it has in `entries`."""
    member, config = read_config(fields, "config.json", "tiny")
    leaves = dict(ge.params.path_items(params))
    results = {}
    for entry in member.entries(config):
        arrays = entry.write(*(np.asarray(leaves[path]) for path in entry.paths))
        results.update(zip(entry.names, arrays, strict=True))
    return results


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes `(fields, tensors, shards)` as a directory."""

    def write(fields, tensors, shards=1):
        directory = tmp_path / "stored"
        # Files of another number of shards would be a second model beside this one.
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(fields))
        names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        if shards == 1:
            names = ["model.safetensors"]
        weight_map = {}
        for index, name in enumerate(names):
            part = {key: tensors[key] for key in sorted(tensors)[index::shards]}
            write_safetensors(directory / name, part)
            weight_map |= dict.fromkeys(part, name)
        if shards > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return write


def made(name, **changes):
    """Fields, model, parameters and tensors of a tiny member."""
    fields = copy.deepcopy(TINY[name]) | changes
    model, params = make_round_trip.build(fields)
    return fields, model, params, tensors_of(name, fields, params)


def assert_loads_as(directory, model, params, dtype=None):
    read_model, read = ge.load(directory)
    assert vars(read_model.config) | {"name": ""} == vars(model.config) | {"name": ""}
    assert jax.tree.structure(read) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        assert a.dtype == (dtype or b.dtype)
        b = np.asarray(b)
        np.testing.assert_array_equal(a, b if dtype is None else b.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("name", TINY)
def test_one_file_and_shards(write, name):
    fields, model, params, tensors = made(name)
    for shards in (1, 3):
        assert_loads_as(write(fields, tensors, shards), model, params)
        (write(fields, tensors, 1) / "model.safetensors").unlink()


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ["glm", "glm_ocr", "glmasr", "siglip_vision_model"])
def test_types(write, name, stored):
    fields, model, params, tensors = made(name)
    directory = write(fields, {key: tensor.astype(stored) for key, tensor in tensors.items()})
    assert_loads_as(directory, model, params, "float32" if stored == "float64" else stored)


@pytest.mark.parametrize("name", ["glm", "glmasr"])
def test_mixed_types_are_kept(write, name):
    fields, _, params, tensors = made(name)
    mixed = {
        key: tensor if "norm" in key else tensor.astype("bfloat16")
        for key, tensor in tensors.items()
    }
    _, read = ge.load(write(fields, mixed))
    kinds = {path: str(leaf.dtype) for path, leaf in ge.params.path_items(read)}
    assert kinds == {
        path: "float32" if "norm" in path else "bfloat16"
        for path, _ in ge.params.path_items(params)
    }


@pytest.mark.parametrize("name", HEADS)
def test_tied_without_a_head_tied_with_one_and_untied(write, name):
    fields, model, params, tensors = made(name, tie_word_embeddings=True)
    assert "head" not in params
    assert_loads_as(write(fields, tensors), model, params)
    untied_fields, untied_model, untied_params, untied = made(name, tie_word_embeddings=False)
    (head,) = untied.keys() - tensors.keys()
    (embedding,) = (key for key in tensors if re.search(r"(embed_tokens|word_embeddings)", key))
    redundant = tensors | {head: tensors[embedding]}
    assert_loads_as(write(fields, redundant), model, params)
    assert_loads_as(write(fields, redundant, 2), model, params)
    assert_loads_as(write(untied_fields, untied), untied_model, untied_params)
    # A head of its own is not dropped, whatever config.json says.
    read_model, read = ge.load(write(fields, untied))
    assert not read_model.config.decoder.tie_embeddings
    np.testing.assert_array_equal(read["head"]["weight"], untied_params["head"]["weight"])
    with pytest.raises(CheckpointError, match=f"{re.escape(head)}' is missing"):
        ge.load(write(untied_fields, tensors))


def rename(tensors, *rules):
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    return renamed


RENAMES = {
    "glm4v, first names": (
        "glm4v",
        (r"^model\.language_model\.", "model."),
        (r"^model\.visual\.", "visual."),
    ),
    "glm4v, a language model inside": (
        "glm4v",
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.visual\.", "visual."),
    ),
    "glm_ocr, first names": (
        "glm_ocr",
        (r"^model\.language_model\.", "model."),
        (r"^model\.visual\.", "visual."),
    ),
    "glmasr, inside transformers 5": (
        "glmasr",
        (r"^(audio_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^language_model\.model\.", "model.language_model."),
    ),
    "siglip, published": ("siglip_vision_model", ("^", "vision_model.")),
    "siglip, inside another": ("siglip_vision_model", ("^", "model.vision_model.")),
    "whisper, published": ("whisper", ("^", "model.encoder.")),
    "whisper, the base model": ("whisper", ("^", "encoder.")),
    "bert, the base model": ("bert", (r"^bert\.", "")),
    "bert, from TensorFlow": (
        "bert",
        (r"LayerNorm\.weight$", "LayerNorm.gamma"),
        (r"LayerNorm\.bias$", "LayerNorm.beta"),
    ),
    "distilbert, the base model": ("distilbert", (r"^distilbert\.", "")),
}


@pytest.mark.parametrize("case", RENAMES)
def test_old_and_new_names(write, case):
    name, *rules = RENAMES[case]
    fields, model, params, tensors = made(name)
    renamed = rename(tensors, *rules)
    assert_loads_as(write(fields, renamed), model, params)
    old = next(key for key in tensors if key not in renamed)
    twice = renamed | {old: tensors[old]}
    with pytest.raises(CheckpointError, match="are the same parameter"):
        ge.load(write(fields, twice))


def test_the_head_of_an_old_glmasr_has_no_prefix(write):
    fields, model, params, tensors = made("glmasr", tie_word_embeddings=False)
    renamed = rename(tensors, (r"^language_model\.lm_head\.", "lm_head."))
    assert_loads_as(write(fields, renamed), model, params)


EXTRAS = {
    "glm": ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"],
    "glm_ocr": [
        "model.language_model.layers.2.eh_proj.weight",
        "model.language_model.layers.2.embed_tokens.weight",
        "model.language_model.layers.2.self_attn.q_proj.weight",
        "model.language_model.layers.2.shared_head.norm.weight",
    ],
    "glm_edge_v": ["model.vision.vit.model.vision_model.embeddings.position_ids"],
    "siglip_vision_model": ["text_model.embeddings.token_embedding.weight", "logit_scale"],
    "whisper": ["model.decoder.layers.0.fc1.weight", "proj_out.weight"],
    "bert": ["cls.predictions.bias", "cls.seq_relationship.weight", "embeddings.position_ids"],
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_is_no_part_of_the_model_is_left_out(write, name):
    fields, model, params, tensors = made(name)
    extras = dict.fromkeys(EXTRAS[name], np.zeros(3, np.float32))
    assert_loads_as(write(fields, tensors | extras), model, params)
    with pytest.raises(CheckpointError, match=r"'model\.adapter\.weight' has no place"):
        ge.load(write(fields, tensors | {"model.adapter.weight": np.zeros(3, np.float32)}))


def test_extra_layers_are_refused_except_glm_ocr(write):
    """Layers beyond those of config are refused but for glm ocr."""
    fields, _, _, tensors = made("glm4v")
    extra = {"model.language_model.layers.2.eh_proj.weight": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"layers\.2\.eh_proj\.weight' has no place"):
        ge.load(write(fields, tensors | extra))


def test_a_dual_siglip(write):
    vision, model, params, tensors = made("siglip_vision_model")
    fields = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "initializer_factor": 1.0,
        "text_config": {"hidden_size": 16, "model_type": "siglip_text_model"},
        "vision_config": vision,
    }
    text = {"text_model.head.weight": np.zeros((4, 4), np.float32)}
    scale = dict.fromkeys(("logit_scale", "logit_bias"), np.zeros(1, np.float32))
    dual = rename(tensors, ("^", "vision_model.")) | text | scale
    assert_loads_as(write(fields, dual), model, params)


def test_spellings_of_rotary_positions(write):
    fields, model, params, tensors = made("glm4v")
    text = fields["text_config"]
    rope = text.pop("rope_parameters")
    section = {"mrope_section": rope["mrope_section"]}
    top = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    for spelling in (
        {**top, "rope_scaling": {"type": "default", **section}},
        {**top, "rope_scaling": {"type": "mrope", **section}},
        {**top, "rope_scaling": {"rope_type": "default", "type": "default", **section}},
        {"rope_theta": 5.0, "rope_parameters": rope},
        {**top, "rope_parameters": section},
    ):
        assert_loads_as(write(fields | {"text_config": text | spelling}, tensors), model, params)


def test_a_flat_glm_4_1v(write):
    fields, model, params, tensors = made("glm4v")
    text = fields.pop("text_config")
    flat = text | fields
    assert flat["model_type"] == "glm4v"
    assert_loads_as(write(flat, tensors), model, params)
    # As transformers 4 saves it again.
    both = flat | {"text_config": text | {"image_token_id": None, "model_type": "glm4v_text"}}
    assert_loads_as(write(both, tensors), model, params)
    with pytest.raises(ConfigError, match=r"config\.json: field 'rms_norm_eps' \(0\.5\)"):
        ge.load(write(both | {"rms_norm_eps": 0.5}, tensors))


CHATGLM = {
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "eos_token_id": [2, 3],
    "ffn_hidden_size": 20,
    "hidden_size": 24,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "pad_token_id": 2,
    "padded_vocab_size": 40,
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 0.9,
    "seq_length": 64,
    "tie_word_embeddings": False,
}


def test_remote_code_of_glm_4_9b(write):
    _, model, params, tensors = made("glm")
    remote = {
        "transformer.embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": tensors["model.norm.weight"],
        "transformer.output_layer.weight": tensors["lm_head.weight"],
        "transformer.rotary_pos_emb.inv_freq": np.ones(2, np.float32),
    }
    names = {
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.dense.weight": "self_attn.o_proj.weight",
        "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
        "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
    }
    for layer in range(2):
        ours, theirs = f"model.layers.{layer}.", f"transformer.encoder.layers.{layer}."
        for name, ours_name in names.items():
            remote[theirs + name] = tensors[ours + ours_name]
        for kind in ("weight", "bias"):
            parts = [tensors[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            fused = np.concatenate(parts)
            assert fused.shape[0] == (4 + 2 * 2) * 8
            remote[f"{theirs}self_attention.query_key_value.{kind}"] = fused
    directory = write(CHATGLM, remote, 2)
    assert_loads_as(directory, model, params)
    # Saved, it is a model that transformers has code for.
    saved = ge.save(*ge.load(directory), directory.parent / "saved")
    assert json.loads((saved / "config.json").read_text())["model_type"] == "glm"
    file = SafetensorsFile(saved / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor)
    fused = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    cut = remote | {fused: remote[fused][:-1]}
    with pytest.raises(CheckpointError, match=rf"'{re.escape(fused)}': shape \(63, 24\)"):
        ge.load(write(CHATGLM, cut, 2))


def first_glmasr(tied):
    fields = TINY["glmasr"]
    audio = fields["audio_config"]
    return {
        "model_type": "glmasr",
        "adapter_type": "mlp",
        "lm_config": fields["text_config"] | {"tie_word_embeddings": tied, "pad_token_id": 37},
        "max_whisper_length": 8,
        "merge_factor": 4,
        "mlp_adapter_act": "gelu",
        "spec_aug": False,
        "use_rope": True,
        "whisper_config": {
            "model_type": "whisper",
            "activation_function": "gelu",
            "d_model": audio["hidden_size"],
            "encoder_attention_heads": audio["num_attention_heads"],
            "encoder_ffn_dim": audio["intermediate_size"],
            "encoder_layers": audio["num_hidden_layers"],
            "max_source_positions": audio["max_position_embeddings"],
            "num_mel_bins": audio["num_mel_bins"],
        },
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_upload_of_glm_asr(write, tied):
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    audio = TINY["glmasr"]["audio_config"] | {"rope_parameters": rope}
    fields, model, params, tensors = made("glmasr", tie_word_embeddings=tied, audio_config=audio)
    first = rename(
        tensors,
        (r"^language_model\.", ""),
        (r"^audio_tower\.norm\.", "audio_encoder.layer_norm."),
        (r"^audio_tower\.", "audio_encoder.whisper."),
        (r"^multi_modal_projector\.linear_1\.", "audio_encoder.adapting.0."),
        (r"^multi_modal_projector\.linear_2\.", "audio_encoder.adapting.2."),
        (r"(whisper\.layers\.\d+)\.self_attn\.o_proj\.", r"\1.self_attn.out_proj."),
        (r"(whisper\.layers\.\d+)\.input_layernorm\.", r"\1.self_attn_layer_norm."),
        (r"(whisper\.layers\.\d+)\.post_attention_layernorm\.", r"\1.final_layer_norm."),
        (r"(whisper\.layers\.\d+)\.mlp\.", r"\1."),
    )
    for name in first:
        # Its code turns rows 0 and 1 of a head together, later code rows 0 and 2 of four.
        if re.search(r"whisper.*\.[qk]_proj", name):
            heads = first[name].reshape(2, 8, -1)
            first[name] = heads[:, [0, 2, 1, 3, 4, 5, 6, 7]].reshape(first[name].shape)
    unused = ("proj.weight", "proj.bias", "audio_bos_eos_token.weight")
    unused += ("whisper.embed_positions.weight",)
    first |= {f"audio_encoder.{name}": np.zeros(2, np.float32) for name in unused}
    directory = write(first_glmasr(tied), first)
    read_model, read = ge.load(directory)
    assert read_model.config.audio_token_id == 37
    assert read_model.config.speech == model.config.speech
    assert read_model.config.decoder == model.config.decoder
    jax.tree.map(np.testing.assert_array_equal, read, params)
    saved = ge.save(read_model, read, directory.parent / "saved")
    assert "text_config" in json.loads((saved / "config.json").read_text())
    # With the later config.json, later code would turn other rows.
    with pytest.raises(CheckpointError, match=r"tensor 'language_model\..*' is missing"):
        ge.load(write(fields, first))


def test_every_member_is_covered():
    covered = {*TINY, "siglip", "chatglm", "glmasr_first"}
    assert covered == set(MEMBERS)
