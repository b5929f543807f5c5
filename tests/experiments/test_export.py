"""The script that writes the phone's file: what it prints and reports, and how it refuses."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import glm_edge as ge
from experiments import make_checkpoint

if not (find_spec("tensorflow") and find_spec("ai_edge_litert")):
    pytest.skip("needs the extra 'export'", allow_module_level=True)

SMALL = make_checkpoint.CONFIGS["glm_edge_1_5b"] | {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "eos_token_id": [1],
    "pad_token_id": 0,
}


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.export", *map(str, flags)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source") / "small"
    make_checkpoint.write(SMALL, str(directory), 1e9, seed=0)
    return directory


@pytest.mark.slow
def test_a_checkpoint_becomes_a_verified_file_and_a_report(checkpoint, tmp_path):
    model, params = ge.load(checkpoint)
    recipe = ge.chain(
        ge.quantize.rtn(bits=4, group_size=32, where="^decoder/"), ge.quantize.rtn(bits=8)
    )
    model, params, _ = recipe(model, params)
    ge.save(model, params, tmp_path / "compressed")
    flags = ["--checkpoint", tmp_path / "compressed", "--out", tmp_path / "phone.tflite"]
    flags += ["--prefill_lengths=16", "--cache_slots=32", "--verify", "--report"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    file = tmp_path / "phone.tflite"
    assert report["file_bytes"] == file.stat().st_size
    assert report["verification"]["passed"]
    assert report["verification"]["tokens"] >= 1000
    assert ge.export.read_metadata(file)["verified"] is True
    table = ge.export.compatibility(file)
    for name in table.delegates:
        counts = {key: report["compatibility"][name][key] for key in ("yes", "no", "unknown")}
        assert counts == table.counts(name)
    assert "FULLY_CONNECTED" in report["compatibility"]["gpu"]["fallback"]
    converted = {conversion["path"] for conversion in report["conversions"]}
    assert "decoder/norm/weight" in converted
    for shown in (f"{file.stat().st_size:,}", "top-1 agreement", "operators on qnn", "converted "):
        assert shown in done.stdout

    again = run(*flags)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].endswith("name another place or pass --overwrite")


@pytest.mark.slow
def test_a_file_that_disagrees_is_a_failure(tmp_path):
    (tmp_path / "text.txt").write_text("Functions defined with def may return a value. " * 20)
    flags = ["--out", tmp_path / "phone.tflite", "--cache_slots=64", "--prefill_lengths=32"]
    flags += ["--verify", "--threshold=1.0", "--text", tmp_path / "text.txt", "--text_tokens=64"]
    done = run(*flags)
    shown = [line for line in done.stdout.splitlines() if "top-1 agreement" in line][0]
    assert "of 64 tokens" in shown
    assert (done.returncode == 0) == ("100.00%" in shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onnx", "--verify"], "a onnx file is not run here"),
        (["--prefill_lengths=many"], "numbers such as 128,512 are right"),
        (["--checkpoint=nowhere"], "nowhere"),
        (["--out=nowhere/phone.tflite"], "its directory does not exist"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_in_one_line(flags, message, tmp_path):
    refused = run("--out", tmp_path / "phone.tflite", *flags)
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())
