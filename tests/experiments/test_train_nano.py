"""The training of nano runs, resumes, and neither uses nor shows people who are held out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import glm_edge as ge

pytestmark = [pytest.mark.slow, pytest.mark.scripts]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    names = [f"{digit}_{who}_0.wav" for who in ("ann", "bob") for digit in range(10)]
    samples = rng.integers(-9000, 9000, 1000 * len(names)).astype(np.int16)
    offsets = 1000 * np.arange(len(names) + 1)
    np.savez(folder / "d.npz", samples=samples, offsets=offsets, sr=8000, name=np.array(names))
    words = rng.choice(["the", "river", "is", "green", "and", "a", "bird", "sings"], 4000)
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def train(data, out, *further):
    command = [
        sys.executable, "-m", "experiments.train_nano", f"--out_dir={out}",
        f"--text={data}/text.txt", f"--speech_dir={data}", "--holdout_speakers=bob", "--nopydoc",
        "--voices=", "--vision_steps=2", "--text_steps=2", "--speech_steps=2", *further,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_stages_run_and_resume(data, tmp_path):
    done = train(data, tmp_path, "--joint_steps=4")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["heard"] == ["ann"]
    assert "--holdout_speakers=bob" in record["command"]
    assert str(tmp_path) not in json.dumps(record)
    curves = "".join(file.read_text() for file in tmp_path.glob("*.csv"))
    assert "bob" not in curves + done.stderr
    model = ge.build(tmp_path / "checkpoint")
    assert model.config.decoder.max_position_embeddings == 2048
    assert (tmp_path / "checkpoint/chat_template.jinja").exists()
    weights = (tmp_path / "checkpoint/model.safetensors").read_bytes()
    again = train(data, tmp_path, "--joint_steps=4")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "joint resumes at step 4" in again.stderr
    assert (tmp_path / "checkpoint/model.safetensors").read_bytes() == weights
    other = train(data, tmp_path, "--joint_steps=5")
    assert other.returncode != 0
    assert "this run has steps 4, not 5" in other.stderr
