"""Measures any checkpoint, compressed or not: taps on unseen screens, and loss on text.

    python -m experiments.evaluate --checkpoint=DIR --screens=500 --digits_dir=DIR \\
        --speech_dir=DIR --text=FILE --seed=7 --ablations

prints a table and writes the same numbers as JSON with --json=FILE. Screens are drawn from seeds
and digit images that training never sees; --ablations repeats the exam with images blanked, with
images shuffled between screens, and with recordings blanked, to show what answers rest on.
Without --checkpoint the shipped model is measured; without --speech_dir, speech is synthesised when
the extra `speech` is installed; without --text, half of CPython's help topics are the text.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

from absl import app, flags
from tokenizers import Tokenizer

import glm_edge as ge
from experiments import exam, materials
from experiments.console import bar, fail_in_one_line, print_table
from experiments.text import corpora
from experiments.text import tokenizer as text_tokenizer
from glm_edge.errors import OutputError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this script's flags; other scripts import the functions without them."""
    flags.DEFINE_string("checkpoint", None, "Directory that ge.load opens; default: shipped nano.")
    flags.DEFINE_integer("screens", 500, "Questions of each kind (written, spoken).", 1)
    flags.DEFINE_string("digits_dir", None, "Folder of MNIST files for the keys.")
    flags.DEFINE_string("speech_dir", None, "Folder of spoken digits.")
    flags.DEFINE_list("speakers", [], "Only these speakers of --speech_dir; default: all.")
    flags.DEFINE_string("text", None, "UTF-8 file whose loss is measured.")
    flags.DEFINE_integer("text_tokens", 60000, "At most this many tokens of it are scored.", 2)
    flags.DEFINE_integer("seed", 0, "Seed of screens and questions.")
    flags.DEFINE_bool("ablations", False, "Also measure with images or recordings taken away.")
    flags.DEFINE_string("json", None, "File to write the numbers to.")


def main(argv: Sequence[str]) -> None:
    del argv
    checkpoint = materials.checkpoint_of(FLAGS.checkpoint)
    if FLAGS.json and not Path(FLAGS.json).resolve().parent.is_dir():
        raise OutputError(f"{FLAGS.json}: its directory does not exist; create it first")
    model, params = ge.load(checkpoint, dtype="float32")
    tokenizer = ge.load_tokenizer(checkpoint)
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "seed": FLAGS.seed}
    windows = text_windows(tokenizer, FLAGS.text, FLAGS.text_tokens)
    report["text"] = exam.text_loss(model, params, windows) | {"tokens": windows.num_scored}
    report["written"] = report["spoken"] = None
    if model.config.vision is not None:
        items = exam.draw_items(FLAGS.screens, FLAGS.seed, FLAGS.digits_dir)
        report["written"] = measure(model, params, tokenizer, items, "written")
        recordings, _, notes = materials.recordings(FLAGS.speech_dir, FLAGS.speakers, FLAGS.seed)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if model.config.speech is not None and recordings:
            items = exam.draw_items(FLAGS.screens, FLAGS.seed, FLAGS.digits_dir, recordings)
            report["spoken"] = measure(model, params, tokenizer, items, "spoken")
    show(report)
    if FLAGS.json:
        corpora.write_text(FLAGS.json, json.dumps(report, indent=2) + "\n", overwrite=True)


def measure(
    model: Any, params: Any, tokenizer: Tokenizer, items: Sequence[exam.Item], kind: str
) -> dict[str, Any]:
    """Metrics of one kind of question, for each ablation that is asked for."""
    results = {}
    for ablation in exam.ABLATIONS if FLAGS.ablations else ("none",):
        if ablation == "blank_audio" and kind == "written":
            continue
        taken = exam.ablate(items, ablation)
        label = kind if ablation == "none" else f"{kind}, {ablation.replace('_', ' ')}"
        texts = exam.answers(model, params, tokenizer, taken, bar(label))
        results[ablation] = {
            name: None if rate is None else vars(rate)
            for name, rate in exam.outcomes(items, texts).items()
        }
    return results


def text_windows(tokenizer: Tokenizer, path: str | None, limit: int) -> corpora.Windows:
    """Evaluation windows over a file, or over CPython's help topics."""
    text = corpora.read_text(path) if path else corpora.pydoc_topics("evaluation")
    tokens = text_tokenizer.encode_text(tokenizer, text)[:limit]
    return corpora.windows(tokens, text_tokenizer.token_bytes(tokenizer), exam.WINDOW)


def show(report: dict[str, Any]) -> None:
    """Prints the numbers as a table."""
    text = report["text"]
    print(
        f"text: perplexity {text['perplexity']:.2f}, {text['bits_per_byte']:.3f} bits per byte "
        f"over {text['tokens']} tokens"
    )
    rows = []
    for kind in ("written", "spoken"):
        for ablation, rates in (report[kind] or {}).items():
            cells = [interval(rates[name]) for name in RATES]
            rows.append([kind, ablation.replace("_", " "), *cells])
    if rows:
        print_table(["questions", "taken away", *(n.replace("_", " ") for n in RATES)], rows)


RATES = ("parse_rate", "action_accuracy", "answer_accuracy", "tap_in_box")


def interval(rate: dict[str, float] | None) -> str:
    """A rate in percent with its 95 % interval."""
    if rate is None:
        return "-"
    return f"{100 * rate['value']:.1f} ({100 * rate['low']:.1f}-{100 * rate['high']:.1f})"


if __name__ == "__main__":
    define_flags()
    app.run(fail_in_one_line(main))
