"""Run-time pruning: tokens that leave early, and tokens that read only some neurons.

    python -m experiments.bench_skipping --out_dir=out/skipping
    python -m experiments.bench_skipping --preset=full --out_dir=out/skipping --exits=2,3 \\
        --thresholds=0.5,0.8,0.9,0.95,0.99 --keep=0.8,0.5,0.25 --neuron_thresholds=0.02,0.05,0.1

Early exit: after each layer of --exits the head is asked; where its largest probability reaches
the threshold, the other layers are not run. An exit scores what it has (`exit`), or first maps it
to what the last layer would give, by a matrix fitted on calibration screens and text (`exit+map`).
Neurons: each token uses the --keep fraction of neurons whose gates are widest open (`keep`), or
those within a fraction of the widest (`gate`). Neither trains anything.

Accuracy is taps in the box on unseen screens of the shipped model, or, for a checkpoint without
vision, agreement with its own tokens. `tokens/s` is of decoding the answer to one question in one
compiled loop, the prompt not counted; in each round all settings take turns at the same question,
and `speed-up` compares within rounds (quartiles in brackets). `layers` is the mean a decoded token
ran; `agreement` the share of tokens equal to the first row's.

A small model gains little: in nano a layer costs about as much as asking the head. --shape=mobile
also times the decoder of that preset with random weights (1.4 GB), where exits leave at half the
depth (`exit`), so that its rows say what skipping can gain and nothing of accuracy.

Writes report.json, table.md, table.csv and skipping.png to --out_dir.
"""

import csv
import dataclasses
import io
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import numpy as np
from absl import app, flags

import glm_edge as ge
from experiments import calibration, exam, materials
from experiments.bench_decode import text_only
from experiments.console import fail_in_one_line, text_table
from experiments.figures import skipping_figure
from experiments.quickstart import commit, prepare_directory
from experiments.text import tokenizer as text_tokenizer
from experiments.text.corpora import write_text
from glm_edge import configs
from glm_edge.compress.progress import ProgressLine
from glm_edge.errors import DataError
from glm_edge.generate import Setting, SweepRow, early_exit, fit_exits, skip_neurons, sweep
from glm_edge.models.multimodal import MultimodalGLM

PRESETS = {
    "quick": {"screens": 32, "rounds": 8, "batches": 4},
    "full": {"screens": 512, "rounds": 64, "batches": 32},
}
# What the claims say: speed-up and points of accuracy lost.
PUBLISHED = {
    ("exit+map", 0.95): "1.58 x at -0.4 points",
    ("keep", 0.8): "1.15 x under 1 %",
    ("keep", 0.5): "1.42 x at 3 %",
}
PROMPT_TOKENS, TIMED_TOKENS = 64, 32
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines this script's flags."""
    flags.DEFINE_enum("preset", "quick", list(PRESETS), "How much is measured.")
    flags.DEFINE_string("checkpoint", None, "Directory that ge.load opens; default: shipped nano.")
    flags.DEFINE_list("exits", ["3"], "Layers after which a token may stop.")
    flags.DEFINE_list("thresholds", ["0.5", "0.8", "0.95"], "Of the largest probability, 0 to 1.")
    flags.DEFINE_list("keep", ["0.8", "0.5"], "Fractions of neurons that a token uses.")
    flags.DEFINE_list("neuron_thresholds", ["0.05"], "Of |silu(gate)| over its largest, 0 to 1.")
    flags.DEFINE_bool("maps", True, "Also fit maps for the exits.")
    flags.DEFINE_integer("screens", None, "Questions; default: the preset's.", 1)
    flags.DEFINE_integer("rounds", None, "In which settings take turns; default: the preset's.", 1)
    flags.DEFINE_string("digits_dir", None, "Folder of MNIST files for the keys of screens.")
    flags.DEFINE_string("shape", "", "Preset to time with random weights, such as mobile.")
    flags.DEFINE_integer("seed", 0, "Seed of screens and calibration.")
    flags.DEFINE_string("out_dir", "out", "Directory for the results; it must not hold any yet.")
    flags.DEFINE_bool("overwrite", False, "Replace results that lie in --out_dir.")


def main(argv: Sequence[str]) -> None:
    del argv
    started = time.monotonic()
    numbers = {name: floats(name) for name in ("thresholds", "keep", "neuron_thresholds")}
    exits = [int(value) for value in floats("exits")]
    directory = prepare_directory(Path(FLAGS.out_dir), FLAGS.overwrite)
    preset = dict(PRESETS[FLAGS.preset])
    preset |= {name: v for name in ("screens", "rounds") if (v := getattr(FLAGS, name)) is not None}
    checkpoint = Path(FLAGS.checkpoint) if FLAGS.checkpoint else ge.shipped("nano")
    model, params = ge.load(checkpoint, dtype="float32")
    tokenizer = ge.checkpoint.load_tokenizer(checkpoint)
    if tokenizer is None:
        raise DataError(f"{checkpoint}: tokenizer.json is missing; questions cannot be asked")
    maps = None
    if FLAGS.maps and exits:
        data = fitting_data(model, tokenizer, preset["batches"])
        maps = fit_exits(model, params, data, exits)
    settings = settings_of(model, params, exits, maps, **numbers)
    questions, score = questions_of(model, tokenizer, preset["screens"])
    rows = sweep(
        model,
        settings,
        questions,
        score,
        max_new_tokens=exam.ANSWER_TOKENS,
        rounds=preset["rounds"],
        progress=ProgressLine(),
    )
    timed = time_shape(FLAGS.shape, numbers["keep"], preset["rounds"]) if FLAGS.shape else []
    report = {
        "rows": [dataclasses.asdict(row) for row in rows],
        "shape": [dataclasses.asdict(row) for row in timed],
        "run": {
            "command": " ".join(["python -m experiments.bench_skipping", *sys.argv[1:]]),
            "checkpoint": str(FLAGS.checkpoint or "nano"),
            "exits": exits,
            **preset,
            "seed": FLAGS.seed,
            "seconds": round(time.monotonic() - started, 1),
            "commit": commit(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
            f"{jax.devices()[0].device_kind}",
            "load_average": os.getloadavg()[0],
            "versions": materials.versions(),
        },
    }
    table = text_table(HEADER, [cells(row, rows[0]) for row in rows])
    if timed:
        shown = [[row.name, *cells(row, timed[0])[4:7]] for row in timed]
        table += f"\n\n{text_table([f'{FLAGS.shape}, random weights', *HEADER[4:7]], shown)}"
    write_text(directory / "report.json", json.dumps(report, indent=1) + "\n", overwrite=True)
    write_text(directory / "table.md", table + "\n", overwrite=True)
    write_text(directory / "table.csv", as_csv(rows), overwrite=True)
    skipping_figure(report["rows"], directory / "skipping.png")
    print(f"{table}\n\n{report['run']['seconds']:.0f} s; {report['run']['command']}")


HEADER = [
    "setting",
    "accuracy",
    "lost (points)",
    "agreement",
    "layers",
    "tokens/s",
    "speed-up",
    "published",
]


def floats(name: str) -> list[float]:
    """Numbers of a flag that lists some.

    Raises:
      DataError: one is none.
    """
    try:
        return [float(value) for value in getattr(FLAGS, name) if value]
    except ValueError as error:
        raise DataError(f"--{name}: must list numbers ({error})") from error


def settings_of(
    model: Any,
    params: Any,
    exits: Sequence[int],
    maps: Any,
    thresholds: Sequence[float],
    keep: Sequence[float],
    neuron_thresholds: Sequence[float],
) -> list[Setting]:
    """What is compared: all layers and neurons first.

    Args:
      model: the model.
      params: its parameters.
      exits: layers after which a token may stop; none leaves early exit out.
      maps: fitted for them, or None.
      thresholds: of early exit.
      keep: fractions of neurons.
      neuron_thresholds: of gates.

    Returns:
      The settings.
    """
    found = [Setting("all", params)]
    for kind, fitted in (("exit", None), ("exit+map", maps)):
        if not exits or (kind == "exit+map" and maps is None):
            continue
        for value in thresholds:
            leaves = early_exit(model, exits, value, fitted)
            found.append(Setting(f"{kind} {value:g}", params, leaves, value))
    for value in keep:
        found.append(Setting(f"keep {value:g}", skip_neurons(model, params, value), None, value))
    for value in neuron_thresholds:
        skipping = skip_neurons(model, params, threshold=value)
        found.append(Setting(f"gate {value:g}", skipping, None, value))
    return found


def questions_of(model: Any, tokenizer: Any, count: int) -> tuple[list[dict[str, Any]], Any]:
    """Questions in batches, and the function that scores the answers to them."""
    if model.config.vision is not None:
        items = exam.draw_items(count, FLAGS.seed, FLAGS.digits_dir)
        batches = list(exam.prompt_batches(items, model.config, tokenizer))
        # All are written: a single row must not bring a recording that its prompt has no place for.
        batches = [{**batch, "audio": None} for batch in batches]

        def taps(answers: Sequence[np.ndarray]) -> float:
            tokens = np.concatenate(answers)[: len(items)]
            texts = [exam.answer_text(tokenizer, row, model.config) for row in tokens]
            return float(np.mean(exam.hits(items, texts)))

        return batches, taps
    ids = text_tokenizer.encode_text(tokenizer, materials.split_text(None)[1])
    windows = ids[: len(ids) // PROMPT_TOKENS * PROMPT_TOKENS].reshape(-1, PROMPT_TOKENS)
    batches = [{"tokens": windows[:count]}]
    first: list[np.ndarray] = []

    def agreement(answers: Sequence[np.ndarray]) -> float:
        first.extend(answers[: len(answers) - len(first)])
        return float(np.mean(np.concatenate(answers) == np.concatenate(first)))

    return batches, agreement


def fitting_data(model: Any, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Calibration batches of text and, where the model sees, of screens."""
    data = calibration.text_batches(tokenizer, materials.split_text(None)[0], count)
    if model.config.vision is not None:
        options = (model.config, tokenizer, [], FLAGS.digits_dir, FLAGS.seed)
        data += calibration.screen_batches(*options, count)
    return data


def time_shape(name: str, keep: Sequence[float], rounds: int) -> list[SweepRow]:
    """Times the decoder of a preset with random weights: all of it, half its depth, some neurons.

    Args:
      name: of the preset.
      keep: fractions of neurons.
      rounds: in which they take turns.

    Returns:
      Rows, whose accuracy says nothing.
    """
    model = MultimodalGLM(text_only(configs.preset(name)))
    tokens = np.arange(PROMPT_TOKENS, dtype=np.int32)[None]
    params = jax.jit(model.init)(jax.random.key(FLAGS.seed), tokens[:, :2])["params"]
    half = early_exit(model, [model.config.decoder.num_layers // 2], 0.0)
    settings = [Setting("all", params), Setting("exit at half", params, half)]
    settings += [Setting(f"keep {v:g}", skip_neurons(model, params, v), None, v) for v in keep]
    options = {"max_new_tokens": TIMED_TOKENS, "rounds": rounds}
    return sweep(model, settings, [{"tokens": tokens}], lambda answers: 0.0, **options)


def cells(row: SweepRow, first: SweepRow) -> list[str]:
    """A row as text, in the order of HEADER."""
    return [
        row.name,
        f"{row.accuracy:.1%}",
        f"{100 * (first.accuracy - row.accuracy):.1f}",
        f"{row.agreement:.1%}",
        f"{row.layers:.2f}",
        f"{row.tokens_per_second:.0f}",
        f"{row.speedup:.2f} ({row.low:.2f}-{row.high:.2f})",
        PUBLISHED.get((row.name.split()[0], row.value), ""),
    ]


def as_csv(rows: Sequence[SweepRow]) -> str:
    """All numbers, unrounded."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(SweepRow)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


if __name__ == "__main__":
    define_flags()
    app.run(fail_in_one_line(main))
