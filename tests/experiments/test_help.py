"""The --help of every script: the flags that its own example uses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glm_edge.cli import console

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "experiments").rglob("*.py")
    if re.search(r"^    (app\.run|launch)\(", path.read_text(), re.MULTILINE)
)
SOURCES = [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "glm_edge/cli").glob("*.py")]
# One process for all: importing jax takes longer than all the scripts. Each runs as the main module
# would until absl takes over, and leaves no flag behind.
PROGRAM = """
import json, runpy, sys
from absl import app, flags
shown = {}
own = set(flags.FLAGS)
def note(main, argv=None):
    shown[name] = flags.FLAGS.main_module_help()
app.run = note
for name in json.loads(sys.argv[1]):
    sys.argv = [name]
    sys.modules["__main__"].__doc__ = None
    space = runpy.run_module(name, run_name="__main__")
    text = sys.modules["__main__"].__doc__ or space["__doc__"]
    shown[name] = [text, shown[name]]
    for flag in set(flags.FLAGS) - own:
        delattr(flags.FLAGS, flag)
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def shown():
    command = [sys.executable, "-c", PROGRAM, json.dumps(SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def example_flags(text):
    """Flags in the indented lines of a docstring, which are commands."""
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return set(re.findall(r"--(?:no)?(\w+)", "\n".join(lines)))


def test_every_kind_of_script_is_listed():
    for name in ("compress", "evaluate", "export", "plan_phone", "quickstart", "tables.bits"):
        assert f"experiments.{name}" in SCRIPTS
    assert len(SCRIPTS) > 30


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_flags_of_the_example(script, shown):
    text, described = shown[script]
    named = example_flags(text)
    listed = set(re.findall(r"^  --(?:\[no\])?(\w+):", described, re.MULTILINE))
    assert listed, "the help lists no flag"
    assert named <= listed


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_page_of_a_script(script, shown):
    page = console.help_page(*shown[script])
    summary, _, following = page.partition("\n\n")
    assert summary.endswith((".", ":"))
    # The first screen holds the summary, the example and the flags, not the details.
    assert len(following.partition("Flags:")[0].splitlines()) < 12
    assert f"python -m {script.removesuffix('.__main__')}" in page.partition("Flags:")[0]
    assert "Exit status: 0" in page


def test_scripts_start_and_report_by_the_same_functions():
    for path in SOURCES:
        text = path.read_text()
        assert "ProgressLine" not in text, path
        if path.name != "console.py":
            assert "app.run(" not in text, path
            assert "tqdm" not in text, path
