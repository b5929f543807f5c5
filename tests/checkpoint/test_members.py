"""Published configurations: parameter counts without weights, and fields nobody knows."""

import copy
import json
import math
from pathlib import Path

import pytest

from glm_edge.checkpoint.hugging_face.members import read_config
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.errors import ConfigError

# config.json as published, in the spellings of transformers 4 and 5 and of remote code.
PUBLISHED = {
    path.stem: json.loads(path.read_text())
    for path in (Path(__file__).parent / "published").glob("*.json")
}
COUNTS = {
    "glm-edge-1.5b-chat": {"all": 1_472_055_296},
    "glm-edge-4b-chat": {"all": 4_327_984_128},
    # A SigLIP of 430,040,000 with its unused pooling head, and an adapter.
    "glm-edge-v-2b": {"all": 1_953_485_760, "vision": 430_040_000 + 51_390_464},
    "glm-edge-v-5b": {"all": 4_857_129_920, "vision": 430_040_000 + 99_105_792},
    "glm-4-9b-chat": {"all": 9_399_951_360},
    "glm-4-9b-chat-hf": {"all": 9_399_951_360},
    "GLM-4-9B-0414": {"all": 9_400_279_040},
    "GLM-4-32B-0414": {"all": 32_566_081_536},
    "GLM-4.1V-9B-Thinking": {
        "all": 10_292_777_472,
        "vision": 892_498_432,
        "head": 620_756_992,
        "embed": 620_756_992,
        "decoder": 8_779_522_048 - 620_756_992,
    },
    "AutoGLM-Phone-9B": {"all": 10_292_777_472},
    "GLM-OCR": {"all": 1_107_405_824},
    "GLM-ASR-Nano-2512": {
        "all": 2_136_470_528,
        "speech": 635_048_960 + 29_366_272,
        "speech/linear": 29_366_272,
        "embed": 121_372_672,
        "decoder": 1_472_055_296 - 121_372_672,
    },
    "GLM-ASR-Nano-2512-first": {"all": 2_136_470_528},
    "siglip-so400m-patch14-384": {"all": 428_225_600},
    "siglip-base-patch16-224": {"all": 92_884_224},
    "whisper-large-v3": {"all": 635_048_960 + 1500 * 1280},
    "bert-base-uncased": {"all": 109_482_240},
    "distilbert-base-uncased": {"all": 66_362_880},
}


def read(fields, name="x"):
    return read_config(fields, "config.json", name)


def count(fields, prefix=""):
    member, config = read(fields)
    shapes = expected_shapes(member.build(config))
    return sum(math.prod(shape) for path, shape in shapes.items() if path.startswith(prefix))


def test_every_published_config_has_a_count():
    assert set(COUNTS) == set(PUBLISHED)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_published_ones(name):
    for prefix, expected in COUNTS[name].items():
        assert count(PUBLISHED[name], "" if prefix == "all" else prefix) == expected


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("glm-edge-v-2b", {"tie_word_embeddings": False}, 2_074_858_432),
        ("glm-edge-1.5b-chat", {"tie_word_embeddings": False}, 1_472_055_296 + 121_372_672),
        ("GLM-ASR-Nano-2512", {"tie_word_embeddings": False}, 2_136_470_528 + 121_372_672),
    ],
)
def test_an_untied_head_counts(name, change, expected):
    assert count(PUBLISHED[name] | change) == expected


def test_siglip_of_glm_edge_v_alone():
    fields = PUBLISHED["glm-edge-v-2b"]["vision_config"]
    assert count(fields) == 430_040_000
    assert count(fields, "pool/") == 15_238_352
    assert count(fields | {"vision_use_head": False}) == 430_040_000 - 15_238_352


def test_published_fields_are_read():
    def config(name):
        return read(PUBLISHED[name])[1]

    edge = config("glm-edge-1.5b-chat")
    assert (edge.decoder.partial_rotary_factor, edge.decoder.tie_embeddings) == (1.0, True)
    assert edge.eos_token_ids == (59246, 59253, 59255)
    # The converted file says theta 10,000; that of the remote code says 500 times as much.
    remote, converted = config("glm-4-9b-chat").decoder, config("glm-4-9b-chat-hf").decoder
    assert (remote.rope_theta, converted.rope_theta) == (5e6, 1e4)
    assert remote.__class__(**vars(remote) | {"rope_theta": 1e4}) == converted
    assert converted.partial_rotary_factor == 0.5
    assert config("GLM-4-9B-0414").decoder.sandwich_norm
    thinking = config("GLM-4.1V-9B-Thinking")
    assert thinking == config("AutoGLM-Phone-9B")
    assert thinking.decoder.mrope_section == (8, 12, 12)
    assert thinking.decoder.partial_rotary_factor == 0.5
    assert thinking.decoder.max_position_embeddings == 65536
    assert thinking.eos_token_ids == (151329, 151336, 151338, 151348)
    assert (thinking.image_token_id, thinking.video_token_id) == (151343, 151344)
    assert thinking.image_boundary_ids == (151339, 151340)
    ocr = config("GLM-OCR")
    assert (ocr.decoder.num_heads * ocr.decoder.head_dim, ocr.decoder.hidden_size) == (2048, 1536)
    assert not ocr.decoder.attention_bias
    assert config("glm-edge-v-5b").image_boundary_ids == (59256, 59257)
    asr = config("GLM-ASR-Nano-2512")
    assert (asr.decoder.tie_embeddings, asr.audio_token_id) == (True, 59260)
    assert asr.speech == config("GLM-ASR-Nano-2512-first").speech
    assert asr.decoder == config("GLM-ASR-Nano-2512-first").decoder
    assert config("siglip-so400m-patch14-384").position_grid == (27, 27)
    assert config("whisper-large-v3").mel_bins == 128


# No fields; and what a section repeats, where any difference is an error.
LEFT_OUT = {"auto_map", "rope_scaling"}


def sections(fields, position=()):
    yield position
    for name, value in fields.items():
        dual = fields.get("model_type") == "siglip" and name == "text_config"
        if isinstance(value, dict) and name not in LEFT_OUT and not dual:
            yield from sections(value, (*position, name))


PLACES = [(name, position) for name, fields in PUBLISHED.items() for position in sections(fields)]


@pytest.mark.parametrize(("name", "position"), PLACES)
def test_an_unknown_field_is_an_error_that_names_it(name, position):
    fields = copy.deepcopy(PUBLISHED[name])
    section = fields
    for part in position:
        section = section[part]
    section["residual_scale"] = 0.5
    where = ": ".join(("config.json", *position))
    with pytest.raises(
        ConfigError, match=r"field 'residual_scale' \(0\.5\) is unsupported"
    ) as error:
        read(fields)
    assert str(error.value).startswith(f"{where}: field")
    # What is off changes nothing.
    section["residual_scale"] = None
    read(fields)


@pytest.mark.parametrize(
    ("name", "position", "change", "pattern"),
    [
        ("glm-edge-1.5b-chat", (), {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ("GLM-4-9B-0414", (), {"sliding_window": 4096}, "'sliding_window' is 4096"),
        ("GLM-4-9B-0414", (), {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.*'yarn'"),
        ("glm-4-9b-chat", (), {"rmsnorm": False}, "'rmsnorm' is False"),
        ("glm-4-9b-chat", (), {"add_bias_linear": True}, "'add_bias_linear' is True"),
        ("glm-4-9b-chat", (), {"post_layer_norm": False}, "'post_layer_norm' is False"),
        ("glm-4-9b-chat", (), {"num_hidden_layers": 39}, "'num_hidden_layers' is 39.*must be 40"),
        ("glm-4-9b-chat", (), {"padded_vocab_size": None}, "'padded_vocab_size' is missing"),
        ("glm-4-9b-chat", (), {"quantization_bit": 4}, r"'quantization_bit' \(4\) is unsupported"),
        ("GLM-4.1V-9B-Thinking", (), {"image_token_id": None}, "'image_token_id' is missing"),
        ("GLM-4.1V-9B-Thinking", (), {"hidden_size": None}, "'hidden_size' is missing"),
        (
            "GLM-4.1V-9B-Thinking",
            (),
            {"head_dim": 64, "partial_rotary_factor": 1.0},
            "'head_dim' must be hidden_size / num_att",
        ),
        ("GLM-4.1V-9B-Thinking", (), {"partial_rotary_factor": None}, "mrope_section .* sum to 64"),
        ("GLM-4.1V-9B-Thinking", (), {"vision_config": None}, "'vision_config' is missing"),
        ("AutoGLM-Phone-9B", (), {"hidden_size": 2048}, r"'hidden_size' \(2048\) is unsupported"),
        ("AutoGLM-Phone-9B", ("vision_config",), {"out_hidden_size": 9}, "'out_hidden_size' is 9"),
        ("GLM-OCR", ("text_config",), {"num_nextn_predict_layers": 2}, "'num_nextn.* is 2"),
        ("GLM-OCR", ("text_config",), {"rope_parameters": [1]}, "'rope_parameters' must be an obj"),
        ("GLM-OCR", ("vision_config",), {"hidden_act": "gelu"}, "vision_config: .*'hidden_act'"),
        ("GLM-OCR", ("vision_config",), {"patch_size": [14, 14]}, r"'patch_size' is \[14, 14\]"),
        ("glm-edge-v-2b", (), {"boi_token_id": None}, "'boi_token_id' is missing"),
        ("glm-edge-v-2b", (), {"head_dim": None}, "'head_dim' is missing"),
        ("glm-edge-v-2b", ("vision_config",), {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ("GLM-ASR-Nano-2512", (), {"projector_hidden_act": "relu"}, "'projector_hidden_act' is"),
        ("GLM-ASR-Nano-2512", (), {"audio_token_id": None}, "'audio_token_id' is missing"),
        ("GLM-ASR-Nano-2512", ("text_config",), {"mlp_bias": True}, "text_config: .*'mlp_bias'"),
        ("GLM-ASR-Nano-2512", ("text_config",), {"model_type": "qwen2"}, "'model_type' is 'qwen2'"),
        ("GLM-ASR-Nano-2512", ("audio_config",), {"intermediate_size": 2560}, "must be 4 x hidden"),
        ("GLM-ASR-Nano-2512", ("audio_config",), {"num_key_value_heads": 3}, "'num_key_value_head"),
        ("GLM-ASR-Nano-2512-first", (), {"use_rope": False}, "'use_rope' must be true"),
        ("GLM-ASR-Nano-2512-first", (), {"adapter_type": "conv"}, "'adapter_type' is 'conv'"),
        (
            "GLM-ASR-Nano-2512-first",
            ("lm_config",),
            {"pad_token_id": None},
            "'audio_token_id' is m",
        ),
        (
            "siglip-so400m-patch14-384",
            ("vision_config",),
            {"image_size": 9},
            "be at least one patch of 14",
        ),
        ("whisper-large-v3", (), {"scale_embedding": True}, "'scale_embedding' is True"),
        ("whisper-large-v3", (), {"activation_function": "relu"}, "'activation_function' is"),
        (
            "whisper-large-v3",
            (),
            {"d_model": 1281},
            "'encoder_attention_heads' is 20; it must divide 'd_model', which is 1281",
        ),
    ],
)
def test_a_field_that_changes_the_function_is_an_error(name, position, change, pattern):
    fields = copy.deepcopy(PUBLISHED[name])
    section = fields
    for part in position:
        section = section[part]
    section.update(change)
    with pytest.raises(ConfigError, match=pattern) as error:
        read(fields)
    assert str(error.value).startswith("config.json: ")
    assert "\n" not in str(error.value)


def test_absent_fields_have_the_defaults_of_transformers():
    def decoder(name, *absent):
        fields = {key: value for key, value in PUBLISHED[name].items() if key not in absent}
        return read(fields)[1].decoder

    names = ("rms_norm_eps", "rope_theta", "attention_bias", "tie_word_embeddings")
    edge = decoder("glm-edge-1.5b-chat", *names, "partial_rotary_factor")
    assert (edge.rms_norm_eps, edge.rope_theta, edge.attention_bias) == (1.5625e-7, 1e4, True)
    assert (edge.tie_embeddings, edge.partial_rotary_factor) == (False, 0.5)
    vision = decoder("GLM-4.1V-9B-Thinking", "rms_norm_eps", "tie_word_embeddings", "rope_theta")
    assert (vision.rms_norm_eps, vision.tie_embeddings, vision.rope_theta) == (1e-5, False, 1e4)
    assert decoder("GLM-ASR-Nano-2512", "tie_word_embeddings").tie_embeddings
    fields = PUBLISHED["glm-edge-1.5b-chat"]
    assert read(fields | {"num_key_value_heads": None})[1].decoder.num_kv_heads == 16


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_either_place_of_a_tie_counts_in_glm_4_1v(outer, inner):
    fields = copy.deepcopy(PUBLISHED["GLM-OCR"])
    fields["tie_word_embeddings"], fields["text_config"]["tie_word_embeddings"] = outer, inner
    assert read(fields)[1].decoder.tie_embeddings == bool(outer or inner)


def test_grouped_heads_of_a_speech_tower_are_read_and_written():
    fields = copy.deepcopy(PUBLISHED["GLM-ASR-Nano-2512"])
    for name, value in (("num_key_value_heads", 4), ("head_dim", 48)):
        fields["audio_config"][name] = value
    member, config = read(fields)
    assert (config.speech.num_kv_heads, config.speech.head_size) == (4, 48)
    assert config.speech.kv_heads(0) == 4
    written = member.write_config(config)
    assert written["audio_config"]["num_key_value_heads"] == 4
    assert read(written)[1].speech == config.speech
