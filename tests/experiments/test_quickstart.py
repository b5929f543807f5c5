"""The main job on a checkpoint made here, and what it says of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import glm_edge as ge
from glm_edge import configs
from glm_edge.models.multimodal import MultimodalGLM

ROOT = Path(__file__).parents[2]


def run_script(module: str, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    config = configs.GLMConfig(
        name="text_only",
        decoder=configs.DecoderConfig(
            vocab_size=311,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=96,
            max_position_embeddings=256,
        ),
        eos_token_ids=(2,),
        pad_token_id=2,
    )
    model = MultimodalGLM(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return ge.save(model, params, tmp_path_factory.mktemp("checkpoint") / "text_only")


@pytest.mark.slow
def test_text_only_checkpoint_runs_to_the_end_with_null_taps(text_only, tmp_path):
    out = tmp_path / "out"
    result = run_script(
        "experiments.quickstart",
        f"--checkpoint={text_only}",
        f"--out_dir={out}",
        "--recipe=quickstart",
        "--smoke",
    )
    assert result.returncode == 0, result.stderr
    # Notes of the script alone: no bars without a terminal, no messages of the libraries.
    assert [line for line in result.stderr.splitlines() if not line.startswith("note: ")] == []
    report = json.loads((out / "report.json").read_text())
    stages = [row["stage"] for row in report["rows"]]
    assert stages == ["dense", "pruned", "healed", "quantized", "exported"]
    for row in report["rows"]:
        assert row["tap_in_box_text"] is None
        assert row["tap_in_box_speech"] is None
        assert row["perplexity"] > 1
        assert row["ms_per_token"] > 0
    sizes = {row["stage"]: row["bytes"] for row in report["rows"]}
    assert sizes["quantized"] < sizes["pruned"] < sizes["dense"]
    assert report["export"]["tokens"] >= 1000
    assert report["export"]["file_bytes"] == (out / "model.tflite").stat().st_size
    assert set(report["run"]) >= {
        "command", "seed", "seconds", "peak_rss_bytes", "versions", "commit",
    }  # fmt: skip
    assert (out / "table.md").read_text().count("\n") == 7
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def bad_text(folder: Path, checkpoint: Path) -> tuple[list[str], str]:
    path = folder / "latin.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    return [f"--checkpoint={checkpoint}", f"--text={path}"], "not UTF-8"


def empty_text(folder: Path, checkpoint: Path) -> tuple[list[str], str]:
    (folder / "empty.txt").touch()
    return [f"--checkpoint={checkpoint}", f"--text={folder / 'empty.txt'}"], "empty"


def missing_checkpoint(folder: Path, checkpoint: Path) -> tuple[list[str], str]:
    return [f"--checkpoint={folder / 'nowhere'}"], "does not exist"


def unknown_recipe(folder: Path, checkpoint: Path) -> tuple[list[str], str]:
    path = folder / "recipe.json"
    path.write_text('{"name": "quantize.magic", "options": {}}')
    return [f"--checkpoint={checkpoint}", f"--recipe={path}"], "quantize.magic"


def pattern_without_match(folder: Path, checkpoint: Path) -> tuple[list[str], str]:
    path = folder / "recipe.json"
    path.write_text('{"name": "quantize.rtn", "options": {"where": "no_such_layer"}}')
    return [f"--checkpoint={checkpoint}", f"--recipe={path}", "--smoke"], "no_such_layer"


def results_exist(folder: Path, checkpoint: Path) -> tuple[list[str], str]:
    (folder / "out").mkdir()
    (folder / "out" / "report.json").write_text("{}")
    return [f"--checkpoint={checkpoint}"], "--overwrite"


def out_is_a_file(folder: Path, checkpoint: Path) -> tuple[list[str], str]:
    (folder / "out").write_text("")
    return [f"--checkpoint={checkpoint}"], "is a file"


@pytest.mark.parametrize(
    "case",
    [
        bad_text,
        empty_text,
        missing_checkpoint,
        unknown_recipe,
        pattern_without_match,
        results_exist,
        out_is_a_file,
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(case, text_only, tmp_path):
    arguments, message = case(tmp_path, text_only)
    before = sorted(tmp_path.rglob("*"))
    result = run_script("experiments.quickstart", f"--out_dir={tmp_path / 'out'}", *arguments)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr
    written = set(tmp_path.rglob("*")) - set(before) - {tmp_path / "out"}
    assert not written


def test_evaluate_refuses_a_missing_folder(text_only, tmp_path):
    result = run_script(
        "experiments.evaluate", f"--checkpoint={text_only}", f"--json={tmp_path / 'no' / 'x.json'}"
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("module", ["quickstart", "evaluate", "train_nano"])
def test_help_teaches(module):
    result = run_script(f"experiments.{module}", "--help")
    assert "--seed" in result.stdout
    assert f"python -m experiments.{module}" in result.stdout
