"""Sizes of updates: every form restores its files, and a small run."""

import gzip
import json

import numpy as np
import pytest

from experiments.tables import update_sizes
from glm_edge.checkpoint.safetensors import write_safetensors
from glm_edge.errors import DataError

pytest.importorskip("tuf")


def test_patch_from_uses_the_old_file():
    pytest.importorskip("zstandard")
    old = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8).tobytes()
    assert len(update_sizes.patch_from(old, b"new" + old[1000:])) < 1000


def test_a_json_patch_has_changed_tensors_only(tmp_path):
    arrays = {"a/b": np.arange(6.0), "same": np.arange(900), "removed": np.zeros(2)}
    write_safetensors(tmp_path / "old", arrays)
    write_safetensors(tmp_path / "new", {"a/b": np.arange(6.0) + 1, "same": np.arange(900)})
    packed = update_sizes.json_patch(tmp_path / "old", tmp_path / "new")
    patch = json.loads(gzip.decompress(packed))
    assert [(op["op"], op["path"]) for op in patch] == [
        ("replace", "/a~1b"),
        ("remove", "/removed"),
    ]


def test_a_form_that_restores_other_bytes_is_refused():
    with pytest.raises(DataError, match="bsdiff: does not restore"):
        update_sizes.check(False, "bsdiff")


@pytest.mark.slow
def test_three_releases_are_measured(run):
    rows, log = run(update_sizes, "--steps=1")
    sizes = log["measured"]["bytes"]
    assert set(sizes) == {"re-quantized", "healed", "one layer"}
    for name, forms in sizes.items():
        assert 0 < forms["glm_edge.update"] < forms["complete"] <= forms["files"]
        saved = float(rows[f"{name}, glm_edge.update"]["measured"])
        assert saved == pytest.approx(100 * (1 - forms["glm_edge.update"] / forms["complete"]))
