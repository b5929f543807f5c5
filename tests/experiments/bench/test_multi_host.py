"""The multi-host script as its documentation runs it: two processes on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest

import glm_edge as ge


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.bench.multi_host", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(ge.__file__).parents[1],
        check=False,
    )


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one():
    done = run("--launch=2", "--devices_per_process=2", "--max_new_tokens=3", "--compare")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0 of 2" in done.stdout
    assert "process 1 of 2" in done.stdout
    assert "tokens equal: True" in done.stdout


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_ends_every_process():
    done = run("--launch=2", "--devices_per_process=2", "--model_ways=3")
    assert done.returncode == 1
    assert "error: --model_ways=3 must divide 4 devices" in done.stderr


def test_a_process_that_no_cluster_knows_says_what_to_do():
    done = run()
    assert done.returncode == 1
    assert "--launch=2" in done.stderr.splitlines()[-1]
