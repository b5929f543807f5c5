"""The tokens that end an answer: one door for the model, the processor and what is saved."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

import glm_edge as ge
from glm_edge import checkpoint
from glm_edge.checkpoint.lazy import open_lazily
from glm_edge.configs.stop_tokens import read_stop_tokens
from glm_edge.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def directory(tmp_path):
    """A checkpoint of transformers with a tokenizer and a template, whose config names token 2."""
    path = Path(shutil.copytree(GOLDEN / "glm", tmp_path / "glm"))
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"eos_token_id": 2}))
    vocabulary = {f"t{index}": index for index in range(fields["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return path


def write_generation(directory, value):
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))


@pytest.mark.parametrize(
    ("generation", "outer", "text", "expected"),
    [
        ([7, 9], 2, 3, (7, 9)),
        (7, 2, 3, (7,)),
        (None, [2, 4], 3, (2, 4)),
        (None, None, 3, (3,)),
        ([], 2, None, (2,)),
        ([5, 5], 2, None, (5,)),
        (None, None, None, ()),
    ],
)
def test_read_stop_tokens_takes_the_first_file(tmp_path, generation, outer, text, expected):
    write_generation(tmp_path, generation)
    sections = ({"eos_token_id": outer}, {"eos_token_id": text})
    assert read_stop_tokens(tmp_path, *sections) == expected
    (tmp_path / "generation_config.json").unlink()
    if generation is None:
        assert read_stop_tokens(tmp_path, *sections) == expected


@pytest.mark.parametrize("value", [-1, True, 2.5, "2", [[2]], 2**31, {"id": 2}, list(range(1001))])
def test_read_stop_tokens_refuses_other_values(tmp_path, value):
    write_generation(tmp_path, value)
    with pytest.raises(ConfigError, match=r"generation_config\.json: field 'eos_token_id' is"):
        read_stop_tokens(tmp_path, {})


def test_read_stop_tokens_refuses_links_that_lead_out(tmp_path):
    (tmp_path / "inside").mkdir()
    write_generation(tmp_path, 5)
    link = tmp_path / "inside" / "generation_config.json"
    link.symlink_to(tmp_path / "generation_config.json")
    with pytest.raises(CheckpointError, match="leads out"):
        read_stop_tokens(tmp_path / "inside", {})


def test_every_reader_of_a_directory_agrees(directory, tmp_path):
    write_generation(directory, [2, 9])
    model, params = ge.load(directory)
    for format in ("hugging_face", "safetensors"):
        ge.save(model, params, tmp_path / format, format=format)
        for name in ("tokenizer.json", "chat_template.jinja"):
            shutil.copy(directory / name, tmp_path / format)
    for path in (directory, tmp_path / "hugging_face", tmp_path / "safetensors"):
        readers = {
            "load": ge.load(path)[0].config.eos_token_ids,
            "build": checkpoint.build(path).config.eos_token_ids,
            "lazy": open_lazily(path).model.config.eos_token_ids,
            "processor": ge.Processor.from_checkpoint(path).stop_token_ids,
        }
        assert readers == dict.fromkeys(readers, (2, 9)), path
    # A file put beside our own checkpoint counts there too, for both readers.
    write_generation(tmp_path / "safetensors", 4)
    assert ge.load(tmp_path / "safetensors")[0].config.eos_token_ids == (4,)
    assert ge.Processor.from_checkpoint(tmp_path / "safetensors").stop_token_ids == (4,)
