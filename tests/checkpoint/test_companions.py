"""Tokenizer, template and processor files travel with a model, or the user hears of it."""

import os
import warnings

import pytest

import glm_edge as ge
from glm_edge.checkpoint.companions import COMPANIONS, companion_paths
from glm_edge.errors import CheckpointError

NANO = ge.shipped("nano")


@pytest.fixture(scope="module")
def nano():
    return ge.load(NANO)


def test_source_brings_what_a_processor_reads(nano, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy = ge.save(*nano, tmp_path / "copy", source=NANO)
    names = set(companion_paths(NANO))
    assert "tokenizer.json" in names <= set(COMPANIONS)
    assert all((copy / name).read_bytes() == (NANO / name).read_bytes() for name in names)
    question = [{"role": "user", "content": "tap the star icon"}]
    prompts = [ge.Processor.from_checkpoint(path)(question).tokens for path in (NANO, copy)]
    assert prompts[0].tolist() == prompts[1].tolist()


def test_extras_replace_files_of_the_source(nano, tmp_path):
    extras = {"chat_template.jinja": b"other", "notes.txt": b"more"}
    copy = ge.save(*nano, tmp_path / "copy", source=NANO, extras=extras)
    assert (copy / "chat_template.jinja").read_bytes() == b"other"
    assert (copy / "notes.txt").read_bytes() == b"more"
    assert (copy / "tokenizer.json").is_file()


def test_a_model_without_a_tokenizer_is_told(nano, tmp_path):
    with pytest.warns(UserWarning, match="saved without a tokenizer.*as source="):
        ge.save(*nano, tmp_path / "copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ge.save(*nano, tmp_path / "other", extras={})


@pytest.mark.parametrize("kind", ["missing", "link", "pipe"])
def test_sources_that_are_none_write_nothing(kind, nano, tmp_path):
    source = tmp_path / "source"
    if kind != "missing":
        source.mkdir()
    if kind == "link":
        (tmp_path / "secret").write_text("{}")
        (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    if kind == "pipe":
        os.mkfifo(source / "tokenizer.json")
    with pytest.raises(CheckpointError, match="source"):
        ge.save(*nano, tmp_path / "copy", source=source)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("open_it", [ge.load, ge.Processor.from_checkpoint])
def test_a_name_of_a_repository_is_to_be_downloaded(open_it, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="hf download zai-org/glm-4 --local-dir glm-4, then"):
        open_it("zai-org/glm-4")
    with pytest.raises(CheckpointError) as refused:
        open_it("/no/such/folder")
    assert "does not exist" in str(refused.value)
    assert "hf download" not in str(refused.value)
