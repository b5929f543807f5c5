"""Reference cases: what transformers computes, and what `check_golden` says of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.golden import check_golden
from glm_edge.errors import DataError

ROOT = Path(__file__).parents[2]
COMMITTED = Path(__file__).parent / "golden"
SHARED = Path(os.environ.get("GLM_EDGE_GOLDEN") or ROOT.parent / "shared" / "golden")


# The outputs of these members, towers included, are compared in test_round_trip.py, too.
SECOND = ("glm4", "glm4v", "glm_ocr", "glmasr", "siglip", "whisper")


def cases(folder: Path) -> list:
    result = sorted(path.parent for path in folder.glob("*/outputs.npz"))
    slow = [[pytest.mark.slow] if path.name in SECOND else [] for path in result]
    return [
        pytest.param(path, id=path.name, marks=marks)
        for path, marks in zip(result, slow, strict=True)
    ]


@pytest.fixture
def copied(tmp_path):
    """Returns a function that copies a committed case to where it may be changed."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(COMMITTED / name, tmp_path / "cases" / name))

    return copy


def change_outputs(case: Path, **changes: np.ndarray) -> dict[str, np.ndarray]:
    outputs = dict(np.load(case / "outputs.npz")) | changes
    np.savez(case / "outputs.npz", **outputs)
    return outputs


@pytest.fixture
def run_main(capsys):
    """Returns a function that runs the script in this process: exit status and what it prints."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()

    def run(folder: Path) -> tuple[int, str]:
        status = 0
        with flagsaver.flagsaver((check_golden.DIR, str(folder))):
            try:
                check_golden.main([])
            except SystemExit as stop:
                status = stop.code
        return status, capsys.readouterr().out

    return run


def run_script(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.golden.check_golden", f"--dir={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_member_has_a_committed_case():
    members = (
        "bert distilbert glm glm4 glm4v glm_edge_v glm_ocr glmasr glmasr_grouped siglip whisper"
    )
    assert [case.id for case in cases(COMMITTED)] == members.split()


@pytest.mark.parametrize("folder", cases(COMMITTED))
def test_committed_case_is_within_tolerance(folder):
    report = check_golden.compare(folder)
    assert report.unclear == []
    assert [row for row in report.rows if not row.passed] == []
    subcase = next(iter(json.loads((folder / "meta.json").read_text())["subcases"]))
    assert f"{subcase}.hidden.final" in {row.name for row in report.rows}


@pytest.mark.slow
@pytest.mark.parametrize("folder", cases(SHARED))
def test_shared_case_is_within_tolerance(folder):
    report = check_golden.compare(folder)
    assert report.rows
    assert [row for row in report.rows if not row.passed] == []


def test_a_model_that_computes_something_else_is_reported(copied, run_main):
    case = copied("bert")
    fields = json.loads((case / "config.json").read_text())
    (case / "config.json").write_text(json.dumps(fields | {"layer_norm_eps": 0.01}))
    status, printed = run_main(case)
    assert status == 1
    lines = [line.split() for line in printed.splitlines()]
    assert {line[0]: line[-1] for line in lines}["batch.hidden.layer0"] == "OFF"
    assert "0 of 1 cases pass" in printed


def test_another_greedy_token_fails_with_and_without_the_cache(copied):
    case = copied("glm")
    tokens = np.load(case / "outputs.npz")["batch.greedy_ids"]
    tokens[0, -1] += 1
    change_outputs(case, **{"batch.greedy_ids": tokens})
    off = {row.name: row.error for row in check_golden.compare(case).rows if not row.passed}
    assert off == {"batch.greedy_ids": 1, "batch.plain_greedy_ids": 1}


def test_an_output_that_is_not_a_number_fails(copied):
    case = copied("bert")
    logits = np.load(case / "outputs.npz")["batch.logits"]
    logits[0, 0] = np.nan
    change_outputs(case, **{"batch.logits": logits})
    report = check_golden.compare(case)
    assert [row.name for row in report.rows if not row.passed] == ["batch.logits"]
    assert not report.passed


def test_an_output_of_another_shape_is_refused(copied):
    case = copied("bert")
    logits = np.load(case / "outputs.npz")["batch.logits"]
    change_outputs(case, **{"batch.logits": logits[:, :1]})
    with pytest.raises(DataError, match=r"batch\.logits has shape \(2, 1\)"):
        check_golden.compare(case)


def test_an_unknown_output_is_listed_as_not_compared(copied, run_main):
    case = copied("bert")
    change_outputs(case, **{"batch.entropy": np.zeros(2, np.float32)})
    status, printed = run_main(case)
    assert status == 0
    assert "not compared, as glm_edge has no output with this name: batch.entropy" in printed


def test_a_case_of_which_nothing_is_compared_does_not_pass(copied):
    case = copied("bert")
    np.savez(case / "outputs.npz", **{"batch.entropy": np.zeros(2, np.float32)})
    report = check_golden.compare(case)
    assert report.unclear == ["batch.entropy"]
    assert not report.passed


def test_check_golden_continues_after_a_failed_case(copied, run_main):
    """A checkpoint that cannot be loaded fails and the others are run."""
    case = copied("bert")
    copied("distilbert")
    (case / "model.safetensors").unlink()
    status, printed = run_main(case.parent)
    assert status == 1
    assert "cannot run" in printed
    assert "1 of 2 cases pass" in printed


def test_a_folder_that_is_no_case_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a reference case"):
        check_golden.compare(tmp_path)


# Exit statuses of scripts are tested in tests/experiments/test_help.py, too.
@pytest.mark.slow
def test_the_script_refuses_in_one_line(tmp_path):
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("check_golden: ") == 1
    assert "Traceback" not in done.stderr


def test_outputs_without_inputs_are_refused(copied):
    case = copied("bert")
    change_outputs(case, **{"other.logits": np.zeros(2, np.float32)})
    with pytest.raises(DataError, match="every subcase with outputs"):
        check_golden.compare(case)
