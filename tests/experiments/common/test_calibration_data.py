"""Calibration batches of several texts: shares, domains, and which texts are refused."""

import json
from collections import Counter

import numpy as np
import pytest

import glm_edge as ge
from experiments.bench import gathered
from experiments.bench.peers import ours
from experiments.common import calibration_data, eval_data
from glm_edge.cli import corpora
from glm_edge.cli.loss import WINDOW


def ids(windows, start=0):
    return np.arange(start, start + windows * WINDOW + 5)


def test_token_batches_have_an_equal_share_per_domain():
    data = {"a": ids(100), "b": ids(200, 100_000), "c": ids(50, 200_000)}
    batches = calibration_data.token_batches(data, 9, 4)
    assert [batch["domain"] for batch in batches] == ["a", "b", "c"] * 3
    for batch in batches:
        assert batch["tokens"].shape == (4, WINDOW)
        start = data[batch["domain"]][0]
        offsets = batch["tokens"][:, 0] - start
        assert not np.any(offsets % WINDOW)
        assert batch["tokens"].min() >= start
        assert batch["tokens"].max() <= data[batch["domain"]][-1]


def test_token_batches_of_a_short_text_leave_their_share():
    data = {"long": ids(100), "short": ids(8), "tiny": ids(1)}
    counts = Counter(batch["domain"] for batch in calibration_data.token_batches(data, 12, 4))
    assert counts == {"long": 9, "short": 2, "tiny": 1}
    # All texts are too short for 12 batches.
    counts = Counter(batch["domain"] for batch in calibration_data.token_batches(data, 99, 4))
    assert counts == {"long": 25, "short": 2, "tiny": 1}


def test_token_batches_of_one_text_are_evenly_spaced():
    windows = ids(100)[: 100 * WINDOW].reshape(-1, WINDOW)
    batches = calibration_data.token_batches({"a": ids(100)}, 5, 4)
    expected = windows[np.linspace(0, 99, 20).astype(int)]
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches]), expected)


def test_split_text_adds_the_calibration_half_of_help(tmp_path):
    (tmp_path / "book.txt").write_text("one\ntwo\nthree\n")
    texts, held_out = eval_data.split_text(str(tmp_path / "book.txt"))
    assert list(texts) == ["book", "help"]
    assert texts["book"] + held_out == "one\ntwo\nthree\n"
    assert list(eval_data.split_text(str(tmp_path / "book.txt"), False)[0]) == ["book"]
    texts, held_out = eval_data.split_text(None)
    assert texts == {"help": corpora.pydoc_topics("calibration")}
    assert held_out == corpora.pydoc_topics("evaluation")


def test_screen_batches_are_a_domain():
    checkpoint = ge.shipped("nano")
    config, tokenizer = ge.build(checkpoint).config, ge.load_tokenizer(checkpoint)
    (batch,) = calibration_data.screen_batches(config, tokenizer, [], None, 0, 1, screens=1)
    assert batch["domain"] == "screens"
    assert batch["images"].shape[0] == 1


def test_quality_batches_with_a_domain_return_from_their_files(tmp_path):
    batch = {"tokens": np.ones((2, 3), np.int32), "domain": "wiki"}
    np.savez(tmp_path / "a.npz", **batch)
    np.savez(tmp_path / "b.npz", tokens=batch["tokens"])
    actual = ours.read_batch(tmp_path / "a.npz")
    assert type(actual["domain"]) is str
    assert actual["domain"] == "wiki"
    assert ours.read_batch(tmp_path / "b.npz").keys() == {"tokens"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*saved without a tokenizer")
def test_quality_recipe_reads_the_domains_of_its_files(tmp_path):
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    texts = {"help": corpora.pydoc_topics("calibration"), "other": "A different text. " * 400}
    (tmp_path / "calibration").mkdir()
    for index, batch in enumerate(calibration_data.text_batches(tokenizer, texts, 2, 2)):
        np.savez(tmp_path / "calibration" / f"{index}.npz", **batch)
    where = "decoder/layers/0/mlp/down_proj"
    recipe = json.dumps(
        {"name": "quantize.gptq", "options": {"format": "int2-g32", "where": where}}
    )
    arguments = (str(ge.shipped("nano")), str(tmp_path / "calibration"), recipe, where, True)
    meta = ours.quantize(*arguments, str(tmp_path / "out"))
    assert meta["weights"] == 512 * 256
    model, params = ge.load(ge.shipped("nano"), dtype="float32")
    batch = ours.read_batch(tmp_path / "calibration" / "0.npz")
    rows = gathered.sown_inputs(model, params, batch, [f"{where}/weight"])
    assert rows[f"{where}/weight"].shape == (2 * WINDOW, 512)
