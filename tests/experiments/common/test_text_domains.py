"""Domains of held-out text."""

import numpy as np
import pytest

import glm_edge as ge
from experiments.common import text_domains
from glm_edge.cli import corpora
from glm_edge.cli.loss import WINDOW
from glm_edge.errors import DataError


def test_read_texts_names_domains_by_file(tmp_path):
    for name in ("wiki.txt", "books.txt", "help.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "wiki.md").write_text("other")
    paths = [str(tmp_path / name) for name in ("wiki.txt", "books.txt")]
    texts = text_domains.read_texts(paths, "evaluation")
    assert list(texts) == ["wiki", "books", "help"]
    assert texts["help"] == corpora.pydoc_topics("evaluation")
    assert list(text_domains.read_texts(paths, "evaluation", False)) == ["wiki", "books"]
    for other in ("more/wiki.md", "help.txt"):
        with pytest.raises(DataError, match="two texts are named"):
            text_domains.read_texts([*paths, str(tmp_path / other)], "calibration")


def test_refuse_shared_compares_texts():
    text_domains.refuse_shared({"a": "one", "b": "two"}, {"a": "three"})
    with pytest.raises(DataError, match="c: is a text for calibration too"):
        text_domains.refuse_shared({"a": "one", "b": "two"}, {"c": "two"})


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
