"""Intents: what is read, what is learned, and the rows of the table."""

import json

import jax
import numpy as np
import pytest

from experiments.tables import intent, learning, measure
from glm_edge.errors import DataError
from glm_edge.models.text import TextEncoder

TEXTS = {
    "balance": "how much money is on my {} account",
    "weather": "what is the weather like in {} today",
    "play": "please play some music by {}",
    "oos": "tell me why {} is so famous",
}
WORDS = ("savings", "london", "mozart", "paris", "checking", "vienna", "bach", "travel")
KINDS = ("full", "half")
SMALL = (
    "--layers=2", "--hidden_size=32", "--vocabulary=120", "--tokens=12", "--seeds=2",
    "--teacher_steps=6", "--student_steps=4",
)  # fmt: skip


def rows_of(words):
    return [[text.format(word), name] for word in words for name, text in TEXTS.items()]


@pytest.fixture
def folder(tmp_path):
    """Lines of tabs, one line a text."""
    path = tmp_path / "intents"
    path.mkdir()
    for part, words in (("train", WORDS), ("dev", WORDS[:4])):
        lines = ["text\tintent", *("\t".join(row) for row in rows_of(words))]
        (path / f"clinc150_{part}.tsv").write_text("\n".join(lines) + "\n")
    return path


def test_texts_become_tokens_that_begin_and_end(folder):
    data = intent.load(str(folder), 120, 12)
    assert data.name == "CLINC150, dev part"
    assert data.train_tokens.shape == (32, 12)
    assert data.classes == 4
    assert data.vocabulary <= 120
    assert data.train_tokens.max() < data.vocabulary
    assert (data.train_tokens[:, 0] == 2).all()
    assert ((data.train_tokens == 3).sum(1) == 1).all()
    assert list(data.train_labels[:4]) == [0, 3, 2, 1]
    assert list(data.scored[:4]) == [True, True, True, False]
    assert not (data.train_tokens == intent.UNKNOWN).any()
    again = intent.load(str(folder), 120, 12)
    np.testing.assert_array_equal(again.train_tokens, data.train_tokens)
    assert intent.load(str(folder), 120, 5).test_tokens.shape == (16, 5)


def test_the_test_part_and_the_published_file_come_first(folder):
    (folder / "clinc150_test.tsv").write_text("text\tintent\nplay bach\tplay\n")
    data = intent.load(str(folder), 120, 12)
    assert (data.name, len(data.test_labels)) == ("CLINC150, test part", 1)
    inside = [row for row in rows_of(WORDS) if row[1] != "oos"]
    outside = [row for row in rows_of(WORDS) if row[1] == "oos"]
    complete = {"train": inside, "oos_train": outside, "test": inside[:6], "oos_test": outside[:1]}
    (folder / "data_full.json").write_text(json.dumps(complete))
    data = intent.load(str(folder), 120, 12)
    assert (len(data.train_labels), len(data.test_labels)) == (32, 7)
    assert list(data.scored) == [True] * 6 + [False]
    (folder / "data_full.json").write_text('{"train": []}')
    with pytest.raises(DataError, match=r"not CLINC150's data_full\.json"):
        intent.load(str(folder), 120, 12)


def test_what_cannot_be_read_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"clinc150_train\.tsv: missing; --intent_dir"):
        intent.load(str(tmp_path), 120, 12)
    (folder / "clinc150_dev.tsv").write_text("text\tintent\nplay bach\tplay\nhello\n")
    with pytest.raises(DataError, match=r"dev\.tsv: line 3 is not a text"):
        intent.load(str(folder), 120, 12)
    (folder / "clinc150_dev.tsv").write_text("text\tintent\nplay bach\tdance\n")
    with pytest.raises(DataError, match="the dev part has the intent 'dance'"):
        intent.load(str(folder), 120, 12)


def test_the_table_of_a_short_run(run, folder, monkeypatch):
    seconds = {f"{engine} {kind}": [0.002] for engine in measure.ENGINES for kind in KINDS}
    monkeypatch.setattr(measure, "encoder_times", lambda *arguments: seconds)
    rows, log = run(intent, f"--intent_dir={folder}", *SMALL)
    assert rows["top-1, full"]["claim"] == "94.2"
    assert rows["top-1, half, distilled"]["claim"] == "91.7"
    accuracy = log["measured"]["accuracy"]
    assert set(accuracy) == {"full", *intent.HALVES}
    assert all(len(accuracy[kind]) == 2 for kind in intent.HALVES)
    assert all(0 <= value <= 100 for values in accuracy.values() for value in values)
    layer = 12 * 32**2 + 13 * 32
    counts = [1e6 * float(rows[f"parameters, {kind}"]["measured"]) for kind in KINDS]
    assert counts[0] - counts[1] == pytest.approx(layer)
    assert float(rows["latency, half, LiteRT"]["measured"]) == pytest.approx(2.0)
    assert f"--intent_dir={folder}" in log["command"]
    # All trainings are found again.
    monkeypatch.setattr(learning, "train", None)
    again = run(intent, f"--intent_dir={folder}", *SMALL, "--overwrite")[1]
    assert again["measured"]["accuracy"] == accuracy
    with pytest.raises(DataError, match="--layers must be even"):
        run(intent, f"--intent_dir={folder}", "--layers=3", "--overwrite")


def test_encoder_learns_intents_and_masks_in_training_only(folder, tmp_path):
    """An encoder learns intents and hides words in training only."""
    data = intent.load(str(folder), 120, 12)
    model = TextEncoder(intent.config_of(data, 2, 32))
    training = learning.Training(60, 5e-3, batch=16)
    after = intent.trained(tmp_path, "one", model, data, training, seed=0)
    assert intent.percent(intent.hits_of(model, after, data), data.scored) > 90.0
    tokens = data.train_tokens[:4]
    observed = intent._apply(model, after, tokens, None)[0]
    np.testing.assert_array_equal(intent._apply(model, after, tokens, None)[0], observed)
    key = jax.random.key(0)
    assert np.abs(intent._apply(model, after, tokens, key)[0] - observed).max() > 1e-3


def test_differences_are_paired_by_text(folder):
    data = intent.load(str(folder), 120, 12)
    inside = np.flatnonzero(data.scored)

    def hits(*wrong):
        right = np.ones(len(data.scored), bool)
        right[list(wrong)] = False
        return right

    outside = np.flatnonzero(~data.scored)[0]
    full, alone = [hits(inside[0])], [hits(*inside[:6]), hits(*inside[:3])]
    taught = [hits(*inside[:3], outside)] * 2
    seconds = {f"{engine} {kind}": [0.002] * 3 for engine in measure.ENGINES for kind in KINDS}
    result = intent.rows_of(
        dict(zip(("full", *intent.HALVES), (full, alone, taught, full * 2), strict=True)),
        data,
        {"full": 4_000_000, "half": 2_000_000},
        seconds,
    )
    rows = {row.quantity: row for row in result}
    assert rows["top-1, full"].measured == pytest.approx(100 * 11 / 12)
    assert rows["top-1, full"].spread is None
    assert rows["top-1, half"].measured == pytest.approx(100 * 7.5 / 12)
    assert rows["top-1, half"].spread == pytest.approx(100 * 3 / 12 / 2**0.5)
    assert rows["lost by half the depth, distilled"].measured == pytest.approx(100 * 2 / 12)
    assert rows["lost by half the depth, distilled"].claim == pytest.approx(2.5)
    assert rows["gain of distillation"].measured == pytest.approx(100 * 1.5 / 12)
    assert rows["recognised as without intent, half, distilled"].measured == pytest.approx(75.0)
    assert rows["half over full, JAX"].measured == pytest.approx(1.0)
    assert rows["top-1, full, the claim's data"].measured is None
