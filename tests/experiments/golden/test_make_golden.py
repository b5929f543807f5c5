"""Reference cases made here: they pass, and come out the same again."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.golden import check_golden, make_golden
from experiments.golden.reference_plans import Draw

pytest.importorskip("torch")
pytest.importorskip("transformers")
ROOT = Path(__file__).parents[3]


def make(member: str, folder: Path, tiny: bool = True) -> dict[str, np.ndarray]:
    folder.mkdir()
    rng = np.random.default_rng(5)
    make_golden.make_case(make_golden.MEMBERS[member](Draw(rng, tiny)), folder, rng)
    return dict(np.load(folder / "outputs.npz"))


def test_a_case_passes_and_is_made_again_from_its_seed(tmp_path):
    first, second = make("bert", tmp_path / "first"), make("bert", tmp_path / "second")
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    report = check_golden.compare(tmp_path / "first")
    assert report.passed
    assert report.unclear == []


def test_greedy_tokens_are_clear(tmp_path):
    outputs = make("glm", tmp_path / "case")
    meta = json.loads((tmp_path / "case" / "meta.json").read_text())
    tokens, scores = outputs["batch.greedy_ids"], outputs["batch.greedy_logits"]
    assert tokens.shape == (2, 16)
    assert not np.isin(tokens, meta["eos"]).any()
    np.testing.assert_array_equal(scores.argmax(-1), tokens)
    best = np.sort(scores, axis=-1)
    margin = (best[..., -1] - best[..., -2]).min()
    assert margin == pytest.approx(meta["min_greedy_margin"])
    assert margin >= 0.02


def test_random_models_of_a_member_differ():
    rng = np.random.default_rng(0)
    configs = [str(make_golden.MEMBERS["glm4v"](Draw(rng, False)).config) for _ in range(5)]
    assert len(set(configs)) == 5


def test_an_unknown_member_is_one_line(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.golden.make_golden",
            "--members=gpt",
            f"--out_dir={tmp_path}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: --members: unknown member 'gpt'; known: glm, glm4" in done.stderr
    assert "Traceback" not in done.stderr
