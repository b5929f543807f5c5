"""Shapes and random parameters of the export benchmark, and a small run of it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import conversion as bench_conversion
from experiments.bench.runtimes.random_model import fitting, random_box, random_model
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import preset, to_dict
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mobile", 334_240_256), ("glm_edge_1_5b", 1_472_055_296), ("glm_4_9b", 9_399_951_360)],
)
def test_shapes_have_the_counts_of_their_models(name, parameters):
    shapes = expected_shapes(MultimodalGLM(bench_conversion.shape_of(name)))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_presets_are_whole():
    for name in ("mobile", "nano"):
        shapes = expected_shapes(MultimodalGLM(bench_conversion.shape_of(name)))
        assert {path.split("/")[0] for path in shapes} >= {"decoder", "vision", "speech", "embed"}


@pytest.mark.parametrize("form", ["int8", "int4", "int4-g32", "int2"])
def test_random_weights_keep_the_size_of_what_they_meet(form):
    box = random_box(np.random.default_rng(0), (256, 512), Format.parse(form))
    assert boxes.stored_bytes(box) == Format.parse(form).stored_bytes((256, 512))
    x = np.random.default_rng(1).normal(size=(64, 512))
    assert 0.5 < float(np.std(x @ np.asarray(box.unbox(), np.float64).T)) < 2


@pytest.mark.parametrize("form", ["int4", "int4-g32", "float16"])
def test_made_parameters_have_the_format_and_differ(form):
    """Every matrix is of the form and no two vectors are equal."""
    params = random_model(to_dict(preset("nano")), form)[1]
    observed = set()
    for path, leaf in boxes.path_items(params):
        if not boxes.is_matrix(path, leaf):
            observed.add(np.asarray(leaf).tobytes())
        elif form == "float16":
            assert leaf.dtype == form
            observed.add(np.asarray(leaf).tobytes())
        else:
            assert leaf.format == fitting(Format.parse(form), leaf.shape[1])
            observed |= {np.asarray(leaf.data).tobytes(), np.asarray(leaf.scale).tobytes()}
    stored = 1 if form == "float16" else 2
    matrices = [boxes.is_matrix(path, leaf) for path, leaf in boxes.path_items(params)]
    assert len(observed) == sum(stored if matrix else 1 for matrix in matrices)


def test_columns_that_groups_do_not_divide():
    """Columns that are no whole groups have scales per channel."""
    blocks = Format.parse("int4-g32")
    assert fitting(blocks, 64) == blocks
    assert fitting(blocks, 60) == Format("int4")
    assert fitting(Format("int8"), 60) == Format("int8")


def test_goals_are_those_of_the_shape():
    results = {"stored_bytes": 100e6, "file_bytes": 103e6, "seconds": 61.0, "peak_rss_bytes": 3e9}
    rows = {row["goal"]: row for row in bench_conversion.goals("mobile", results)}
    assert rows["file_bytes"]["at_most"] == 103e6
    assert {name: row["reached"] for name, row in rows.items()} == {
        "file_bytes": True,
        "seconds": False,
        "peak_rss_bytes": True,
    }
    results["file_bytes"] += 1
    [size] = bench_conversion.goals("nano", results)
    assert not size["reached"]


@pytest.mark.slow
def test_a_small_run_writes_the_whole_model(tmp_path):
    out = tmp_path / "conversion.json"
    command = [sys.executable, "-m", "experiments.bench.conversion", "--shape=nano"]
    command += ["--format=int4", "--prefill=8,16", "--slots=128", "--contexts=16"]
    command += [f"--work_dir={tmp_path / 'models'}", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    log = json.loads(out.read_text())
    converted, ran = log["convert"], log["run"]
    steps = {"embed", "embed_8", "embed_16", "decode", "prefill_8", "prefill_16"}
    assert set(converted["signatures"]) == steps | {"vision", "speech"}
    # Nothing of the parameters is held once for two of them.
    assert converted["stored_bytes"] < converted["file_bytes"]
    assert log["goals"] == bench_conversion.goals("nano", converted)
    assert [goal["reached"] for goal in log["goals"]] == [True]
    assert "reached" in done.stdout
    assert {"vision_ms", "speech_ms", "decode_16_ms", "prefill_8_tokens_per_second"} <= set(ran)
    assert ran["weight_bytes"] < converted["stored_bytes"]
    original = shlex.split(log["command"])
    assert {"--prefill=8,16", "--one_step=False", "--slots=128", "--threads=2"} <= set(original)
    assert log["memory_bytes"] > converted["peak_rss_bytes"]
    assert not list((tmp_path / "models").iterdir())
