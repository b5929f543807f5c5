"""Reading files that may be damaged or hostile, piece by piece."""

import os

import numpy as np
import pytest

from glm_edge.errors import CheckpointError
from glm_edge.files import file_inside, fill, read_json


def test_short_reads_are_continued(tmp_path):
    class Slow:
        content = bytes(range(10))

        def readinto(self, view):
            part, self.content = self.content[:3], self.content[3:]
            view[: len(part)] = part
            return len(part)

    target = np.zeros(10, np.uint8)
    fill(Slow(), target, "a")
    assert target.tolist() == list(range(10))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("{}")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match="a: cannot be read: Permission denied"):
        read_json(tmp_path / "a")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0", "a\n", "\ud800", 3, None])
def test_only_plain_names_are_files_of_a_directory(tmp_path, name):
    with pytest.raises(CheckpointError, match="plain name"):
        file_inside(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "not JSON"), (b"\xff{}", "not JSON"), (b"[]", "JSON object"), (b"", "not JSON")],
)
def test_json_that_is_not_an_object_is_refused(tmp_path, content, expected):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=expected):
        read_json(tmp_path / "config.json")


def test_numbers_are_read_and_those_of_many_digits_are_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": -9223372036854775807, "b": 1e-5}')
    assert read_json(path) == {"a": -(2**63) + 1, "b": 1e-5}
    path.write_text(f'{{"a": {"1" * 21}}}')
    with pytest.raises(CheckpointError, match="not JSON: an integer of 21 digits"):
        read_json(path)
