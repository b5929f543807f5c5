"""The check of names that `.ci/run` makes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_names", ROOT / ".ci" / "check_names.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "source",
    [
        "found = 1",
        "for seen in (): pass",
        "def f(given): pass",
        "lambda kept: 0",
        "self.whole = 1",
        "import x as rest",
        "class Met: pass",
        "_left, b = 1, 2",
    ],
)
def test_vague_names_are_listed(check, source):
    assert len(check.vague_names(source)) == 1


@pytest.mark.parametrize("source", ["x = found", "f(given=1)", "left_axis = 1", "'what'", "x.own"])
def test_vague_names_ignores_uses(check, source):
    assert check.vague_names(source) == []


def test_main_refuses_folders_and_files(check, tmp_path, capsys):
    (tmp_path / "a.py").write_text("\nhere = 1\n")
    assert check.main([str(tmp_path)]) == 1
    assert "a.py:2: 'here'" in capsys.readouterr().out
    assert check.main([str(tmp_path / "a.py")]) == 1
    assert check.main([str(ROOT / "experiments"), str(ROOT / "glm_edge")]) == 0
