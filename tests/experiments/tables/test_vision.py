"""Training of small classifiers on digits, and what is kept of it."""

import numpy as np
import pytest

from experiments.tables import distillation, healing, learning, vision
from experiments.tables.learning import Training
from glm_edge.errors import DataError
from glm_edge.models.cnn import CNN, Inverted, MobileNetV2Config, Stem

STEPS = Training(60, 1e-2, batch=20)
NARROW = MobileNetV2Config(
    "narrow", Stem(8, stride=1), (Inverted(8, 40, 2), Inverted(8, 40, 1)), 16, 10, (8, 8, 1)
)


@pytest.fixture(scope="module")
def student(tiny):
    model = vision.classifier("separable_digits", tiny)
    return model, vision.fresh(model, 0)


def test_training_learns_and_leaves_what_it_was_given(tiny, student):
    model, before = student
    start = learning.fingerprint(before)
    after = vision.train(model, before, tiny, STEPS, seed=0)
    assert vision.accuracy(model, after, tiny) > 60.0 > vision.accuracy(model, before, tiny) + 20
    assert learning.fingerprint(before) == start
    again = vision.train(model, before, tiny, STEPS, seed=0)
    assert learning.fingerprint(again) == learning.fingerprint(after)


def test_the_loss_is_the_mixture_that_is_documented():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 6, 10)).astype(np.float32)
    labels = np.arange(6)

    def softmax(x):
        exponent = np.exp(x.astype(np.float64))
        return exponent / exponent.sum(-1, keepdims=True)

    hard = -np.log(softmax(logits)[np.arange(6), labels]).mean()
    teacher, guess = softmax(targets / 4.0), softmax(logits / 4.0)
    soft = 16.0 * (teacher * np.log(teacher / guess)).sum(-1).mean()
    training = Training(1, alpha=0.7, temperature=4.0)
    result = float(learning._loss(logits, labels, targets, training))
    assert result == pytest.approx(0.7 * soft + 0.3 * hard, rel=1e-5)
    assert float(learning._loss(logits, labels, targets, Training(1))) == pytest.approx(hard)


def test_what_cannot_be_trained_is_refused(tiny, student):
    with pytest.raises(DataError, match="requires targets of a teacher"):
        vision.train(*student, tiny, STEPS._replace(alpha=0.5), seed=0)
    broken = tiny._replace(train_images=np.full_like(tiny.train_images, np.nan))
    with pytest.raises(DataError, match="not finite at step 1;"):
        vision.train(*student, broken, STEPS._replace(steps=2), seed=0)


def test_finished_training_is_reused_for_equal_settings(tiny, student, tmp_path):
    """A finished training is found unless its settings changed."""
    model, _ = student
    short = Training(2, batch=20)
    first = vision.trained(tmp_path, "one", model, tiny, short, 0)
    files = list((tmp_path / "runs").iterdir())
    written = files[0].stat().st_mtime_ns
    again = vision.trained(tmp_path, "one", model, tiny, short, 0)
    assert learning.fingerprint(again) == learning.fingerprint(first)
    assert files[0].stat().st_mtime_ns == written
    vision.trained(tmp_path, "one", model, tiny, short, 1)
    vision.trained(tmp_path, "one", model, tiny, short, 0, start=first)
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_digits_without_a_download():
    pytest.importorskip("sklearn")
    data = vision.load(None)
    assert data.size == (8, 8, 1)
    assert (len(data.train_images), len(data.test_images)) == (1347, 450)
    assert 0.0 <= data.train_images.min() < data.train_images.max() <= 1.0


def test_distillation_prints_the_claims_beside_what_it_measured(run, tiny, student, monkeypatch):
    monkeypatch.setattr(vision, "load", lambda folder: tiny)
    # Any teacher will do; the residual one takes long to compile.
    monkeypatch.setattr(vision, "classifier", lambda name, data: student[0])
    few = ("--teacher_steps=4", "--student_steps=4", "--seeds=2")
    rows, log = run(distillation, *few)
    assert [rows[f"top-1, {kind}"]["claim"] for kind in distillation.CLAIMS] == [
        "76.5", "72.1", "74.3"
    ]  # fmt: skip
    accuracy = log["measured"]["accuracy"]
    assert len(accuracy["student"]) == len(accuracy["distilled student"]) == 2
    assert float(rows["parameters, student"]["measured"]) == 2858
    assert rows["top-1, distilled student, ImageNet"]["measured"] == ""
    # All trainings are found again.
    monkeypatch.setattr(vision, "train", None)
    assert run(distillation, *few, "--overwrite")[1]["measured"] == log["measured"]


def test_the_gap_that_distillation_closes():
    results = {"teacher": [98.0], "student": [90.0, 92.0], "distilled student": [94.0, 95.0]}
    rows = {row.quantity: row for row in distillation.rows_of(results, "d")}
    assert rows["gap recovered"].measured == pytest.approx(50.0)
    gain = rows["gain of distillation"]
    assert (gain.measured, gain.spread) == pytest.approx((3.5, 0.5**0.5))
    assert "better in 2 of 2" in gain.note
    assert rows["top-1, student"].spread == pytest.approx(2**0.5)
    results["teacher"] = [90.0]
    rows = {row.quantity: row for row in distillation.rows_of(results, "d")}
    assert rows["gap recovered"].measured is None
    assert "no gap here" in rows["gap recovered"].note


def test_healing_is_compared_seed_by_seed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "classifier", lambda name, data: CNN(NARROW))
    result = healing.repeat(tmp_path, tiny, 0, dense_steps=4, heal_steps=4, fraction=0.8)
    assert set(result) >= {"dense", "pruned", *healing.CLAIMS}
    assert 20 < result["parameters left"] < 80
    seeds = {name: [value, value + 2.0] for name, value in result.items()}
    seeds["fine-tuned"], seeds["distilled, then fine-tuned"] = [90.0, 94.0], [93.0, 95.0]
    rows = {row.quantity: row for row in healing.rows_of(seeds, "d")}
    assert rows["gain of distillation"].measured == pytest.approx(2.0)
    assert rows["gain of distillation"].claim == pytest.approx(2.7)
    assert "better in 2 of 2" in rows["gain of distillation"].note
    assert rows["spread with over spread without"].measured == pytest.approx(0.5)
