"""The script that writes the phone's file: what it prints and reports, and how it refuses."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import glm_edge as ge
from experiments.golden import make_checkpoint

if not (find_spec("tensorflow") and find_spec("ai_edge_litert")):
    pytest.skip("needs the extra 'export'", allow_module_level=True)

SMALL = make_checkpoint.CONFIGS["glm_edge_1_5b"] | {
    "vocab_size": 2304,
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


def compressed(directory, strength):
    """A text model of random weights, with the shipped model's tokenizer.

    The stronger its layers beside the residual that they add to, the likelier rounding changes a
    token.
    """
    make_checkpoint.write(SMALL, str(directory / "dense"), 1e9, seed=0)
    recipe = ge.chain(ge.quantize.rtn("int4-g32", where="^decoder/"), ge.quantize.rtn("int8"))
    model, params = ge.load(directory / "dense")
    params = ge.params.map_with_path(
        lambda path, leaf: strength * leaf if path.startswith("decoder/layers") else leaf, params
    )
    model, params, _ = recipe(model, params)
    names = ("tokenizer.json", "chat_template.jinja")
    extras = {name: ge.shipped("nano") / name for name in names}
    ge.save(model, params, directory / "small", extras=extras)
    return directory / "small"


@pytest.mark.slow
def test_a_checkpoint_becomes_a_verified_file_and_a_report(tmp_path):
    checkpoint = compressed(tmp_path, strength=1)
    flags = ["--checkpoint", checkpoint, "--out", tmp_path / "phone.tflite"]
    flags += ["--prefill_lengths=16", "--cache_slots=32", "--verify", "--report"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
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
    assert again.stderr.splitlines()[-1].endswith("use a different path or pass --overwrite")


@pytest.mark.slow
def test_a_file_that_disagrees_is_a_failure(tmp_path):
    checkpoint = compressed(tmp_path, strength=2)
    (tmp_path / "text.txt").write_text(" ".join(str(i**3) for i in range(400)))
    flags = ["--checkpoint", checkpoint, "--out", tmp_path / "phone.tflite", "--cache_slots=64"]
    flags += ["--prefill_lengths=32", "--text", tmp_path / "text.txt", "--text_tokens=300"]
    # Rounded activations against none: not every token agrees.
    done = run(*flags, "--verify", "--compute=float32", "--threshold=1.0")
    assert done.returncode == 1
    reason = "verification failed: threshold 100.00%"
    assert reason in done.stderr.splitlines()[-1]
    shown = next(line for line in done.stdout.splitlines() if "top-1 agreement" in line)
    assert "of 300 tokens" in shown
    assert ge.export.read_metadata(tmp_path / "phone.tflite")["verified"] is False


EXTRAS = {
    "onnx": ("onnx", "onnxruntime"),
    "mnn": ("MNN", "onnx"),
    "coreml": ("coremltools", "stablehlo_coreml"),
    "litertlm": ("litert_lm", "litert_lm_builder"),
}


def installed(name):
    return all(find_spec(module) for module in EXTRAS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTRAS)
def test_every_format_is_verified_or_says_that_nothing_ran_it(name, tmp_path):
    if not installed(name):
        pytest.skip(f"needs the extra {name!r}")
    checkpoint = compressed(tmp_path, strength=1)
    out = tmp_path / ("phone.mlpackage" if name == "coreml" else f"phone.{name}")
    flags = ["--checkpoint", checkpoint, "--format", name, "--out", out, "--verify", "--report"]
    done = run(*flags, "--prefill_lengths=16", "--cache_slots=96")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "report.json").read_text())["verification"]
    assert result["ran"] is (name != "coreml")
    if name == "coreml":
        assert "no: it was not run" in done.stdout
        assert (
            "quantized weights equal the model's, bit for bit; the package was not run"
            in done.stdout
        )
        assert ge.export.read_metadata(out)["verified"] is False
        return
    assert result["passed"]
    assert result["compute"] == ("int8_dynamic" if name == "litertlm" else "float32")
    assert result["tokens"] >= (100 if name == "litertlm" else 1000)
    assert "top-1 agreement" in done.stdout
    if name != "litertlm":
        assert ge.export.read_metadata(out)["verified"] is True


@pytest.mark.parametrize("name", EXTRAS)
def test_missing_runtime_is_named_first(name, tmp_path):
    """A runtime that is missing is named before anything is done."""
    if installed(name) or name == "coreml":
        pytest.skip("the runtime is installed, or not needed")
    refused = run("--format", name, "--out", tmp_path / "phone", "--verify")
    assert refused.returncode == 1
    assert f"glm_edge[{name}]" in refused.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onnx", "--verify", "--compute=int8_dynamic"], "onnx graphs run in float32"),
        (["--format=mnn", "--verify", "--compute=int8_static"], "mnn graphs run in float32"),
        (["--format=coreml", "--verify", "--compute=float32"], "does not apply to coreml"),
        (["--format=coreml", "--verify", "--text=a.txt"], "--text: does not apply to coreml"),
        (["--prefill_lengths=many"], "use integers such as 128,512"),
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
