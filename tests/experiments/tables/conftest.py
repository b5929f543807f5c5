"""Runs a table's script in this process, and digits small enough to train in seconds."""

import csv
import json

import jax
import numpy as np
import pytest
from absl import flags

from experiments.tables import vision


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(compiled_programs):
    """Steps of training take longer to optimize than these few of them take to run."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def run(tmp_path):
    """Runs a script with flags; returns its rows as written, and its JSON file."""

    def go(script, *arguments):
        known = set(flags.FLAGS)
        try:
            script.define_flags()
            flags.FLAGS([script.NAME, f"--out_dir={tmp_path}", *map(str, arguments)])
            script.main([script.NAME])
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
        with open(tmp_path / "table.csv", newline="") as file:
            rows = {row["quantity"]: row for row in csv.DictReader(file)}
        return rows, json.loads((tmp_path / "table.json").read_text())

    return go


@pytest.fixture(scope="session")
def tiny():
    """Ten classes of 8x8 images: a bright row or column each, in noise."""
    rng = np.random.default_rng(0)

    def draw(count):
        labels = np.arange(count) % 10
        images = rng.normal(0.0, 0.1, (count, 8, 8, 1)).astype(np.float32)
        for index, label in enumerate(labels):
            if label < 5:
                images[index, label + 1] += 1.0
            else:
                images[index, :, label - 4] += 1.0
        return images, labels.astype(np.int32)

    return vision.Digits("tiny", *draw(200), *draw(100))
