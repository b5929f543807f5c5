"""The progress line: times that are known, and no control characters in files."""

import io

import pytest

from glm_edge.compress import progress as progress_lib
from glm_edge.compress.progress import ProgressLine, progress_of
from glm_edge.errors import DataError


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    return now


def test_first_step_shows_no_time_left(clock):
    stream = Terminal()
    line = ProgressLine(stream, width=4)
    for done, at in ((1, 150.0), (2, 152.0), (4, 156.0)):
        clock[0] = at
        line("gptq: a/weight", done, 4)
    first, second, last = stream.getvalue().removeprefix("\r").split("\r")
    assert first == "[#...] 1/4 gptq: a/weight 50 s\033[K"
    assert second == "[##..] 2/4 gptq: a/weight 52 s, 4 s left\033[K"
    assert last == "[####] 4/4 gptq: a/weight 56 s\033[K\n"


def test_stages_are_timed_apart(clock):
    stream = Terminal()
    line = ProgressLine(stream, width=4)
    line("score: a", 3, 3)
    clock[0] += 50
    line("rtn: a", 0, 2)
    clock[0] += 1
    line("rtn: b", 1, 2)
    assert "1/2 rtn: b 51 s, 1 s left" in stream.getvalue()


def test_files_get_the_end_of_a_stage_and_few_lines_before(clock):
    stream = io.StringIO()
    line = ProgressLine(stream, width=4)
    for done in range(1, 101):
        clock[0] += 1
        line("gptq: a", done, 100)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert [text.split()[1] for text in lines] == ["30/100", "60/100", "90/100", "100/100"]
    assert not set("\r\033") & set(stream.getvalue())


def test_progress_of_arguments():
    assert progress_of(None) is progress_of(False) is None
    assert isinstance(progress_of(True), ProgressLine)
    assert progress_of(print) is print
    with pytest.raises(DataError, match="not 3"):
        progress_of(3)
