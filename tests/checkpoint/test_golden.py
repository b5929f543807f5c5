"""The GLM-Edge reference case: hidden states, logits and greedy tokens of transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import check_golden
from glm_edge.errors import DataError

ROOT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("GLM_EDGE_GOLDEN") or ROOT.parent / "shared" / "golden")
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "glm_edge" / "config.json").is_file(),
    reason=f"no reference case at {GOLDEN}; set GLM_EDGE_GOLDEN to the folder of cases",
)


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.check_golden", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_golden
def test_glm_edge_case_is_within_tolerance():
    rows = check_golden.compare(GOLDEN / "glm_edge")
    names = {row.name for row in rows}
    for subcase in ("single", "batch"):
        assert {f"{subcase}.{name}" for name in ("logits", "greedy_ids", "hidden.final")} <= names
    assert [row for row in rows if not row.passed] == []


@needs_golden
def test_an_output_that_is_off_is_reported(tmp_path):
    case = tmp_path / "case"
    case.mkdir()
    for path in (GOLDEN / "glm_edge").iterdir():
        (case / path.name).write_bytes(path.read_bytes())
    config = (case / "config.json").read_text()
    (case / "config.json").write_text(config.replace('"rope_theta": 10000.0', '"rope_theta": 9e3'))
    done = run_script(f"--golden_dir={tmp_path}", "--case=case")
    assert done.returncode == 1
    assert "OFF" in done.stdout


def test_a_folder_that_is_no_case_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a reference case"):
        check_golden.compare(tmp_path)
    done = run_script(f"--golden_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("check_golden: ") == 1
    assert "Traceback" not in done.stderr
