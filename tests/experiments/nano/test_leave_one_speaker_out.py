"""Every person is measured once per seed, by an encoder that has never heard that person."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.nano import digit_training, leave_one_speaker_out, objectives
from experiments.nano.phone_screens import speech
from glm_edge import configs

ROOT = Path(__file__).parents[3]


def test_the_summary_averages_seeds_then_people():
    results = [
        {"person": person, "seed": seed, "accuracy": rate}
        for person, rates in (("ann", (0.9, 0.8)), ("bob", (0.6, 0.7)))
        for seed, rate in enumerate(rates)
    ]
    summary = leave_one_speaker_out.summary(results)
    assert summary["per_person"] == pytest.approx({"ann": 0.85, "bob": 0.65})
    assert summary["value"] == pytest.approx(0.75)
    assert summary["count"] == 2
    assert summary["low"] == 0.0
    assert summary["high"] == 1.0


def test_dropout_gates_zero_heads_and_neurons():
    config = configs.preset("nano").speech_encoder
    gates = objectives.dropout_gates(config, 5, jax.random.key(0), 0.25)["speech"]["layers"]
    assert set(gates) == {"0", "1", "2"}
    for layer in gates.values():
        for values in (layer["neurons"], layer["attention"]["heads"]):
            assert set(np.unique(values).tolist()) <= {0.0, np.float32(1 / 0.75).item()}
        assert layer["neurons"].shape == (5, 1, 384)
        assert layer["attention"]["heads"].shape == (5, 4, 1)
        assert np.mean(np.asarray(layer["neurons"]) == 0) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("kind", digit_training.ENCODERS)
def test_encoders_are_regularized_in_training_only(kind):
    config = configs.preset("nano")
    speech_config = dataclasses.replace(config.speech_encoder, num_layers=1)
    encoder = digit_training.Encoder(kind, dataclasses.replace(config, speech=speech_config))
    state = encoder.initial(0)
    samples = np.random.default_rng(0).normal(size=(2, encoder.num_samples)).astype(np.float32)
    options = digit_training.DigitTraining(dropout=0.5, spec_augment=True)

    features = jax.jit(lambda rng: encoder.features(state, samples, rng, options))
    plain = features(None)
    assert plain.shape[0] == 2
    assert plain.shape[2] == state["heads"]["digit"].shape[1]
    first, second = (features(jax.random.key(seed)) for seed in range(2))
    assert np.abs(np.asarray(first - second)).max() > 1e-3
    assert np.abs(np.asarray(first - plain)).max() > 1e-3
    clips = [speech.Utterance(s, d, "ann") for d, s in enumerate(samples)]
    right = digit_training.recognised(encoder, state, clips, batch=4)
    assert right.shape == (2,)
    assert right.dtype == bool


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"{d}_{s}_{i}.wav" for s in ("ann", "bob") for d in range(10) for i in range(2)]
    samples = rng.integers(-9000, 9000, 1000 * len(names)).astype(np.int16)
    offsets = 1000 * np.arange(len(names) + 1)
    np.savez(tmp_path / "d.npz", samples=samples, offsets=offsets, sr=8000, name=np.array(names))
    return tmp_path


@pytest.mark.slow
@pytest.mark.scripts
def test_a_run_resumes_and_logs_its_people(folder, tmp_path):
    out = tmp_path / "log.json"
    command = [
        sys.executable, "-m", "experiments.nano.leave_one_speaker_out", f"--speech_dir={folder}",
        f"--work_dir={tmp_path / 'work'}", f"--out={out}", "--seeds=0", "--steps=3", "--batch=4",
        "--voices=", "--encoder=cnn",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads(out.read_text())
    assert [(r["person"], r["heard"]) for r in log["results"]] == [
        ("ann", ["bob"]),
        ("bob", ["ann"]),
    ]
    assert log["commit"]
    assert "--speech_dir=DIR" in log["command"]
    assert str(tmp_path) not in out.read_text()
    curve = (tmp_path / "work/cnn_ann_0/speech.csv").read_text()
    assert "eval" not in curve
    changed = [*command, "--dropout=0.3"]
    done = subprocess.run(changed, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has other settings" in done.stderr
