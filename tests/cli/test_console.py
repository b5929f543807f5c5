"""The manners of every command: help, progress, and silence of the libraries below."""

import functools
import io
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from glm_edge.cli import console
from glm_edge.process_wide import QUIET_TENSORFLOW

ROOT = Path(__file__).parents[2]
TEXT = """Compress a checkpoint.

    glm-edge compress --out_dir=DIR

The details of it.
"""
NOISY = """
import logging, os, sys
import absl.logging
from absl import flags
{start}

def main(argv):
    import jax
    logging.getLogger("jax._src.xla_bridge").info("Unable to initialize backend 'tpu'")
    absl.logging.info("Sharding callback duration: 1")
    absl.logging.info("Writing fingerprint to x")
    logging.getLogger("orbax").info("saved")
    logging.getLogger("tensorflow").info("assets")
    print(os.environ.get("TF_CPP_MIN_LOG_LEVEL"), os.environ.get("TF_ENABLE_ONEDNN_OPTS"))

{end}
"""
LAUNCH = ("from glm_edge.cli.console import launch", "launch(main)")
PLAIN = ("from absl import app", "app.run(main)")


def run_program(program, *arguments):
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_launch_silences_libraries():
    done = run_program(NOISY.format(start=LAUNCH[0], end=LAUNCH[1]))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == list(QUIET_TENSORFLOW.values())


def test_libraries_are_noisy_without_launch():
    done = run_program(NOISY.format(start=PLAIN[0], end=PLAIN[1]))
    for message in ("Unable to initialize backend", "Sharding callback", "Writing fingerprint"):
        assert message in done.stderr


def test_launch_respects_a_verbosity_asked_for():
    done = run_program(NOISY.format(start=LAUNCH[0], end=LAUNCH[1]), "--verbosity=0")
    assert "Writing fingerprint" in done.stderr


def test_help_page_puts_flags_before_details():
    page = console.help_page(TEXT, "\n/some/path/script.py:\n  --out_dir: Directory.\n")
    lines = page.splitlines()
    assert lines[0] == "Compress a checkpoint."
    order = ["    glm-edge compress --out_dir=DIR", "Flags:", "  --out_dir: Directory."]
    order += ["The details of it."]
    assert [line for line in lines if line in order] == order
    assert "Exit status: 0" in page
    assert "/some/path" not in page


def test_help_page_keeps_exit_statuses_of_its_own():
    page = console.help_page(f"{TEXT}\nExit status: 0, 1, or 2 without a case.\n", "x.py:\n")
    assert page.count("Exit status") == 1


def test_help_page_without_an_example():
    page = console.help_page("Do it.\n\nDetails.", "x.py:\n  --a: A.")
    assert page.startswith("Do it.\n\nFlags:\n  --a: A.\n\nDetails.\n")


@pytest.mark.parametrize("flag", sorted(console.HELP_FLAGS))
def test_launch_prints_help_and_does_no_work(flag, capsys, monkeypatch):
    known = flags.FlagValues()
    monkeypatch.setattr(console, "FLAGS", known)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    with pytest.raises(SystemExit) as ended:
        console.launch(pytest.fail, TEXT, ["script", flag])
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("Compress a checkpoint.\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_by(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    show = console.progress()
    for done in (1, 2):
        show("calibrate: 4 batches", done, 2)
    show("layer: 1", 1, 3)
    show("layer: 2", 2, 3)
    return stream.getvalue()


def test_progress_is_silent_without_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    assert shown_by(io.StringIO(), monkeypatch) == ""


def test_progress_shows_stages_on_a_terminal(monkeypatch):
    tqdm = pytest.importorskip("tqdm").tqdm
    # Without a smallest interval every step is drawn.
    eager = functools.partial(tqdm, mininterval=0, leave=False, disable=None)
    monkeypatch.setattr(console, "_tqdm", lambda: eager)
    printed = shown_by(Terminal(), monkeypatch)
    assert "calibrate: 4 batches" in printed
    assert "2/3" in printed


def test_progress_without_tqdm_shows_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    console.progress()("stage", 1, 2)
    assert list(console.bar("label")([1, 2])) == [1, 2]
    assert capsys.readouterr().err == ""
