"""Distillation of classifiers: loss, labels, collections, augmentation, and resuming."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from glm_edge import params as boxes
from glm_edge.compress import Calibration, TrainOptions, chain, distill, prune, quantize
from glm_edge.compress.distill.classifier import is_classifier
from glm_edge.compress.distill.losses import Objective, classification_loss
from glm_edge.compress.distill.state import calibration_digest
from glm_edge.configs import TextConfig
from glm_edge.errors import DataError, OutputError, RecipeError, TrainingError
from glm_edge.models.cnn import CNN, Inverted, MobileNetV2Config, Stem
from glm_edge.models.text import TextEncoder

CLASSES = 3


class Net(nn.Module):
    """One dense layer between a batch norm and dropout."""

    num_classes: int = CLASSES
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, momentum=0.5)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)

    def classify(self, batch, train=False):
        return self(batch["x"], train)


def variables_of(seed, model=None):
    return jax.jit((model or Net()).init)(jax.random.key(seed), np.zeros((1, 4), np.float32))


def data(count=4, rows=8, labelled=True):
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(count):
        x = rng.normal(2.0, 3.0, (rows, 4)).astype(np.float32)
        drawn.append({"x": x, "labels": x[:, :CLASSES].argmax(1)} if labelled else {"x": x})
    return drawn


def train(
    calibration, teacher=None, model=None, variables=None, rng=None, progress=None, **options
):
    names = ("steps", "learning_rate", "accumulate", "state_dir", "save_every", "clip_norm")
    training = {"steps": 3} | {name: options.pop(name) for name in names if name in options}
    transform = distill(teacher, train=TrainOptions(**training), **options)
    variables = variables_of(0) if variables is None else variables
    rng = jax.random.key(5) if rng is None else rng
    return transform(model or Net(), variables, calibration, rng, progress)[1:]


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_the_loss_of_a_classifier_matches_a_loop(alpha):
    rng = np.random.default_rng(1)
    logits, targets = 3.0 * rng.normal(size=(2, 6, CLASSES))
    labels, weights = np.array([0, -1, 2, 1, -1, 0]), rng.random(6)
    soft = hard = 0.0
    for row in range(6):
        teacher, student = (log_softmax(x[row] / 2.0) for x in (targets, logits))
        soft += weights[row] * 4.0 * np.sum(np.exp(teacher) * (teacher - student))
        if labels[row] >= 0:
            hard -= weights[row] * log_softmax(logits[row])[labels[row]]
    soft, hard = soft / weights.sum(), hard / weights.sum()
    objective = Objective(2.0, alpha, weight_decay=0.0, clip_norm=1.0)
    arrays = (np.float32(logits), np.float32(targets), labels, np.float32(weights))
    loss, parts = classification_loss(*arrays, objective)
    np.testing.assert_allclose(
        [loss, *parts], [alpha * soft + (1 - alpha) * hard, soft, hard], 1e-5
    )
    alone, (none, same) = classification_loss(arrays[0], None, *arrays[2:], objective)
    np.testing.assert_allclose([alone, none, same], [hard, 0.0, hard], 1e-5)


def test_an_unlabelled_row_has_no_gradient_of_labels():
    logits = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)
    labels = np.array([1, -1, 2])
    objective = Objective(2.0, 0.0, weight_decay=0.0, clip_norm=1.0)
    gradient = jax.grad(
        lambda x: classification_loss(x, None, labels, np.ones(3, np.float32), objective)[0]
    )(logits)
    expected = np.exp(log_softmax(logits))
    expected[[0, 2], labels[[0, 2]]] -= 1.0
    expected[1] = 0.0
    np.testing.assert_allclose(gradient, expected / 3.0, atol=1e-6)


def test_batch_statistics_are_updated_and_the_teachers_are_not():
    teacher, before = (Net(), variables_of(1)), variables_of(0)
    frozen = jax.tree.map(np.copy, teacher[1])
    batch = data(1)[0]
    trained, report = train([batch], teacher, steps=1)
    # The momentum is one half, and statistics begin at zero and one.
    stats = trained["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.5 * batch["x"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.5 + 0.5 * batch["x"].var(0), rtol=1e-5)
    assert equal(before, variables_of(0))
    assert equal(frozen, teacher[1])
    # The teacher reads its running statistics, the student those of the batch.
    dense = jax.device_get(before["params"]["Dense_0"])
    x = (batch["x"] - batch["x"].mean(0)) / np.sqrt(batch["x"].var(0) + 1e-5)
    student = log_softmax((x @ dense["kernel"] + dense["bias"]) / 2.0)
    target = log_softmax(np.asarray(jax.jit(Net().apply)(teacher[1], batch["x"])) / 2.0)
    soft = 4.0 * np.mean(np.sum(np.exp(target) * (target - student), -1))
    assert report.curve[0].soft == pytest.approx(float(soft), rel=1e-4)


def test_labels_alone_need_no_teacher():
    trained, report = train(data(), alpha=0.0, steps=40, learning_rate=0.1)
    logits = jax.jit(Net().apply)(trained, np.concatenate([b["x"] for b in data()]))
    labels = np.concatenate([b["labels"] for b in data()])
    assert np.mean(np.argmax(logits, -1) == labels) > 0.8
    assert {point.soft for point in report.curve} == {0.0}
    with pytest.raises(RecipeError, match="its own teacher"):
        train(data(), alpha=0.1)


def test_unlabelled_batches_learn_from_the_teacher_only():
    teacher = (Net(), variables_of(1))
    unlabelled, other = data(labelled=False), data()
    for batch in other:
        batch["labels"] = np.full(8, -1)
    # The gradient's scale is clipped away.
    options = {"clip_norm": 1e-3, "steps": 2}
    one, report = train(unlabelled, teacher, alpha=0.5, **options)
    assert equal(one, train(other, teacher, alpha=0.5, **options)[0])
    assert {point.hard for point in report.curve} == {0.0}
    assert report.curve[0].loss == pytest.approx(0.5 * report.curve[0].soft)
    with pytest.raises(DataError, match="no batch has 'labels'"):
        train(unlabelled, alpha=0.0)


@pytest.fixture(scope="module")
def plain():
    """A network without norms, so that rows do not depend on each other, and its teacher."""
    model = nn.Dense(CLASSES)

    class Plain(nn.Module):
        num_classes: int = CLASSES

        @nn.compact
        def classify(self, batch, train=False):
            return nn.Dense(self.num_classes, name="dense")(batch["x"])

    student, teacher = (
        {"dense": jax.jit(model.init)(jax.random.key(seed), np.zeros((1, 4), np.float32))["params"]}
        for seed in range(2)
    )
    return Plain(), student, (Plain(), teacher)


def test_a_row_of_weight_zero_is_not_learned(plain):
    model, student, teacher = plain
    batch = data(1)[0]
    half = {name: array[:5] for name, array in batch.items()}
    weighted = {**batch, "weights": np.array([1.0] * 5 + [0.0] * 3)}
    one, other = (
        train([read], teacher, model, student, steps=1)[1].curve[0] for read in (weighted, half)
    )
    np.testing.assert_allclose([one.soft, one.hard], [other.soft, other.hard], rtol=1e-5)


def test_accumulated_batches_are_one_batch_with_all_rows(plain):
    model, student, teacher = plain
    first, second = data(2)
    first["labels"] = np.where(np.arange(8) < 6, -1, first["labels"])
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    one = train([first, second], teacher, model, student, steps=1, accumulate=2)
    other = train([both], teacher, model, student, steps=1)
    np.testing.assert_allclose(one[1].curve[0].loss, other[1].curve[0].loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one[0], other[0])


def jitter(key, batch):
    return {**batch, "x": batch["x"] + jax.random.normal(key, batch["x"].shape)}


def test_student_and_teacher_read_the_same_augmented_array(plain):
    read = []

    class Recorder(nn.Module):
        num_classes: int = CLASSES

        @nn.compact
        def classify(self, batch, train=False):
            jax.debug.callback(lambda x: read.append((train, np.array(x))), batch["x"])
            return nn.Dense(self.num_classes, name="dense")(batch["x"])

    student, teacher = plain[1], plain[2][1]
    batch = data(1)[0]
    calibration = Calibration([batch], augment=jitter)
    train(calibration, (Recorder(), teacher), Recorder(), student, steps=2)
    jax.effects_barrier()
    arrays = {kind: [x for trains, x in read if trains is kind] for kind in (True, False)}
    assert len(arrays[True]) == len(arrays[False]) == 2
    np.testing.assert_array_equal(arrays[True], arrays[False])
    assert np.abs(arrays[True][0] - batch["x"]).mean() > 0.3
    assert not np.array_equal(*arrays[True])


def test_augmentation_depends_on_the_key_alone(plain):
    model, student, teacher = plain
    results = [
        train(
            Calibration(data(), augment=jitter), teacher, model, student, rng=jax.random.key(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert equal(results[0][0], results[1][0])
    assert not equal(results[0][0], results[2][0])
    digests = {
        calibration_digest(Calibration(data(), augment=augment))
        for augment in (None, jitter, lambda key, batch: batch)
    }
    assert len(digests) == 3
    with pytest.raises(DataError, match=r"augment must be callable as augment\(key, batch\)"):
        Calibration(data(), augment=3)
    with pytest.raises(DataError, match=r"augment\(batch\) must be callable as augment\(key, b"):
        Calibration(data(), augment=lambda batch: batch)


class StopError(Exception):
    """Raised in place of a kill."""


def stop(stage, done, total):
    raise StopError


def test_a_resumed_classifier_ends_with_the_same_bytes(tmp_path):
    model, teacher = Net(dropout=0.5), (Net(), variables_of(1))
    options = {"steps": 7, "accumulate": 2, "save_every": 3, "state_dir": str(tmp_path)}
    calibration = Calibration(data(), augment=jitter)
    with pytest.raises(StopError):
        train(calibration, teacher, model, progress=stop, **options)
    resumed, report = train(calibration, teacher, model, **options)
    expected, complete = train(calibration, teacher, model, **{**options, "state_dir": None})
    assert equal(resumed, expected)
    assert report.curve == complete.curve
    changed = variables_of(0)
    changed["batch_stats"]["BatchNorm_0"]["mean"] += 1.0
    with pytest.raises(OutputError, match="another student"):
        train(calibration, teacher, model, changed, **options)


def test_dropout_draws_from_the_key_of_the_batch():
    results = [
        train(data(1), alpha=0.0, model=Net(dropout=rate), rng=jax.random.key(seed))[0]
        for rate, seed in ((0.5, 1), (0.5, 1), (0.5, 2), (0.0, 1))
    ]
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])
    assert not equal(results[0], results[3])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_last_finite_statistics_are_those_of_the_error(accumulate):
    batches_read = data(2 * accumulate)
    batches_read[-1]["x"] = np.full((8, 4), np.nan, np.float32)

    class Ordered:
        """Without a length, so in order."""

        def __iter__(self):
            return iter(batches_read)

    teacher = (Net(), variables_of(1))
    with pytest.raises(TrainingError, match="loss is nan at step 2") as caught:
        train(Ordered(), teacher, accumulate=accumulate)
    expected = train(batches_read[:accumulate], teacher, accumulate=accumulate, steps=1)[0]
    means = [tree["batch_stats"]["BatchNorm_0"]["mean"] for tree in (caught.value.params, expected)]
    np.testing.assert_allclose(*means, rtol=1e-5)


@pytest.fixture(scope="module")
def texts():
    """A text encoder with its parameters, and a batch whose first token is the class."""
    model = TextEncoder(TextConfig(20, 8, 1, 2, 16, 8, num_labels=CLASSES, type_vocab_size=0))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 16)
    tokens = np.concatenate([1 + labels[:, None], rng.integers(4, 20, (16, 5))], axis=1)
    batch = {"tokens": tokens, "valid": tokens > 0, "labels": labels}
    return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"], batch


def test_a_text_encoder_learns_classes_from_tokens(texts):
    model, params, batch = texts
    trained, report = train([batch], None, model, params, alpha=0.0, steps=25, learning_rate=0.03)
    assert report.curve[-1].hard < 0.3 * report.curve[0].hard
    assert set(trained) == set(params)


def test_quantization_aware_training_takes_classifiers(texts):
    model, params, batch = texts
    recipe = quantize.qat("int8", train=TrainOptions(steps=1), alpha=0.5)
    _, rounded, report = recipe(model, params, calibration=[batch])
    assert isinstance(rounded["classifier"]["weight"], boxes.Quantized)
    assert report.curve[0].hard > report.curve[0].soft > 0.0


def test_a_pruned_cnn_is_healed_in_a_chain():
    config = MobileNetV2Config(
        "narrow", Stem(4, stride=1), (Inverted(4, 12, 2),), 8, CLASSES, (4, 4, 1)
    )
    model, rng = CNN(config), np.random.default_rng(2)
    x = rng.normal(size=(6, 4, 4, 1)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    recipe = chain(prune.channels(0.5), distill(train=TrainOptions(steps=2)))
    batch = {"images": x, "labels": np.arange(6) % CLASSES}
    smaller, healed, report = recipe(model, variables, calibration=[batch])
    assert smaller.config.blocks[0].hidden < 12
    assert len(report.curve) == 2
    pruned = prune.channels(0.5)(model, variables)[1]
    assert jax.tree.structure(healed) == jax.tree.structure(pruned)
    assert not equal(healed["batch_stats"], pruned["batch_stats"])


def test_wrong_batches_of_classifiers_are_refused():
    teacher, batch = (Net(), variables_of(1)), data(1)[0]
    cases = (
        ({"labels": np.zeros(7, int)}, r"labels must have one value per row, \[8\], found \[7\]"),
        ({"labels": np.full(8, CLASSES)}, "labels must be integers below 3, or -1"),
        ({"labels": np.zeros(8)}, "labels must be integers below 3"),
        ({"weights": np.full(8, -1.0)}, "weights must be finite and not negative"),
    )
    for change, message in cases:
        with pytest.raises(DataError, match=message):
            train([{**batch, **change}], teacher)
    with pytest.raises(DataError, match="Net reads 'x' of a batch, which has y"):
        train([{"y": batch["x"]}], teacher)


def test_wrong_models_of_classifiers_are_refused(plain):
    batch, teacher = data(1), (Net(), variables_of(1))
    with pytest.raises(RecipeError, match=r"reads a collection besides its parameters; pass the"):
        train(batch, teacher, variables=variables_of(0)["params"])
    wider = Net(num_classes=4)
    with pytest.raises(RecipeError, match="student predicts 3 classes, its teacher 4"):
        train(batch, (wider, variables_of(0, wider)))
    with pytest.raises(RecipeError, match="one of student and teacher is a classifier"):
        train(batch, (nn.Dense(3), {}))
    with pytest.raises(RecipeError, match="vocabulary= needs a model that predicts the next token"):
        train(batch, teacher, vocabulary=[0, 1, 2])
    # Methods that do not train collections still take parameters alone.
    with pytest.raises(RecipeError, match=r"quantize.rtn: params contains collections"):
        chain(distill(teacher), quantize.rtn("int8"))(Net(), variables_of(0), batch)
    assert not is_classifier(TextEncoder(TextConfig(20, 8, 1, 2, 16)))
