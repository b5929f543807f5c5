"""Modules from config.json alone."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import glm_edge as ge
from glm_edge.checkpoint.companions import companion_paths
from glm_edge.cli.checkpoints import checkpoint_of
from glm_edge.errors import CheckpointError, ConfigError

PUBLISHED = Path(__file__).parent / "published"


def test_build_counts_a_published_config():
    """A published file gives a module that is counted without weights."""
    model = ge.build(PUBLISHED / "glm-edge-1.5b-chat.json")
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert ge.params.count(shapes) == 1_472_055_296


def test_a_directory_of_ours_gives_the_module_that_load_gives():
    assert ge.build(ge.shipped("nano")) == ge.load(ge.shipped("nano"))[0]


def test_what_is_no_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        ge.build(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="model_type 'llama' is unknown"):
        ge.build(tmp_path)


@pytest.mark.parametrize("named", [".", "config.json"])
def test_build_follows_no_link_out_of_the_checkpoint(tmp_path, named):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").symlink_to(PUBLISHED / "glm-edge-1.5b-chat.json")
    with pytest.raises(CheckpointError, match="a link that leads out of the checkpoint"):
        ge.build(tmp_path / "in" / named)


READERS = {
    "load": ge.load,
    "build": ge.build,
    "processor": ge.Processor.from_checkpoint,
    "tokenizer": ge.load_tokenizer,
    "companions": companion_paths,
    "command": lambda path: ge.load(checkpoint_of(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("path", ["a\0/b", "a" * 5000, "a/" * 2500, "a\nb", "\ud800"])
def test_readers_refuse_odd_paths_in_one_line(reader, path):
    with pytest.raises(CheckpointError) as caught:
        READERS[reader](path)
    assert len(str(caught.value).splitlines()) == 1
    assert "\0" not in str(caught.value)
    assert len(str(caught.value)) < 1000
