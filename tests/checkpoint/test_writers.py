"""Writers that leave a whole file or directory, nothing else, whenever they are killed."""

import subprocess
import sys
import textwrap

import pytest

import glm_edge
from glm_edge import writers
from glm_edge.errors import CheckpointError, OutputError
from glm_edge.writers import new_directory


def enter(target, overwrite=False):
    with new_directory(target, overwrite):
        pass


def write_half(target, overwrite=False):
    with new_directory(target, overwrite) as temporary:
        (temporary / "config.json").write_text("new")
        raise KeyError


def killed_writer(target, program, code=9):
    text = f"""
        import os
        from pathlib import Path
        from glm_edge import writers
        target = Path({str(target)!r})
        {program}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], check=False)
    assert done.returncode == code


def checkpoint_at(target, content="old"):
    target.mkdir()
    (target / "config.json").write_text(content)
    return target


def test_new_directory_removes_what_killed_processes_left(tmp_path):
    target = checkpoint_at(tmp_path / "out")
    kill = "with writers.new_directory(target, True) as d: (d / 'x').write_text('1'); os._exit(9)"
    other = checkpoint_at(tmp_path / "out.more")
    for _ in range(2):
        killed_writer(target, kill)
    killed_writer(other, kill)
    assert len(list(tmp_path.glob(".out.*"))) == 2
    with new_directory(target, overwrite=True) as first:
        (first / "config.json").write_text("a")
        # What a process that lives is writing stays.
        with new_directory(target, overwrite=True) as second:
            (second / "config.json").write_text("b")
        assert first.is_dir()
    assert (target / "config.json").read_text() == "a"
    assert [path.name for path in tmp_path.glob(".out.*") if "more" not in path.name] == []
    assert len(list(tmp_path.glob(".out.more.*"))) == 1


def test_overwriting_leaves_a_checkpoint_at_every_moment(tmp_path, monkeypatch):
    target = checkpoint_at(tmp_path / "out")
    replaced = []
    monkeypatch.setattr(writers.os, "replace", lambda *names: replaced.append(names))
    with new_directory(target, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert replaced == []


def test_a_checkpoint_that_was_moved_aside_is_named_and_restored(tmp_path):
    target = checkpoint_at(tmp_path / "out")
    killed_writer(target, "os.replace(target, writers.beside(target, 'old')); os._exit(9)")
    assert writers.moved_aside(target).name.endswith(".old")
    with pytest.raises(CheckpointError, match=r"does not exist; .* left the old one as \.out\."):
        glm_edge.load(target)
    with pytest.raises(KeyError):
        write_half(target, overwrite=True)
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_new_directory_without_exchange_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_exchange", lambda *_: False)
    target = checkpoint_at(tmp_path / "out")
    with new_directory(target, overwrite=True) as temporary:
        (temporary / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writers_do_not_replace_a_link(tmp_path):
    target = checkpoint_at(tmp_path / "real")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").symlink_to(target / "config.json")
    with pytest.raises(OutputError, match=r"is a link to .*real"):
        enter(tmp_path / "link", overwrite=True)
    with pytest.raises(OutputError, match="is a link to"):
        writers.write_whole(tmp_path / "file", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (target / "config.json").read_text() == "old"


def test_names_that_no_file_can_have(tmp_path):
    with pytest.raises(OutputError, match="null character"):
        enter(f"{tmp_path}/a\0b")
    with pytest.raises(OutputError, match="not a valid file name"):
        enter(f"{tmp_path}/\ud800")
    with pytest.raises(OutputError, match=r"'\.\.' after a directory that does not exist"):
        enter(tmp_path / "missing" / ".." / "ok")
    assert not list(tmp_path.iterdir())


def test_a_name_of_greatest_length_is_written_and_swept(tmp_path):
    target = tmp_path / ("n" * 250)
    killed_writer(target, "with writers.new_directory(target, False): os._exit(9)")
    assert len(list(tmp_path.iterdir())) == 1
    with new_directory(target, overwrite=False) as temporary:
        (temporary / "a").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_an_output_error_is_not_wrapped_twice(tmp_path):
    with (
        pytest.raises(OutputError, match=r"^inner$"),
        new_directory(tmp_path / "out", overwrite=False),
    ):
        raise OutputError("inner")


def test_a_kept_directory_has_one_writer(tmp_path):
    target = tmp_path / "out"
    with new_directory(target, overwrite=False, keep=True) as temporary:
        program = """
        from glm_edge.errors import OutputError
        try:
            with writers.new_directory(target, False, keep=True): pass
        except OutputError as error:
            os._exit(7 if "another run is writing it" in str(error) else 8)
        """
        killed_writer(target, program, code=7)
        (temporary / "a").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_whole_leaves_nothing_after_an_error(tmp_path):
    (tmp_path / "a").write_text("old")

    def write(path):
        path.write_text("half")
        raise KeyError

    with pytest.raises(KeyError):
        writers.write_whole(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
