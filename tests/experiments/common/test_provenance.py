"""The record of a run."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from absl import flags

from experiments.common import outputs, provenance
from glm_edge.errors import OutputError

ROOT = Path(__file__).parents[3]
SOURCES = [path for path in (ROOT / "experiments").rglob("*.py") if path.name != "provenance.py"]


@pytest.fixture
def values(monkeypatch):
    defined = flags.FlagValues()
    flags.DEFINE_list("contexts", ["128", "512"], "", flag_values=defined)
    flags.DEFINE_string("text", None, "", flag_values=defined)
    flags.DEFINE_string("only", "int4|fp32", "", flag_values=defined)
    flags.DEFINE_string("mnn_python", "/home/me/python", "", flag_values=defined)
    flags.DEFINE_integer("seed", 7, "", flag_values=defined)
    defined(["script"])
    monkeypatch.setattr(provenance, "FLAGS", defined)


def test_provenance_of_spells_a_command_without_paths(values):
    peers = provenance.peers_of(("mnn",))
    log = provenance.provenance_of("bench.x", ("contexts", "text", "only"), ["--out=O", *peers])
    assert log["command"] == (
        "python -m experiments.bench.x --contexts=128,512 '--only=int4|fp32' --out=O "
        "--mnn_python=PYTHON"
    )
    assert re.fullmatch(r"[0-9a-f]{40}", log["commit"])
    assert log["versions"].keys() >= {"python", "jax", "numpy"}
    assert log["memory_bytes"] > 0
    assert (log["seed"], provenance.provenance_of("bench.x", seed=0)["seed"]) == (7, 0)
    assert "cores" in log["machine"]
    json.dumps(log)


def test_provenance_of_adds_versions_of_another_environment(values):
    log = provenance.provenance_of("bench.x", versions={"torch": "9.9"})
    assert log["versions"]["torch"] == "9.9"


def test_without_paths_keeps_other_arguments():
    arguments = ["--out_dir=/home/me/out", "--smoke", "--text", "/home/me/a.txt", "--seed=3"]
    shown = ["--out_dir=OUT_DIR", "--smoke", "--text", "PATH", "--seed=3"]
    assert provenance.without_paths(arguments) == shown


def test_versions_of_leaves_out_absent_packages():
    assert provenance.versions_of(("no-such-package",)) == {}


def test_commit_without_git(monkeypatch):
    def absent(*args, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert provenance.commit() is None


@pytest.mark.parametrize("pattern", [r"rev-parse", r"getloadavg\(\)\[0\],$", r"SC_PHYS_PAGES"])
def test_no_script_describes_its_machine_by_itself(pattern):
    assert [p.name for p in SOURCES if re.search(pattern, p.read_text(), re.MULTILINE)] == []


@pytest.mark.parametrize(("result", "named"), [("report.json", "results"), ("table.csv", "table")])
def test_prepare_directory_refuses_results(tmp_path, result, named):
    (tmp_path / result).touch()
    with pytest.raises(OutputError, match=f"already contains (a )?{named}"):
        outputs.prepare_directory(tmp_path, overwrite=False, result=result)
    assert outputs.prepare_directory(tmp_path, overwrite=True, result=result) == tmp_path


def test_prepare_directory_refuses_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        outputs.prepare_directory(tmp_path / "file", overwrite=True)
