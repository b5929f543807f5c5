"""Settings, cells and files of the benchmark of run-time pruning."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import skipping as bench_skipping
from experiments.common import skipping_eval
from experiments.common.figures import skipping_figure
from glm_edge.configs import DecoderConfig, GLMConfig
from glm_edge.errors import RecipeError
from glm_edge.generate import SweepRow
from glm_edge.models.multimodal import MultimodalGLM

ROOT = Path(__file__).parents[3]


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.bench.skipping", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture(scope="module")
def small():
    model = MultimodalGLM(GLMConfig("small", DecoderConfig(40, 16, 2, 2, 1, 8, 24)))
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def row(name, value, accuracy=0.5, tokens_per_second=100.0):
    return SweepRow(name, value, accuracy, 0.9, 1.5, tokens_per_second, 1.25, 1.1, 1.4)


def test_settings_are_the_exits_and_neurons_asked_for(small):
    exits = skipping_eval.exit_settings(*small, [1], [0.8, 0.95])
    assert [setting.name for setting in exits] == ["exit 0.8", "exit 0.95"]
    assert exits[1].early_exit.after == (1,)
    assert skipping_eval.exit_settings(*small, [], [0.8]) == []
    neurons = skipping_eval.neuron_settings(*small, [0.5], [0.1])
    assert [setting.name for setting in neurons] == ["keep 0.5", "gate 0.1"]
    assert all(setting.early_exit is None for setting in neurons)
    with pytest.raises(RecipeError, match="this MultimodalGLM reads no images"):
        skipping_eval.vision_settings(*small, [0.5])
    assert skipping_eval.vision_settings(*small, []) == []
    with pytest.raises(RecipeError, match="threshold must be in"):
        skipping_eval.exit_settings(*small, [1], [1.2])


def test_a_row_says_what_was_lost_beside_what_was_published():
    first = row("all", None, accuracy=0.75)
    result = bench_skipping.cells(row("keep 0.5", 0.5), first)
    assert result[1:4] == ["50.0%", "25.0", "90.0%"]
    assert result[-2:] == ["1.25 (1.10-1.40)", "1.42 x at 3 %"]
    assert bench_skipping.cells(first, first)[-1] == ""
    read = list(csv.DictReader(io.StringIO(bench_skipping.as_csv([first]))))
    assert read[0]["accuracy"] == "0.75"


def test_the_figure_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [vars(row("all", None)), vars(row("exit 0.5", 0.5)), vars(row("exit 0.9", 0.9))]
    skipping_figure(rows, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_script_runs_to_the_end_and_refuses_bad_thresholds(tmp_path):
    few = [
        "--screens=4",
        "--rounds=1",
        "--keep=0.5",
        "--neuron_thresholds=",
        "--nomaps",
        "--vision_keep=0.5",
    ]
    out = f"--out_dir={tmp_path / 'out'}"
    bad = run_script(*few, out, "--thresholds=1.5")
    assert bad.returncode == 1
    assert bad.stderr.strip().endswith("threshold must be in 0..1, not 1.5")
    done = run_script(*few, out, "--thresholds=0.9", "--overwrite")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [r["name"] for r in report["rows"]] == [
        "all", "exit 0.9", "keep 0.5", "vision 0.5"
    ]  # fmt: skip
    assert report["rows"][0]["speedup"] == 1.0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.json",
        "skipping.png",
        "table.csv",
        "table.md",
    }
