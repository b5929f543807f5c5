"""Table (a): a teacher, a student trained on labels, and a student trained by distillation.

    python -m experiments.tables.distillation --preset=quick
    python -m experiments.tables.distillation --preset=full --digits_dir=MNIST

The claim, for ImageNet classifiers: teacher 76.5 %, student 72.1 %, distilled student 74.3 %. The
table uses a residual network of 392,242 parameters as the teacher of a depthwise-separable one of
2,858 on handwritten digits. Both students use the same images, labels, steps and seeds; the
distilled one also learns from the teacher's predictions (alpha 0.9, temperature 4). `gap recovered`
is the fraction of the gap between teacher and student that distillation closes; it is comparable
across data sets.
"""

import statistics
from collections.abc import Sequence

from absl import flags

from experiments.tables import table, vision
from experiments.tables.learning import Training
from experiments.tables.table import IMAGENET, Row
from glm_edge import params as boxes
from glm_edge.cli.console import bar, launch

FLAGS = flags.FLAGS
NAME = "distillation"
CLAIMS = {"teacher": 76.5, "student": 72.1, "distilled student": 74.3}
STEPS = {"quick": (250, 300), "full": (1500, 3000)}
SEEDS = {"quick": 3, "full": 5}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    vision.define_flags()
    flags.DEFINE_integer(
        "teacher_steps", None, "Training steps of the teacher; default: the preset's.", 1
    )
    flags.DEFINE_integer(
        "student_steps", None, "Training steps of each student; default: the preset's.", 1
    )
    flags.DEFINE_integer(
        "seeds", None, "Number of students of each kind; default: 3, or 5 for full.", 2
    )


def main(argv: Sequence[str]) -> None:
    directory = table.prepare(argv)
    teacher_steps, student_steps = STEPS[FLAGS.preset]
    teacher_steps = FLAGS.teacher_steps or teacher_steps
    student_steps = FLAGS.student_steps or student_steps
    data = vision.load(FLAGS.digits_dir)
    teacher = vision.classifier("resnet_digits", data)
    student = vision.classifier("separable_digits", data)
    taught = vision.trained(
        directory, "teacher", teacher, data, Training(teacher_steps, 2e-3), FLAGS.seed
    )
    targets = vision.logits_of(teacher, taught, data.train_images)
    alone = Training(student_steps)
    accuracies: dict[str, list[float]] = {"student": [], "distilled student": []}
    for seed in bar("students")(table.seeds(SEEDS)):
        trainings = {
            "student": (alone, None),
            "distilled student": (alone._replace(alpha=0.9), targets),
        }
        for kind, (training, learned) in trainings.items():
            name = f"{kind.replace(' ', '_')}_{seed}"
            variables = vision.trained(
                directory, name, student, data, training, seed, targets=learned
            )
            accuracies[kind].append(vision.accuracy(student, variables, data))
    accuracies["teacher"] = [vision.accuracy(teacher, taught, data)]
    rows = rows_of(accuracies, data.name)
    counts = {
        "teacher": boxes.count(taught["params"]),
        "student": boxes.count(vision.fresh(student, 0)["params"]),
    }
    rows += [
        Row(f"parameters, {name}", "parameters", None, float(count))
        for name, count in counts.items()
    ]
    table.publish(
        NAME,
        "Distillation on a vision task: claimed on ImageNet, measured on digits",
        rows,
        ("digits_dir", "teacher_steps", "student_steps", "seeds"),
        {"accuracy": accuracies, "data": data.name, "test_images": len(data.test_labels)},
    )


def rows_of(accuracies: dict[str, list[float]], data: str) -> list[Row]:
    """Return the rows of accuracies, and of the gap recovered by distillation.

    Args:
      accuracies: accuracy of every seed in percent, by kind.
      data: name of the data set.
    """
    mean = {kind: statistics.fmean(values) for kind, values in accuracies.items()}
    rows = [
        Row(
            f"top-1, {kind}",
            "%",
            claim,
            mean[kind],
            statistics.stdev(accuracies[kind]) if len(accuracies[kind]) > 1 else None,
            f"{data}, {len(accuracies[kind])} seed(s); claim on ImageNet",
        )
        for kind, claim in CLAIMS.items()
    ]
    gains = [
        a - b for a, b in zip(accuracies["distilled student"], accuracies["student"], strict=True)
    ]
    rows.append(
        Row(
            "gain of distillation",
            "points",
            CLAIMS["distilled student"] - CLAIMS["student"],
            statistics.fmean(gains),
            statistics.stdev(gains) if len(gains) > 1 else None,
            f"paired by seed; better in {sum(g > 0 for g in gains)} of {len(gains)}",
        )
    )
    gap = mean["teacher"] - mean["student"]
    rows.append(
        Row(
            "gap recovered",
            "% of the gap",
            50.0,
            100.0 * (mean["distilled student"] - mean["student"]) / gap if gap > 0 else None,
            note="claim: (74.3 - 72.1) / (76.5 - 72.1)"
            + ("" if gap > 0 else "; no gap here: the student is no worse than its teacher"),
        )
    )
    rows.append(Row("top-1, distilled student, ImageNet", "%", 74.3, None, note=IMAGENET))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
