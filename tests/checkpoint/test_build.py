"""Modules from config.json alone."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import glm_edge as ge
from glm_edge.errors import CheckpointError, ConfigError

PUBLISHED = Path(__file__).parent / "published"


def test_a_published_file_gives_a_module_that_is_counted_without_weights():
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
