"""Orbax directories and paths that Orbax itself cannot be trusted with."""

import os

import jax.numpy as jnp
import pytest

from glm_edge.checkpoint import orbax
from glm_edge.errors import CheckpointError, OutputError

DESCRIBED = {"a": ["float32", [2]]}


@pytest.fixture
def arrays(tmp_path):
    assert orbax.write(tmp_path, {"a": jnp.arange(2.0)}) == DESCRIBED
    return tmp_path / orbax.ARRAYS


def test_read_opens_no_pipe(arrays):
    (arrays / "_METADATA").unlink()
    os.mkfifo(arrays / "_METADATA")
    with pytest.raises(CheckpointError, match=r"_METADATA: is a pipe, socket or device"):
        orbax.read(arrays.parent, DESCRIBED)


def test_read_follows_no_link_out(arrays):
    (arrays / "x").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a link that leads out"):
        orbax.read(arrays.parent, DESCRIBED)


def test_read_of_a_damaged_directory_prints_nothing(arrays, capfd):
    for path in arrays.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="Orbax cannot restore it") as caught:
        orbax.read(arrays.parent, DESCRIBED)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a\\b", "a\udcff"])
def test_paths_that_orbax_cannot_use(tmp_path, name):
    with pytest.raises(OutputError, match="Orbax cannot use a path"):
        orbax.check_path(tmp_path / name, OutputError)
