import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_edge.cli import corpora
from glm_edge.errors import DataError, OutputError
from glm_edge.writers import beside


def test_read_text_keeps_every_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\nZürich 戦".encode())
    assert corpora.read_text(path).encode() == path.read_bytes()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"good \xff bad", "byte offset 5"),
        (b"cut short \xe6\x88", "byte offset 10"),
        (b"", "empty"),
        (b" \n\t", "empty"),
    ],
)
def test_read_text_names_file_and_fault_in_one_line(tmp_path, data, expected):
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        corpora.read_text(path)
    message = str(caught.value)
    assert str(path) in message
    assert expected in message
    assert "\n" not in message


def test_read_text_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", corpora.MAX_TEXT_BYTES + 1)
    for path, message in (
        (tmp_path / "absent.txt", "cannot be read: No such file"),
        (tmp_path, "is a directory; it must be a file"),
        (tmp_path / "pipe", "is a pipe, socket or device"),
        ("/dev/zero", "is a pipe, socket or device"),
        (tmp_path / "large.txt", "at most 1073741824 are read"),
        ("a\0/b", r"^'a\\x00/b': cannot be read"),
        ("a" * 5000, "cannot be read: File name too long"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            corpora.read_text(path)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 1000


def test_write_text_is_atomic_and_refuses_to_replace(tmp_path):
    """Write text refuses to replace and leaves no partial file."""
    path = tmp_path / "made" / "out.json"
    corpora.write_text(path, "first\n")
    with pytest.raises(OutputError, match="already exists"):
        corpora.write_text(path, "second\n")
    corpora.write_text(path, "third\n", overwrite=True)
    assert path.read_text() == "third\n"
    with pytest.raises(OutputError, match="cannot be written"):
        corpora.write_text(path / "below_a_file", "x")
    with pytest.raises(OutputError, match="already exists"):
        corpora.write_text(path.parent, "x", overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_write_text_does_not_replace_a_link(tmp_path, overwrite):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is a link to"):
        corpora.check_absent(tmp_path / "dangling", overwrite)
    with pytest.raises(OutputError, match="is a link to"):
        corpora.write_text(tmp_path / "dangling", "x", overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["dangling"]


def test_write_text_sweeps_what_killed_processes_left(tmp_path):
    boot = beside(tmp_path / "a.json", "tmp").name.split("-")[2]
    # No process has this number.
    (tmp_path / f".a.json.7fffffff-1-{boot}-0000.tmp").write_text("half")
    corpora.write_text(tmp_path / "a.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_write_text_to_names_that_no_file_can_have(tmp_path):
    for name, message in (("a\0b", "null character"), ("n" * 5000, "cannot be written: File name")):
        with pytest.raises(OutputError, match=message):
            corpora.write_text(tmp_path / name, "x")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_refused_before_the_work(tmp_path):
    path = tmp_path / "out.json"
    corpora.check_absent(None)
    corpora.check_absent(path)
    path.write_text("{}")
    with pytest.raises(OutputError, match=r"out\.json: already exists; .* pass --overwrite"):
        corpora.check_absent(str(path))
    corpora.check_absent(path, overwrite=True)


def test_pydoc_halves_share_no_paragraph():
    halves = [corpora.pydoc_topics(split) for split in ("calibration", "evaluation")]
    assert min(map(len, halves)) > 100_000
    paragraphs = [{" ".join(p.split()) for p in half.split("\n\n")} for half in halves]
    assert not (paragraphs[0] & paragraphs[1]) - {""}
    assert halves[0] == corpora.pydoc_topics("calibration")
    with pytest.raises(DataError, match="unknown split"):
        corpora.pydoc_topics("test")


@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_windows_score_each_token_once_but_the_first_of_each(count, length, seed):
    rng = np.random.default_rng(seed)
    token_bytes = rng.integers(0, 9, 50)
    tokens = rng.integers(0, 50, count)
    windows = corpora.windows(tokens, token_bytes, length)
    expected = [i for i in range(count) if i % length]
    np.testing.assert_array_equal(windows.tokens[:, 1:][windows.scored], tokens[expected])
    assert windows.num_bytes == token_bytes[tokens[expected]].sum()
    assert windows.num_scored == len(expected)
    assert windows.scored.any(axis=1).all()
    for start, row in zip(range(0, count, length), windows.tokens, strict=False):
        context = tokens[start : start + length]
        np.testing.assert_array_equal(row[: len(context)], context)


def test_windows_need_two_tokens():
    with pytest.raises(DataError, match="at least 2"):
        corpora.windows(np.array([3]), np.ones(9), 4)
    with pytest.raises(DataError, match="at least 2"):
        corpora.windows(np.array([3, 4]), np.ones(9), 1)


def test_bits_per_byte_of_a_uniform_code():
    assert corpora.bits_per_byte(10 * np.log(256), 10) == pytest.approx(8.0)
