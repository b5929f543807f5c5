"""The script that compresses a checkpoint: what it writes, and how it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import glm_edge as ge
from experiments.bench import compress as bench_compress
from experiments.bench import gptq as bench_gptq
from experiments.golden import make_checkpoint
from glm_edge.cli import calibration
from glm_edge.errors import DataError, OutputError

SMALL = make_checkpoint.CONFIGS["glm_edge_1_5b"] | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": [1],
    "pad_token_id": 0,
}


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.compress", *map(str, flags)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_hugging_face_directory_is_compressed_and_reported(tmp_path):
    make_checkpoint.write(SMALL, str(tmp_path / "source"), 1e9, seed=0)
    tokens = np.random.default_rng(0).integers(2, 64, (8, 16), dtype=np.int32)
    np.savez(tmp_path / "tokens.npz", tokens=tokens)
    recipe = ge.chain(ge.quantize.gptq("int4-g16", where="^decoder/"), ge.quantize.rtn("int8"))
    (tmp_path / "recipe.json").write_text(ge.to_json(recipe))
    flags = ["--checkpoint", tmp_path / "source", "--recipe", tmp_path / "recipe.json"]
    flags += ["--out_dir", tmp_path / "out"]
    refused = run(*flags)
    assert refused.returncode == 1
    assert "needs --calibration batches" in refused.stderr.splitlines()[-1]
    done = run(*flags, "--calibration", tmp_path / "tokens.npz")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    _, params = ge.load(tmp_path / "out" / "checkpoint")
    assert report["bytes_after"] == ge.params.stored_bytes(params)
    rounded = {p for p, leaf in ge.params.path_items(params) if ge.params.is_box(leaf)}
    assert {row["path"] for row in report["parameters"]} == rounded
    assert all(row["bits"] < 16 and row["relative_error"] < 0.2 for row in report["parameters"])
    assert report["peak_rss_bytes"] > 1e7


@pytest.mark.slow
def test_the_shipped_model_is_measured_before_and_after(tmp_path):
    (tmp_path / "text.txt").write_text("Functions defined with def may return a value. " * 60)
    flags = ["--recipe=rtn_4bit", "--out_dir", tmp_path / "out", "--text", tmp_path / "text.txt"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    text = json.loads((tmp_path / "out" / "report.json").read_text())["text"]
    expected = text["after"]["perplexity"] / text["before"]["perplexity"] - 1
    assert text["relative_increase"] == pytest.approx(expected)
    assert text["before"]["kl"] == 0.0
    assert text["after"]["kl"] > 0.0
    assert ge.load_tokenizer(tmp_path / "out" / "checkpoint") is not None


def test_arrays_become_batches(tmp_path):
    images = np.zeros((5, 4, 4, 3), np.float32)
    np.savez(tmp_path / "rows.npz", tokens=np.ones((5, 8), np.int32), images=images)
    batches = calibration.from_file(str(tmp_path / "rows.npz"), None, 1, 8, 2)
    assert [len(batch["tokens"]) for batch in batches] == [2, 2, 1]
    assert batches[0]["images"].shape == (2, 4, 4, 3)


@pytest.mark.parametrize("content", ["text", "uneven", "broken"])
def test_calibration_files_that_are_none_are_refused(tmp_path, content):
    path = tmp_path / ("short.txt" if content == "text" else "rows.npz")
    if content == "uneven":
        np.savez(path, tokens=np.ones((5, 8), np.int32), images=np.ones((4, 2)))
    else:
        path.write_text("no")
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    with pytest.raises(DataError, match=path.name):
        calibration.from_file(str(path), tokenizer, 4, 64, 2)


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr(bench_compress.shutil, "disk_usage", lambda path: free)
    fields = make_checkpoint.CONFIGS["glm_4_9b"]
    with pytest.raises(OutputError, match=r"needs 24\.4 GB, 1\.0 GB are free"):
        bench_compress.check_disk(tmp_path / "source", fields)
    (tmp_path / "source").mkdir()
    with pytest.raises(OutputError, match=r"needs 5\.6 GB"):
        bench_compress.check_disk(tmp_path / "source", fields)


def test_the_raced_decoder_has_as_many_parameters():
    shapes = make_checkpoint.tensor_shapes(bench_gptq.MOBILE)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 336_897_024
