"""Training of small classifiers on digits, and what is kept of it."""

import functools

import jax
import numpy as np
import pytest

from experiments.tables import arms, distillation, healing, learning, vision
from experiments.tables.arms import Arm, Result, Setting
from experiments.tables.learning import Training
from glm_edge.errors import DataError, TrainingError
from glm_edge.models.cnn import CNN, Inverted, MobileNetV2Config, SeparableConfig, Stem

STEPS = Training(60, 2e-2, batch=20)
NARROW = MobileNetV2Config(
    "narrow", Stem(8, stride=1), (Inverted(8, 40, 2), Inverted(8, 40, 1)), 16, 10, (8, 8, 1)
)


@pytest.fixture(scope="module")
def student(tiny):
    model = vision.classifier("separable_digits", tiny)
    return model, learning.fresh(model, tiny.train, 0)


def test_training_learns_and_leaves_what_it_was_given(tiny, student):
    model, before = student
    start = learning.fingerprint(before)
    after = learning.train(model, before, tiny.train, STEPS, seed=0)
    scores = [learning.accuracy(model, variables, tiny.test) for variables in (before, after)]
    assert scores[1] > 60.0 > scores[0] + 20
    assert learning.fingerprint(before) == start
    again = learning.train(model, before, tiny.train, STEPS, seed=0)
    assert learning.fingerprint(again) == learning.fingerprint(after)


def test_batches_hold_each_example_once_per_round():
    examples = {"x": np.arange(10), "labels": np.arange(10)}
    drawn = learning.Draws(examples, Training(5, batch=4), seed=1)
    rows = np.concatenate([batch["x"] for batch in drawn])
    assert len(drawn) == 5
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])
    again = learning.Draws(examples, Training(5, batch=4), seed=2)
    assert list(rows) != list(np.concatenate([batch["x"] for batch in again]))


def test_few_labels_are_balanced_and_drawn_by_seed():
    examples = {"x": np.arange(40), "labels": np.arange(40) % 4}
    few = learning.few_labels(examples, 8, seed=0)
    chosen = learning.labelled(few)
    assert list(np.bincount(chosen["labels"])) == [2, 2, 2, 2]
    assert (chosen["x"] % 4 == chosen["labels"]).all()
    assert (few["labels"] == -1).sum() == 32
    other = learning.labelled(learning.few_labels(examples, 8, seed=1))
    assert set(other["x"]) != set(chosen["x"])
    for count in (3, 44, 0):
        with pytest.raises(DataError, match="must be a multiple of 4 classes, and at most 40"):
            learning.few_labels(examples, count, seed=0)


def test_tuning_reads_no_test_image(tiny):
    tuning = tiny.for_tuning()
    joined = np.concatenate([tuning.train_images, tuning.test_images])
    np.testing.assert_array_equal(joined, tiny.train_images)
    assert len(tuning.test_labels) == len(tiny.train_labels) // 5


def test_jitter_moves_images_and_no_labels(tiny):
    batch = {"images": tiny.train_images[:6], "labels": tiny.train_labels[:6]}
    drawn, again, other = (
        jax.device_get(jax.jit(vision.jitter)(jax.random.key(seed), batch)) for seed in (0, 0, 1)
    )
    assert drawn["images"].shape == batch["images"].shape
    np.testing.assert_array_equal(drawn["images"], again["images"])
    assert np.abs(drawn["images"] - other["images"]).mean() > 0.02
    np.testing.assert_array_equal(drawn["labels"], batch["labels"])
    # Without a random part, nothing changes.
    still = {"SHIFT": 0.0, "ANGLE": 0.0, "SCALE": 0.0, "NOISE": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in still.items():
            patch.setattr(vision, name, value)
        same = vision.jitter(jax.random.key(0), batch)["images"]
    np.testing.assert_allclose(same, np.clip(batch["images"], 0.0, 1.0), atol=1e-5)


def test_what_cannot_be_trained_is_refused(tiny, student):
    with pytest.raises(DataError, match="requires a teacher"):
        learning.train(*student, tiny.train, STEPS._replace(alpha=0.5), seed=0)
    broken = tiny._replace(train_images=np.full_like(tiny.train_images, np.nan))
    with pytest.raises(TrainingError, match="nan at step 1;"):
        learning.train(*student, broken.train, STEPS._replace(steps=2), seed=0)


def test_finished_training_is_reused_for_equal_settings(tiny, student, tmp_path):
    """A finished training is found unless its settings changed."""
    model, _ = student
    short = Training(2, batch=20)
    run = functools.partial(learning.trained, tmp_path, "one", model, tiny.train)
    first = run(short, 0)
    files = list((tmp_path / "runs").iterdir())
    written = files[0].stat().st_mtime_ns
    again = run(short, 0)
    assert learning.fingerprint(again) == learning.fingerprint(first)
    assert files[0].stat().st_mtime_ns == written
    run(short, 1)
    run(short, 0, start=first)
    run(short._replace(alpha=1.0), 0, teacher=(model, first))
    run(short, 0, augment=vision.jitter)
    assert len(list((tmp_path / "runs").iterdir())) == 5


def test_digits_without_a_download():
    pytest.importorskip("sklearn")
    data = vision.load(None)
    assert data.size == (8, 8, 1)
    assert (len(data.train_images), len(data.test_images)) == (1347, 450)
    assert 0.0 <= data.train_images.min() < data.train_images.max() <= 1.0


def test_arms_are_tuned_on_validation_with_other_seeds():
    asked = []

    def arm(best):
        def validated(setting, seed):
            asked.append(seed)
            return 90.0 if setting == best else 80.0

        return Arm(validated, lambda setting, seed: setting.learning_rate + seed)

    grid = arms.grid_of((20, 10), (0.2, 0.1))
    assert grid[0] == Setting(10, 0.1)
    results = arms.compare({"a": arm(grid[2]), "b": arm(None)}, grid, range(3), tuning_seeds=2)
    assert results["a"].setting == grid[2]
    assert results["b"].setting == grid[0]
    assert results["a"].accuracies == pytest.approx([0.1, 1.1, 2.1])
    assert not {0, 1, 2} & set(asked)
    log = results["a"].to_json()
    assert [row["validation"] for row in log["tuning"]] == [80.0, 80.0, 90.0, 80.0]
    assert (log["steps"], log["learning_rate"]) == (20, 0.1)


def test_a_paired_gain_has_the_t_interval():
    gain = arms.paired_gain([90.0, 91.0, 92.0, 93.0], [91.0, 93.0, 92.0, 96.0])
    # Differences 1, 2, 0, 3; the quantile of t with 3 degrees of freedom is 3.1824.
    reach = 3.1824 * np.std([1.0, 2.0, 0.0, 3.0], ddof=1) / 2.0
    assert (gain.mean, gain.better, gain.count) == (1.5, 3, 4)
    assert (gain.low, gain.high) == pytest.approx((1.5 - reach, 1.5 + reach), abs=1e-3)
    row = arms.gain_row("gain", [90.0, 91.0], [91.0, 93.0], 2.2)
    assert (row.claim, row.measured) == (2.2, 1.5)
    assert "better in 2 of 2" in row.note
    with pytest.raises(DataError, match="needs two seeds or more"):
        arms.paired_gain([1.0], [2.0])


def test_distillation_prints_the_claims_beside_what_it_measured(run, tiny, monkeypatch):
    monkeypatch.setattr(vision, "load", lambda folder: tiny)
    # Any models will do, and these compile quickly.
    model = CNN(SeparableConfig("one", Stem(4, stride=2), ((8, 2),), 10, (8, 8, 1)))
    monkeypatch.setattr(vision, "classifier", lambda name, data: model)
    few = ("--teacher_steps=3", "--steps=2", "--rates=0.01", "--labels=10", "--seeds=2")
    rows, log = run(distillation, *few)
    claims = {"teacher of all labels": "76.5", "all labels: labels alone": "72.1"}
    claims["all labels: distilled, teacher of all labels"] = "74.3"
    assert {name: rows[f"top-1, {name}"]["claim"] for name in claims} == claims
    measured = log["measured"]["arms"]
    assert len(measured) == 3 + 4
    assert all(len(arm["accuracy"]) == 2 for arm in measured.values())
    name = "10 labels, the rest unlabelled: distilled, teacher of the same labels"
    assert rows[f"top-1, {name}"]["claim"] == ""
    assert "2 steps, rate 0.01" in rows[f"top-1, {name}"]["note"]
    assert f"gain over labels alone, augmented, {name}" in rows
    counts = (36 + 8) + (36 + 8) + (32 + 16) + (80 + 10)
    assert float(rows["parameters, student"]["measured"]) == counts
    assert "--labels=10" in log["command"]
    for flag in ("--rates=fast", "--steps=0", "--labels=ten"):
        with pytest.raises(DataError, match=flag.split("=")[0]):
            run(distillation, flag, "--overwrite")
    # All trainings are found again.
    monkeypatch.setattr(learning, "train", None)
    assert run(distillation, *few, "--overwrite")[1]["measured"] == log["measured"]


def result_of(*accuracies):
    return Result(Setting(100, 0.01), {}, list(accuracies))


def test_the_gap_that_distillation_closes():
    results = {
        (None, distillation.ALONE): result_of(90.0, 92.0),
        (None, distillation.AUGMENTED): result_of(90.0, 93.0),
        (None, distillation.ALL): result_of(94.0, 95.0),
        (50, distillation.ALONE): result_of(60.0, 61.0),
        (50, distillation.AUGMENTED): result_of(62.0, 63.0),
        (50, distillation.SAME): result_of(80.0, 81.0),
        (50, distillation.ALL): result_of(90.0, 91.0),
    }
    teachers = {None: [98.0], 50: [75.0, 77.0]}
    rows = {row.quantity: row for row in distillation.rows_of(teachers, results, "d")}
    assert rows["top-1, teacher of 50 labels"].measured == pytest.approx(76.0)
    assert rows["gap recovered"].measured == pytest.approx(50.0)
    gain = rows["gain over labels alone, all labels: distilled, teacher of all labels"]
    assert (gain.claim, gain.measured, gain.spread) == pytest.approx((2.2, 3.5, 0.5**0.5))
    assert "better in 2 of 2" in gain.note
    name = "50 labels, the rest unlabelled: distilled, teacher of the same labels"
    assert rows[f"gain over labels alone, augmented, {name}"].measured == pytest.approx(18.0)
    assert rows[f"gain over labels alone, {name}"].claim is None
    assert rows["top-1, all labels: labels alone"].spread == pytest.approx(2**0.5)
    teachers[None] = [90.0]
    rows = {row.quantity: row for row in distillation.rows_of(teachers, results, "d")}
    assert rows["gap recovered"].measured is None
    assert "no gap here" in rows["gap recovered"].note


def test_a_distilled_student_needs_no_label_of_the_others(tiny, student, tmp_path, monkeypatch):
    """Labels of unlabelled images reach neither student nor teacher."""
    calls = []
    monkeypatch.setattr(learning, "trained", lambda *a, **k: calls.append((a, k)) or student[1])
    learner = distillation.Learner(tmp_path, student[0], student[0], 4)
    setting = Setting(2, 0.01)
    monkeypatch.setattr(distillation, "FLAGS", type("Flags", (), {"seed": 0}))
    for kind in (distillation.ALONE, distillation.SAME):
        learner.accuracy(tiny, kind, 10, setting, 0)
    counts = [int((arguments[3]["labels"] >= 0).sum()) for arguments, _ in calls]
    sizes = [len(arguments[3]["labels"]) for arguments, _ in calls]
    # Labels alone; the teacher of these labels; the distilled student.
    assert counts == [10, 10, 10]
    assert sizes == [10, 10, 200]
    alone, teacher, distilled = calls
    np.testing.assert_array_equal(alone[0][3]["images"], teacher[0][3]["images"])
    assert alone[1]["teacher"] is None
    assert distilled[1]["teacher"] is not None
    assert distilled[0][4].alpha == distillation.ALPHA
    assert [keywords["augment"] for _, keywords in calls] == [None, vision.jitter, vision.jitter]


def test_halves_of_healing_restart_alike_in_every_arm(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "classifier", lambda name, data: CNN(NARROW))
    healer = healing.Healer(tmp_path, dense_steps=2, fraction=0.8)
    model, dense, small, pruned = healer.pruned(tiny, 0)
    calls = []
    monkeypatch.setattr(healing.Healer, "pruned", lambda *_: (model, dense, small, pruned))
    monkeypatch.setattr(learning, "trained", lambda *a, **k: calls.append((a, k)) or pruned)
    for kind in healing.HALVES:
        healer.accuracy(tiny, kind, Setting(7, 0.01), 0)
    trainings = [(arguments[4].steps, arguments[4].learning_rate) for arguments, _ in calls]
    assert trainings == [(3, 0.01), (4, 0.01)] * 3
    assert [arguments[4].alpha for arguments, _ in calls] == [0.0, 0.0, 0.9, 0.0, 0.9, 0.9]
    assert [keywords["teacher"] is not None for _, keywords in calls] == [
        False, False, True, False, True, True
    ]  # fmt: skip


def test_healing_is_compared_seed_by_seed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "classifier", lambda name, data: CNN(NARROW))
    healer = healing.Healer(tmp_path, dense_steps=2, fraction=0.8)
    assert 0.0 <= healer.accuracy(tiny, healing.FIRST, Setting(4, 0.01), 0) <= 100.0
    before = healing.before_healing(healer, tiny, [0])
    assert 20 < before["parameters left"][0] < 80
    before = {name: [value[0], value[0] + 2.0] for name, value in before.items()}
    results = {
        healing.ALONE: result_of(90.0, 94.0),
        healing.FIRST: result_of(93.0, 95.0),
        healing.BOTH: result_of(94.0, 94.0),
    }
    rows = {row.quantity: row for row in healing.rows_of(before, results, "d")}
    gain = rows["gain of distilled, then fine-tuned"]
    assert (gain.measured, gain.claim) == pytest.approx((2.0, 2.7))
    assert "better in 2 of 2" in gain.note
    assert rows["spread with over spread without"].measured == pytest.approx(0.5)
