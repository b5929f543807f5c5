"""`glm-edge export`: its table, and served directories."""

import dataclasses
import json

import pytest

import glm_edge as ge
from glm_edge.export import Verification
from tests.tiny_models import init_glm, tiny_config

pytest.importorskip("absl")


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "yes"),
        ({"tokens": 10}, "no: threshold 99.00%; not marked as verified: only 10 of at least "),
        ({"threshold": 0.5}, "no: threshold 50.00%; not marked as verified: the default thresh"),
        ({"turns": 1}, "no: threshold 99.00%; not marked as verified: the cache fits 1 turns"),
        ({"agreement": 0.9}, "no: threshold 99.00% (rounding"),
        ({"threshold": float("nan")}, "no: threshold nan% (rounding"),
    ],
)
def test_verification_rows_say_yes_of_marked_files_alone(fields, shown):
    from glm_edge.cli.export import verification_rows

    enough = Verification(1.0, 1000, None, None, None, 0, "int8_dynamic", 0.99, 0.99, turns=3)
    result = dataclasses.replace(enough, **fields)
    summary = {"passed": result.passed, "verified": result.verified, "reason": result.reason}
    rows = dict(
        verification_rows(
            {"ran": True, "tokens_of": "random tokens", **dataclasses.asdict(result), **summary}
        )
    )
    assert rows["verified"].startswith(shown)
    assert result.verified == (shown == "yes")


@pytest.fixture
def compressed(tmp_path):
    """A checkpoint with boxes and a tokenizer, of a config that Hugging Face knows."""
    config = tiny_config(
        {"attention_bias": True}, image_token_id=None, audio_token_id=None, eos_token_ids=(1,)
    )
    model, params = init_glm(config)
    _, params, _ = ge.quantize.rtn("int8", where="^decoder/")(model, params)
    return ge.save(model, params, tmp_path / "small", source=ge.shipped("nano"))


def test_a_compressed_checkpoint_becomes_a_served_directory(run, compressed, tmp_path, capsys):
    out = tmp_path / "served"
    flags = ["--checkpoint", compressed, "--format=compressed_tensors", "--out", out]
    run("export", *flags, "--verify", "--activations=int8_dynamic")
    shown = capsys.readouterr().out
    assert "bit for bit; no engine ran the directory" in shown
    assert (out / "tokenizer.json").read_bytes() == (compressed / "tokenizer.json").read_bytes()
    fields = json.loads((out / "config.json").read_text())
    assert fields["quantization_config"]["format"] == "int-quantized"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=compressed_tensors", "--cache_slots=8"], "--cache_slots: does not apply to"),
        (["--format=compressed_tensors", "--verify", "--text=a"], "--text: does not apply to comp"),
        (["--format=onnx", "--activations=float"], "--activations: does not apply to onnx"),
    ],
)
def test_flags_of_other_formats_are_refused(run, compressed, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        run("export", "--checkpoint", compressed, "--out", tmp_path / "served", *flags)
    assert not (tmp_path / "served").exists()
