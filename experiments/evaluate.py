"""Runs `glm-edge evaluate`, and also measures taps on unseen phone screens.

    python -m experiments.evaluate --checkpoint=DIR --screens=500 --digits_dir=DIR \\
        --speech_dir=DIR --text=FILE --seed=7 --ablations

Prints a table, and writes the same values as JSON with --json=FILE. Screens use seeds and digit
images that training does not use. The first row is on wordings that training does not use either;
beside it are trained wordings, names that no training contains, and requests of dialogues of
several steps. Spoken questions are also reported per speaker, with an interval over speakers.
--ablations repeats the measurement with blank images, with images shuffled between screens, and
with silent recordings, to show which inputs the answers depend on. Without --speech_dir, speech is
synthesised if the extra `speech` is installed.
"""

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

from absl import flags
from tokenizers import Tokenizer

from experiments.common import eval_data, tap_eval, tap_items
from experiments.common.provenance import provenance_of
from glm_edge.cli import evaluate
from glm_edge.cli.console import bar, launch, print_table

FLAGS = flags.FLAGS
# Kinds of questions, the main figures first; written ones with their wording.
WRITTEN = {"written": "exam", "written_trained": "train", "written_names": "names"}
KINDS = ("written", "spoken", "written_trained", "written_names", "dialogue")
TITLES = {
    "written": "written, new wordings",
    "written_trained": "written, trained wordings",
    "written_names": "written, unknown names",
    "dialogue": "steps of dialogues",
}


def define_flags() -> None:
    """Define the command's flags, and those of screens."""
    evaluate.define_flags()
    flags.DEFINE_integer("screens", 500, "Number of questions of each kind (written, spoken).", 1)
    flags.DEFINE_string(
        "digits_dir",
        None,
        "Folder of MNIST files for the keys of screens; default: scikit-learn's digits.",
    )
    flags.DEFINE_string("speech_dir", None, "Folder of spoken digits; default: synthetic voices.")
    flags.DEFINE_list("speakers", [], "Speakers of --speech_dir to use; default: all.")
    flags.DEFINE_integer("seed", 0, "Seed of screens and questions.")
    flags.DEFINE_bool("ablations", False, "Also measure without images and without recordings.")


def measure_taps(model: Any, params: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measure and print taps for written and, if the model has speech, spoken questions."""
    places = ("checkpoint", "reference", "text", "digits_dir", "speech_dir")
    report: dict[str, Any] = {
        **provenance_of(
            "evaluate",
            ("screens", "seed", "speakers", "ablations", "text_tokens"),
            [f"--{name}=PATH" for name in places if FLAGS[name].present],
        ),
        "speakers": None,
        **dict.fromkeys(KINDS),
    }
    draw = (FLAGS.screens, FLAGS.seed, FLAGS.digits_dir)
    if model.config.vision is not None:
        for kind, wording in WRITTEN.items():
            items = tap_items.draw_items(*draw, wording=wording)
            report[kind] = measure(model, params, tokenizer, items, kind)
        items = tap_items.draw_dialogues(*draw)
        report["dialogue"] = measure(model, params, tokenizer, items, "dialogue")
        recordings, _, notes = eval_data.recordings(FLAGS.speech_dir, FLAGS.speakers, FLAGS.seed)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if model.config.speech is not None and recordings:
            items = tap_items.draw_items(*draw, recordings)
            report["spoken"] = measure(model, params, tokenizer, items, "spoken", report)
    show(report)
    return report


def measure(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    items: Sequence[tap_items.Item],
    kind: str,
    report: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compute the metrics of one kind of question for each requested ablation.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      items: the questions.
      kind: one of `KINDS`; only the exam's written and spoken questions have ablations.
      report: receives the rates per speaker as "speakers".
    """
    results = {}
    ablated = FLAGS.ablations and kind in ("written", "spoken")
    for ablation in tap_items.ABLATIONS if ablated else ("none",):
        if ablation == "blank_audio" and kind != "spoken":
            continue
        taken = tap_items.ablate(items, ablation)
        label = kind if ablation == "none" else f"{kind}, {ablation.replace('_', ' ')}"
        texts = tap_eval.answers(model, params, tokenizer, taken, bar(label))
        results[ablation] = {
            name: None if rate is None else vars(rate)
            for name, rate in tap_eval.outcomes(items, texts).items()
        }
        if report is not None and ablation == "none":
            report["speakers"] = tap_eval.per_speaker(items, texts)
    return results


def show(report: dict[str, Any]) -> None:
    """Print the taps as a table."""
    rows = []
    for kind in KINDS:
        for ablation, rates in (report[kind] or {}).items():
            cells = [interval(rates[name]) for name in RATES]
            rows.append([TITLES.get(kind, kind), ablation.replace("_", " "), *cells])
    if rows:
        print_table(["questions", "taken away", *(n.replace("_", " ") for n in RATES)], rows)
    if report["speakers"]:
        print()
        print_table(
            ["speaker", "taps in the box"],
            [[name, interval(rate)] for name, rate in report["speakers"].items()],
        )


RATES = ("parse_rate", "action_accuracy", "answer_accuracy", "tap_in_box")


def interval(rate: dict[str, float] | None) -> str:
    """Return a rate in percent with its 95 % interval."""
    if rate is None:
        return "-"
    return f"{100 * rate['value']:.1f} ({100 * rate['low']:.1f}-{100 * rate['high']:.1f})"


if __name__ == "__main__":
    define_flags()
    main = functools.partial(evaluate.main, further=measure_taps)
    launch(main, f"{__doc__}\n{evaluate.__doc__}")
