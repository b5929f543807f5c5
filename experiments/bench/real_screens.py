"""Measures where the shipped model taps on screenshots of real applications.

    python -m experiments.bench.real_screens --gui_dir=DIR --out=FILE.json --figure=FILE.png

The shipped model was trained on generated screens of 96 x 192 pixels, with icons, digits, buttons
and rows. On such a screen, text of a real application is not readable. The script therefore asks
how far a probe gets, and compares it with answers that do not see the screen.

--gui_dir contains screenshots and `elements.tsv`, with boxes, text and descriptions of elements. An
instruction is "tap NAME", for each element with a name of its own on its screen and a box of at
most --largest_box of the screen. Screenshots are resized to the model's input.

Rows: the model as shipped (zero-shot); the same with the screenshots exchanged; the centre of a
random named element; a uniformly random point; and the model after fine-tuning on the screens of
all other applications (labels only, --steps steps per application). Intervals are by the bootstrap
over screens. The figure contains taps relative to their targets, and no screenshot.
"""

import csv
import functools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import numpy as np
from absl import flags

import glm_edge as ge
from experiments.common import tap_eval
from experiments.common.provenance import provenance_of
from experiments.common.tap_items import Item
from experiments.nano.phone_screens import actions, metrics
from experiments.nano.phone_screens.generator import Element
from experiments.nano.phone_screens.instructions import Question
from glm_edge.cli import corpora
from glm_edge.cli.console import bar, launch, print_table, refuse_arguments
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, require
from glm_edge.preprocess.image import load_image, prepare_images
from glm_edge.preprocess.tokens import prompt_ids

FLAGS = flags.FLAGS
LONGEST_NAME = 40
BATCH = 8


class Probe(NamedTuple):
    """One instruction on a real screen.

    Attributes:
      item: screen, question and target in pixels of the model's input.
      application: folder of the screenshot.
      screen: index of the screenshot.
      centres: centres [E, 2] of all named elements of the screen.
    """

    item: Item
    application: str
    screen: int
    centres: np.ndarray


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_string("gui_dir", None, "Folder of screenshots with elements.tsv.", required=True)
    flags.DEFINE_string("out", None, "JSON log of the results.")
    flags.DEFINE_string("figure", None, "PNG file of the taps relative to their targets.")
    flags.DEFINE_float("largest_box", 0.25, "Largest box as a fraction of the screen.", 0.0, 1.0)
    flags.DEFINE_integer("steps", 150, "Steps of fine-tuning per application; 0 skips it.", 0)
    flags.DEFINE_float("learning_rate", 3e-4, "Peak of the learning rate.")
    flags.DEFINE_integer("seed", 0, "Seed of exchanged screens and of fine-tuning.")


def main(argv: Sequence[str]) -> None:
    """Measure all rows."""
    refuse_arguments(argv)
    checkpoint = ge.shipped("nano")
    model, params = ge.load(checkpoint, dtype="float32")
    tokenizer = ge.load_tokenizer(checkpoint)
    probes = read_probes(FLAGS.gui_dir, model.config, FLAGS.largest_box)
    answer = functools.partial(tap_eval.answers, tokenizer=tokenizer)
    items = [probe.item for probe in probes]
    taps = {
        "shipped model": answer(model, params, items=items),
        "shipped model, exchanged screens": answer(
            model, params, items=exchanged(probes, FLAGS.seed)
        ),
    }
    if FLAGS.steps:
        taps["fine-tuned on the other applications"] = fine_tuned(
            probes, lambda batches: tune(model, params, batches), tokenizer, model.config
        )
    rows = {name: hits_of(probes, texts) for name, texts in taps.items()}
    rows["centre of a random named element"] = [random_element_rate(probe) for probe in probes]
    rows["uniformly random point"] = [area(probe, model.config) for probe in probes]
    screens = [probe.screen for probe in probes]
    rates = {name: vars(metrics.bootstrap(hits, screens)) for name, hits in rows.items()}
    log = provenance_of(
        "bench.real_screens",
        ("largest_box", "steps", "learning_rate", "seed"),
        ["--gui_dir=DIR"],
    ) | {
        "screens": len(set(screens)),
        "questions": len(probes),
        "applications": dict(Counter(probe.application for probe in probes)),
        "rows": [{"row": name, **rate} for name, rate in rates.items()],
    }
    print_table(
        ["row", "taps in the box", "95 % interval"],
        [
            [name, f"{r['value']:.1%}", f"{r['low']:.1%} to {r['high']:.1%}"]
            for name, r in rates.items()
        ],
    )
    if FLAGS.out:
        corpora.write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", overwrite=True)
    if FLAGS.figure:
        figure(probes, taps, model.config, Path(FLAGS.figure))


def read_probes(folder: str, config: GLMConfig, largest_box: float) -> list[Probe]:
    """Read one instruction per named element.

    Args:
      folder: folder of screenshots with `elements.tsv`.
      config: configuration of the model.
      largest_box: largest box as a fraction of the screen.

    Returns:
      The probes, in the order of the file.

    Raises:
      DataError: the file is missing, or contains no named element.
    """
    table = corpora.read_text(Path(folder) / "elements.tsv").splitlines()
    elements: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE):
        name = " ".join((row["text"] or row["content_desc"] or "").split())
        if name.isascii() and 0 < len(name) <= LONGEST_NAME:
            elements[row["image"]].append({**row, "name": name.lower()})
    probes = []
    for index, (image, named) in enumerate(elements.items()):
        pixels, scale = resized(Path(folder) / image, config)
        counts = Counter(row["name"] for row in named)
        chosen = []
        for row in named:
            corners = [float(row[name]) for name in ("x0", "y0", "x1", "y1")]
            box = (np.reshape(corners, (2, 2)) * scale).reshape(-1)
            if counts[row["name"]] == 1 and 0 < _share(box, config) <= largest_box:
                chosen.append(Element("row", row["name"], tuple(box.tolist())))
        centres = np.array([element.centre for element in chosen])
        for element in chosen:
            action = action_of(element, config)
            question = Question(f"tap {element.name}", None, action, element)
            application = image.partition("/")[0]
            probes.append(Probe(Item(pixels, question), application, index, centres))
    if not probes:
        raise DataError(f"{folder}/elements.tsv: no element has a name of its own")
    return probes


def resized(path: Path, config: GLMConfig) -> tuple[np.ndarray, np.ndarray]:
    """Read a screenshot in the model's size.

    Args:
      path: path of the file.
      config: configuration of the model.

    Returns:
      Pixels [height, width, 3] in 0..1, and the factors of x and y.
    """
    picture = load_image(path)
    height, width = config.vision_tower.image_size
    factors = np.array([width / picture.shape[1], height / picture.shape[0]])
    return np.asarray(prepare_images([picture], config.vision_tower)[0], np.float32), factors


def action_of(element: Element, config: GLMConfig) -> actions.Action:
    """Return the tap on the centre of an element."""
    height, width = config.vision_tower.image_size
    x, y = element.centre
    point = (int(x / width * actions.GRID), int(y / height * actions.GRID))
    return actions.Action("Tap", element=point)


def _share(box: np.ndarray, config: GLMConfig) -> float:
    height, width = config.vision_tower.image_size
    x0, y0, x1, y1 = np.clip(box, 0, [width, height, width, height])
    return float((x1 - x0) * (y1 - y0) / (height * width))


def area(probe: Probe, config: GLMConfig) -> float:
    """Return the probability that a uniformly random point is in the target's box."""
    return _share(np.asarray(_target(probe).box), config)


def random_element_rate(probe: Probe) -> float:
    """Return the probability that the centre of a random named element is in the target's box."""
    return float(np.mean([_target(probe).contains(*centre) for centre in probe.centres]))


def exchanged(probes: Sequence[Probe], seed: int) -> list[Item]:
    """Return the items with the screens of other probes, none its own."""
    rng = np.random.default_rng(seed)
    items = []
    for probe in probes:
        others = [other.item.image for other in probes if other.screen != probe.screen]
        image = others[rng.integers(len(others))] if others else np.zeros_like(probe.item.image)
        items.append(Item(image, probe.item.question))
    return items


def hits_of(probes: Sequence[Probe], texts: Sequence[str]) -> list[float]:
    """Return 1.0 for each tap inside its box, 0.0 for others."""
    return tap_eval.hits([probe.item for probe in probes], texts)


def fine_tuned(
    probes: Sequence[Probe],
    train: Callable[[list[dict[str, Any]]], tuple[Any, Any]],
    tokenizer: Any,
    config: GLMConfig,
) -> list[str]:
    """Answer each application's questions by a model trained on all other applications.

    Args:
      probes: the questions.
      train: function of batches that returns a model and its parameters.
      tokenizer: tokenizer of the model.
      config: configuration of the model.

    Returns:
      The answers, in the order of the probes.
    """
    texts = [""] * len(probes)
    for application in sorted({probe.application for probe in probes}):
        measured = [i for i, probe in enumerate(probes) if probe.application == application]
        learned = [probe.item for probe in probes if probe.application != application]
        if not learned:
            raise DataError(f"{application}: there is no other application to learn from")
        model, params = train(batches_of(learned, tokenizer, config, FLAGS.seed))
        answers = tap_eval.answers(model, params, tokenizer, [probes[i].item for i in measured])
        for index, text in zip(measured, answers, strict=True):
            texts[index] = text
    return texts


def tune(model: Any, params: Any, batches: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Train all parameters on labels only."""
    train = ge.TrainOptions(steps=FLAGS.steps, learning_rate=FLAGS.learning_rate)
    transform = ge.distill((model, params), train=train, alpha=0.0)
    tuned, trained, _ = transform(
        model, params, batches, rng=jax.random.key(FLAGS.seed), progress=bar("fine-tuning")
    )
    return tuned, trained


def batches_of(
    items: Sequence[Item], tokenizer: Any, config: GLMConfig, seed: int
) -> list[dict[str, Any]]:
    """Make training batches of questions with their answers, in random order.

    Args:
      items: the questions.
      tokenizer: tokenizer of the model.
      config: configuration of the model.
      seed: seed of the order.

    Returns:
      Batches of tokens [B, T], images [B, H, W, 3], and `loss_mask` [B, T], which is 1 where the
      next token belongs to an answer. The last batch repeats questions to be complete.
    """
    rows = []
    for item in items:
        text = item.question.instruction_text
        prompt = prompt_ids(tokenizer, text, config.vision_tower.num_tokens, 0)
        answer = tokenizer.encode(actions.format_action(item.question.answer_action)).ids
        rows.append((prompt, [*answer, config.eos_token_ids[0]], item.image))
    length = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    order = np.resize(order, -(-len(rows) // BATCH) * BATCH)
    batches = []
    for chosen in order.reshape(-1, BATCH):
        tokens = np.full((BATCH, length), config.pad_token_id, np.int32)
        mask = np.zeros((BATCH, length), np.float32)
        for row, index in enumerate(chosen):
            prompt, answer, _ = rows[index]
            tokens[row, : len(prompt) + len(answer)] = [*prompt, *answer]
            mask[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = 1.0
        images = np.stack([rows[index][2] for index in chosen])
        batches.append({"tokens": tokens, "loss_mask": mask, "images": images})
    return batches


def _target(probe: Probe) -> Element:
    target = probe.item.question.target
    assert target is not None
    return target


def figure(
    probes: Sequence[Probe], taps: dict[str, list[str]], config: GLMConfig, path: Path
) -> None:
    """Draw taps relative to the centres of their targets, and all targets' boxes.

    Args:
      probes: the questions.
      taps: answers by row.
      config: configuration of the model.
      path: path of the PNG file.
    """
    matplotlib = require("matplotlib", extra="plot")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="plot")
    height, width = config.vision_tower.image_size
    drawing, axes = pyplot.subplots(
        1, len(taps), figsize=(3.2 * len(taps), 6), layout="constrained", squeeze=False
    )
    for axis, (name, texts) in zip(axes[0], taps.items(), strict=True):
        inside = hits_of(probes, texts)
        for probe, text, hit in zip(probes, texts, inside, strict=True):
            target = _target(probe)
            x0, y0, x1, y1 = target.box
            centre_x, centre_y = target.centre
            axis.add_patch(
                pyplot.Rectangle(
                    (x0 - centre_x, y0 - centre_y), x1 - x0, y1 - y0, fill=False, alpha=0.1
                )
            )
            try:
                action = actions.parse_action(text)
            except DataError:
                continue
            if action.element:
                x, y = actions.to_pixels(action.element, width, height)
                axis.plot(x - centre_x, y - centre_y, "C2o" if hit else "C3x", markersize=4)
        axis.set(
            title=f"{name}\n{np.mean(inside):.0%} in the box",
            xlim=(-width, width),
            ylim=(height, -height),
            xlabel="pixels right of the target",
        )
        axis.set_aspect("equal")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("pixels below the target")
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


if __name__ == "__main__":
    define_flags()
    launch(main)
