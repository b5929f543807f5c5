"""Domains of held-out text."""

import numpy as np
import pytest

import glm_edge as ge
from experiments.common import text_domains
from glm_edge.cli.loss import WINDOW
from glm_edge.errors import DataError


def test_held_out_names_domains_by_files(tmp_path):
    (tmp_path / "books.txt").write_text("one")
    (tmp_path / "help.txt").write_text("two")
    books, other = str(tmp_path / "books.txt"), str(tmp_path / "help.txt")
    assert text_domains.held_out([books], with_help=False) == {"books": "one"}
    assert list(text_domains.held_out([books], with_help=True)) == ["books", "help"]
    for paths in ([books, books], [other]):
        with pytest.raises(DataError, match=r"a second domain .*; rename the file"):
            text_domains.held_out(paths, with_help=True)


def test_complete_windows_have_no_padding():
    """Windows contain the beginning of the text only, and score every token but their first."""
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    text = "The river runs to the sea. " * 200
    ids = tokenizer.encode(text).ids
    windows = text_domains.complete_windows({"a": text}, tokenizer, 2 * WINDOW + 5)["a"]
    np.testing.assert_array_equal(windows.tokens.reshape(-1), ids[: 2 * WINDOW])
    assert windows.scored.all()
    with pytest.raises(DataError, match="a: 255 tokens, fewer than a window of 256"):
        text_domains.complete_windows({"a": text}, tokenizer, WINDOW - 1)


def test_checksums_differ_by_text():
    sums = text_domains.checksums({"a": "x", "b": "y", "c": "x"})
    assert sums["a"] == sums["c"] != sums["b"]
