"""Intents: what is read, what is learned, and the rows of the table."""

import json

import jax
import numpy as np
import pytest

from experiments.tables import intent, learning, measure
from experiments.tables.arms import Result, Setting
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
    "--teacher_steps=3", "--steps=2", "--rates=0.01", "--labels=2",
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


@pytest.mark.slow
def test_the_table_of_a_short_run(run, folder, monkeypatch):
    seconds = {f"{engine} {kind}": [0.002] for engine in measure.ENGINES for kind in KINDS}
    monkeypatch.setattr(measure, "encoder_times", lambda *arguments: seconds)
    rows, log = run(intent, f"--intent_dir={folder}", *SMALL)
    assert rows["top-1, full"]["claim"] == "94.2"
    assert rows["top-1, half, all labels: distilled"]["claim"] == "91.7"
    measured = log["measured"]["arms"]
    assert len(measured) == len(intent.COMPLETE) + len(intent.FEW)
    for arm in measured.values():
        assert len(arm["accuracy"]) == 2
        assert all(0 <= value <= 100 for value in arm["accuracy"])
    name = "half, 8 labels, the rest unlabelled: distilled, teacher of the same labels"
    assert f"gain over labels alone, {name}" in rows
    assert f"recognised as without intent, {name}" in rows
    layer = 12 * 32**2 + 13 * 32
    counts = [1e6 * float(rows[f"parameters, {kind}"]["measured"]) for kind in KINDS]
    assert counts[0] - counts[1] == pytest.approx(layer)
    assert float(rows["latency, half, LiteRT"]["measured"]) == pytest.approx(2.0)
    assert f"--intent_dir={folder}" in log["command"]
    # All trainings are found again.
    monkeypatch.setattr(learning, "train", None)
    again = run(intent, f"--intent_dir={folder}", *SMALL, "--overwrite")[1]
    assert again["measured"]["arms"] == measured
    with pytest.raises(DataError, match="--layers must be even"):
        run(intent, f"--intent_dir={folder}", "--layers=3", "--overwrite")


def test_an_encoder_learns_intents(folder, tmp_path):
    data = intent.load(str(folder), 120, 12)
    model = TextEncoder(intent.config_of(data, 2, 32))
    training = learning.Training(60, 5e-3, batch=16)
    after = learning.trained(tmp_path, "one", model, data.train, training, 0, augment=intent.hide)
    assert intent.percent(intent.hits_of(model, after, data), data.scored) > 90.0


def test_words_are_masked_and_special_tokens_are_not():
    tokens = np.tile(np.r_[2, np.arange(4, 101), 3, intent.PAD], (40, 1))
    batch = {"tokens": tokens, "valid": tokens != intent.PAD, "labels": np.zeros(40)}
    hidden = jax.device_get(intent.hide(jax.random.key(0), batch))
    changed = hidden["tokens"] != tokens
    assert (hidden["tokens"][changed] == intent.UNKNOWN).all()
    assert not changed[:, [0, -2, -1]].any()
    assert changed.mean() == pytest.approx(intent.HIDDEN_WORDS, abs=0.02)
    np.testing.assert_array_equal(hidden["valid"], batch["valid"])


def test_the_tuning_reads_no_test_text(folder):
    data = intent.load(str(folder), 120, 12)
    tuning = data.for_tuning()
    assert len(tuning.test_labels) == 6
    assert len(tuning.train_labels) == 26
    np.testing.assert_array_equal(tuning.test_tokens, data.train_tokens[4::5])
    assert tuning.scored.all()


def test_differences_are_paired_by_seed(folder):
    data = intent.load(str(folder), 120, 12)
    right = np.ones(len(data.scored), bool)
    right[np.flatnonzero(data.scored)[0]] = False

    def result(*accuracies):
        return Result(Setting(100, 0.01), {}, list(accuracies))

    results = {
        (None, intent.ALONE): result(50.0, 60.0),
        (None, intent.DISTILLED): result(70.0, 76.0),
        (None, intent.LAYERS_ALONE): result(80.0, 80.0),
        (None, intent.LAYERS): result(80.0, 82.0),
        (40, intent.ALONE): result(40.0, 42.0),
        (40, intent.SAME): result(50.0, 51.0),
        (40, intent.ALL): result(60.0, 61.0),
    }
    rows = {row.quantity: row for row in intent.rows_of(right, results, data, {"full": 0.75})}
    assert rows["top-1, full"].measured == pytest.approx(100 * 11 / 12)
    assert rows["top-1, half, all labels: labels alone"].spread == pytest.approx(10 / 2**0.5)
    gain = rows["gain over labels alone, half, all labels: distilled"]
    assert gain.measured == pytest.approx(18.0)
    assert "better in 2 of 2" in gain.note
    layers = rows["gain over teacher's layers, labels alone, half, all labels: teacher's layers, "
                  "distilled"]  # fmt: skip
    assert layers.measured == pytest.approx(1.0)
    few = "half, 40 labels, the rest unlabelled: distilled, teacher of"
    assert rows[f"gain over labels alone, {few} the same labels"].measured == pytest.approx(9.5)
    assert rows[f"gain over labels alone, {few} all labels"].measured == pytest.approx(19.5)
    lost = rows["lost by half the depth, distilled"]
    assert (lost.claim, lost.measured) == pytest.approx((2.5, 100 * 11 / 12 - 73.0))
    assert rows["recognised as without intent, full"].measured == pytest.approx(75.0)
    seconds = {f"{engine} {kind}": [0.002] * 3 for engine in measure.ENGINES for kind in KINDS}
    costs = {row.quantity: row for row in intent.cost_rows(dict.fromkeys(KINDS, 1e6), seconds)}
    assert costs["half over full, JAX"].measured == pytest.approx(1.0)
    assert costs["top-1, full, the claim's data"].measured is None
