"""Table (a): students trained on labels alone, and by distillation, with all or few labels.

    python -m experiments.tables.distillation --preset=quick
    python -m experiments.tables.distillation --preset=full --digits_dir=MNIST

The claim, for ImageNet classifiers: teacher 76.5 %, student 72.1 %, distilled student 74.3 %. The
table uses a residual network of 392,242 parameters as the teacher of a depthwise-separable one of
2,858 on handwritten digits. In the first group of rows all images have labels. In the others n
images have labels and the rest have none, the situation of compression, whose calibration has no
labels. There the teacher has learned from the same n labels, or from all labels.

A distilled student learns from the teacher's predictions (alpha 0.9, temperature 2) on all images,
and from the labels of those that have one. Student and teacher read the same augmented images
(shift, rotation, scale, noise). Labels alone are measured with and without augmentation. Each arm
uses the learning rate and steps of the grid that are best on the last fifth of the training part,
with seeds, labels and teachers of the tuning only. Differences are paired by seed. `gap recovered`
is the fraction of the gap between teacher and student that distillation closes; it is comparable
across data sets.
"""

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments.tables import arms, learning, table, vision
from experiments.tables.arms import Arm, Result, Setting
from experiments.tables.learning import Examples, Teacher, Training
from experiments.tables.table import IMAGENET, Row
from glm_edge import params as boxes
from glm_edge.cli.console import launch
from glm_edge.models.cnn import CNN

FLAGS = flags.FLAGS
NAME = "distillation"
CLAIMED_TEACHER = 76.5
ALPHA, TEMPERATURE = 0.9, 2.0
ALONE, AUGMENTED = "labels alone", "labels alone, augmented"
SAME, ALL = "distilled, teacher of the same labels", "distilled, teacher of all labels"
CLAIMS = {ALONE: 72.1, ALL: 74.3}
TEACHER_STEPS = {"quick": 250, "full": 1500}
STEPS = {"quick": (100, 200), "full": (300, 1000)}
RATES = {"quick": (1e-2, 3e-2), "full": (5e-3, 1e-2, 2e-2, 4e-2)}
LABELS = {"quick": (50,), "full": (50, 100)}
SEEDS = {"quick": 5, "full": 5}


class Learner(NamedTuple):
    """Everything that an arm needs besides its setting and seed.

    Attributes:
      directory: directory of the table.
      teacher: model of the teacher.
      student: model of the student.
      teacher_steps: training steps of a teacher of all labels.
    """

    directory: Path
    teacher: CNN
    student: CNN
    teacher_steps: int

    def taught(self, examples: Examples, seed: int, few: bool) -> Teacher:
        """Train a teacher, on the augmented images of a few labels or on the images of all."""
        # Many passes over few labels add nothing.
        training = Training(min(self.teacher_steps, 150) if few else self.teacher_steps, 2e-3)
        variables = learning.trained(
            self.directory,
            "teacher",
            self.teacher,
            learning.labelled(examples),
            training,
            seed,
            augment=vision.jitter if few else None,
        )
        return self.teacher, variables

    def teacher_accuracy(self, data: vision.Digits, labels: int, seed: int) -> float:
        """Return the accuracy of the teacher of a few labels on the test part in percent."""
        examples = learning.few_labels(data.train, labels, seed)
        return learning.accuracy(*self.taught(examples, seed, few=True), data.test)

    def accuracy(
        self, data: vision.Digits, kind: str, labels: int | None, setting: Setting, seed: int
    ) -> float:
        """Train a student, and return its accuracy on the test part in percent.

        Args:
          data: the digits, or those for tuning.
          kind: kind of training, such as `ALONE`.
          labels: number of labels, or None for all.
          setting: steps and learning rate.
          seed: seed of labels, initial variables, order and augmentation.
        """
        examples = data.train
        if labels is not None:
            examples = learning.few_labels(examples, labels, seed)
        training = Training(*setting)
        teacher = None
        if kind in (SAME, ALL):
            training = training._replace(alpha=ALPHA, temperature=TEMPERATURE)
            # All students of the measurement have one teacher of all labels.
            teacher = (
                self.taught(examples, seed, few=True)
                if kind == SAME
                else self.taught(data.train, FLAGS.seed, few=False)
            )
        else:
            examples = learning.labelled(examples)
        variables = learning.trained(
            self.directory,
            "student",
            self.student,
            examples,
            training,
            seed,
            teacher=teacher,
            augment=None if kind == ALONE else vision.jitter,
        )
        return learning.accuracy(self.student, variables, data.test)


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    vision.define_flags()
    flags.DEFINE_integer(
        "teacher_steps", None, "Training steps of the teacher; default: the preset's.", 1
    )
    arms.define_flags()
    flags.DEFINE_list(
        "labels", None, "Numbers of labels of the other groups; default: the preset's."
    )
    flags.DEFINE_integer("seeds", None, "Number of students of each kind; default: 5.", 2)


def main(argv: Sequence[str]) -> None:
    directory = table.prepare(argv)
    data = vision.load(FLAGS.digits_dir)
    learner = Learner(
        directory,
        vision.classifier("resnet_digits", data),
        vision.classifier("separable_digits", data),
        FLAGS.teacher_steps or TEACHER_STEPS[FLAGS.preset],
    )
    labels = arms.numbers("labels", int) or LABELS[FLAGS.preset]
    compared = {
        (count, kind): Arm(
            functools.partial(learner.accuracy, data.for_tuning(), kind, count),
            functools.partial(learner.accuracy, data, kind, count),
        )
        for count in (None, *labels)
        for kind in (ALONE, AUGMENTED, SAME, ALL)
        # Of all labels there is one teacher.
        if count is not None or kind != SAME
    }
    grid = arms.grid_from_flags(STEPS, RATES)
    results = arms.compare(compared, grid, table.seeds(SEEDS))
    taught = learner.taught(data.train, FLAGS.seed, few=False)
    teachers = {None: [learning.accuracy(*taught, data.test)]}
    for count in labels:
        teachers[count] = [
            learner.teacher_accuracy(data, count, seed) for seed in table.seeds(SEEDS)
        ]
    rows = rows_of(teachers, results, data.name)
    counts = {
        "teacher": boxes.count(taught[1]["params"]),
        "student": boxes.count(learning.fresh(learner.student, data.train, 0)["params"]),
    }
    rows += [
        Row(f"parameters, {name}", "parameters", None, float(count))
        for name, count in counts.items()
    ]
    table.publish(
        NAME,
        "Distillation on a vision task: claimed on ImageNet, measured on digits",
        rows,
        ("digits_dir", "teacher_steps", "steps", "rates", "labels", "seeds"),
        {
            "teachers": {group(count): values for count, values in teachers.items()},
            "arms": {title(*key): result.to_json() for key, result in results.items()},
            "alpha": ALPHA,
            "temperature": TEMPERATURE,
            "data": data.name,
            "test_images": len(data.test_labels),
        },
    )


def group(labels: int | None) -> str:
    """Return the name of a group of arms."""
    return "all labels" if labels is None else f"{labels} labels, the rest unlabelled"


def title(labels: int | None, kind: str) -> str:
    """Return the name of an arm."""
    return f"{group(labels)}: {kind}"


def rows_of(
    teachers: Mapping[int | None, Sequence[float]],
    results: Mapping[tuple[int | None, str], Result],
    data: str,
) -> list[Row]:
    """Return the rows of accuracies, of paired gains, and of the gap recovered by distillation.

    Args:
      teachers: accuracies of the teachers in percent, by number of labels; None is all labels.
      results: results by number of labels and kind.
      data: name of the data set.
    """
    (teacher,) = teachers[None]
    note = f"{data}; claim on ImageNet"
    rows = [Row("top-1, teacher of all labels", "%", CLAIMED_TEACHER, teacher, note=note)]
    for labels in dict.fromkeys(labels for labels, _ in results):
        if labels is not None:
            mean, spread = statistics.fmean(teachers[labels]), statistics.stdev(teachers[labels])
            rows.append(Row(f"top-1, teacher of {labels} labels", "%", None, mean, spread))
        members = {kind: result for (count, kind), result in results.items() if count == labels}
        claims = CLAIMS if labels is None else {}
        rows += [
            arms.accuracy_row(title(labels, kind), result, claims.get(kind))
            for kind, result in members.items()
        ]
        for kind in (SAME, ALL):
            for base in (ALONE, AUGMENTED):
                if kind not in members:
                    continue
                claim = CLAIMS[ALL] - CLAIMS[ALONE] if base in claims else None
                name = f"gain over {base}, {title(labels, kind)}"
                pair = (members[base].accuracies, members[kind].accuracies)
                rows.append(arms.gain_row(name, *pair, claim))
    alone, distilled = (statistics.fmean(results[None, k].accuracies) for k in (ALONE, ALL))
    gap = teacher - alone
    rows.append(
        Row(
            "gap recovered",
            "% of the gap",
            50.0,
            100.0 * (distilled - alone) / gap if gap > 0 else None,
            note="all labels; claim: (74.3 - 72.1) / (76.5 - 72.1)"
            + ("" if gap > 0 else "; no gap here: the student is no worse than its teacher"),
        )
    )
    rows.append(Row("top-1, distilled student, ImageNet", "%", 74.3, None, note=IMAGENET))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
