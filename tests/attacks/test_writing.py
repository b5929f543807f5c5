"""Saves killed at random moments: what is there is whole, and what is left is bounded."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from glm_edge.writers import new_directory

SIZES = 6


def program(target, mark, pause):
    return textwrap.dedent(f"""
        import os, sys, time
        from pathlib import Path
        from glm_edge.writers import new_directory
        print("ready", flush=True)
        number = 0
        while True:
            with new_directory(Path({str(target)!r}), overwrite=True) as directory:
                for name in range({SIZES}):
                    (directory / f"part{{name}}").write_text({mark!r} + str(number))
                    time.sleep({pause})
                (directory / "config.json").write_text({mark!r} + str(number))
            number += 1
    """)


def complete(target):
    """The one content of all files of a checkpoint."""
    results = {path.read_text() for path in target.iterdir()}
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        *(f"part{name}" for name in range(SIZES)),
    ]
    assert len(results) == 1
    return results.pop()


def first(target):
    with new_directory(target, overwrite=False) as directory:
        for name in ("config.json", *(f"part{name}" for name in range(SIZES))):
            (directory / name).write_text("first")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_saves_leave_a_whole_checkpoint_and_little_litter(tmp_path, seed):
    rng = random.Random(7000 + seed)
    target = tmp_path / "ck point"
    first(target)
    for turn in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", program(target, f"{turn}-", rng.choice([0.0, 0.002]))],
            stdout=subprocess.PIPE,
        )
        writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.4))
        # At any moment there is a checkpoint, from one save.
        assert target.is_dir()
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        complete(target)
        assert len(list(tmp_path.iterdir())) <= 2
    first_again = [path for path in tmp_path.iterdir() if path != target]
    with new_directory(target, overwrite=True) as directory:
        for name in ("config.json", *(f"part{name}" for name in range(SIZES))):
            (directory / name).write_text("last")
    assert complete(target) == "last"
    assert not any(path.exists() for path in first_again)


@pytest.mark.slow
def test_two_savers_at_once_leave_one_whole_checkpoint(tmp_path):
    target = tmp_path / "out"
    first(target)
    writers = [
        subprocess.Popen([sys.executable, "-c", program(target, mark, 0.0)], stdout=subprocess.PIPE)
        for mark in ("a", "b", "c")
    ]
    for writer in writers:
        writer.stdout.readline()
    time.sleep(2.0)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert complete(target)[0] in "abcf"
    with new_directory(target, overwrite=True) as directory:
        (directory / "config.json").write_text("last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_odd_names_are_written_or_refused(tmp_path, seed):
    from glm_edge.errors import OutputError

    rng = random.Random(90 + seed)
    letters = [
        "a",
        " ",
        "\n",
        "'",
        '"',
        "\\",
        "é",
        "漢",
        "😀",
        "\x1b[31m",
        "-",
        ".",
        "~",
        "*",
        "\t",
    ]
    for _ in range(40):
        name = "".join(rng.choice(letters) for _ in range(rng.randint(1, 40))).strip(".") or "x"
        with new_directory(tmp_path / name, overwrite=False) as directory:
            (directory / "a").write_text("1")
        assert (tmp_path / name / "a").read_text() == "1"
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    for name in ("a\0b", "\ud800", "x" * 300, "gone/../ok"):
        with pytest.raises(OutputError), new_directory(tmp_path / name, overwrite=False):
            pass
