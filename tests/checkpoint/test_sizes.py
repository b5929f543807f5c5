"""Sizes in config.json that no model can have, each named."""

import json
import shutil
from pathlib import Path

import pytest

import glm_edge as ge
from glm_edge.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("glm4", "num_key_value_heads", 3, "'num_key_value_heads' is 3; it must divide"),
        ("glm", "partial_rotary_factor", 1.5, "partial_rotary_factor 1.5 must be even and no more"),
        ("glm4v", "text_config.rope_parameters.mrope_section", [], "'mrope_section' is []"),
        ("glm4v", "text_config.rope_parameters.mrope_section", [1, 2], "must sum to 2"),
        ("glm4v", "vision_config.num_heads", 3, "'num_heads' is 3; it must divide 'hidden_size'"),
        ("glm4v", "vision_config.num_heads", 4, "must be a multiple of 4, since rows and columns"),
        ("glm4v", "image_token_id", 40, "image_token_id 40 must be below vocab_size 40"),
        ("glmasr", "audio_config.max_position_embeddings", 18, "it must be a multiple of 4"),
        ("glmasr", "audio_config.intermediate_size", 16, "'intermediate_size' is 16"),
        ("glmasr", "text_config.partial_rotary_factor", 0.5, "'partial_rotary_factor' is 0.5"),
        ("siglip", "num_attention_heads", 3, "'num_attention_heads' is 3; it must divide"),
        ("whisper", "encoder_attention_heads", 3, "it must divide 'd_model', which is 16"),
        ("bert", "num_attention_heads", 3, "'num_attention_heads' is 3; it must divide"),
        ("distilbert", "n_heads", 3, "'n_heads' is 3; it must divide 'dim', which is 16"),
    ],
)
def test_a_size_that_makes_no_model_is_named(name, position, value, message, tmp_path):
    case = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    fields = json.loads((case / "config.json").read_text())
    *sections, field = position.split(".")
    section = fields
    for part in sections:
        section = section[part]
    section[field] = value
    (case / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError) as error:
        ge.load(case)
    assert message in str(error.value)
    assert str(error.value).startswith(str(case / "config.json"))


def test_glm_asr_refuses_an_ignored_rope_theta(tmp_path):
    """A lone rope theta of glm asr is refused where it would be ignored."""
    case = Path(shutil.copytree(GOLDEN / "glmasr", tmp_path / "case"))
    fields = json.loads((case / "config.json").read_text())
    del fields["text_config"]["rope_parameters"]
    for theta, refused in ((10000, False), (500.0, True)):
        fields["text_config"]["rope_theta"] = theta
        (case / "config.json").write_text(json.dumps(fields))
        if refused:
            with pytest.raises(ConfigError, match=r"'rope_theta' is 500\.0"):
                ge.load(case)
        else:
            assert ge.load(case)[0].config.decoder.rope_theta == 10000
