"""Compresses any checkpoint that the library loads, and says what that did to every parameter.

    python -m experiments.compress --checkpoint=DIR --recipe=gptq_4bit --calibration=FILE \\
        --text=FILE --out_dir=DIR

writes --out_dir/checkpoint (which `glm_edge.load` opens) and --out_dir/report.json: bytes, bits and
error of every parameter, bytes before and after, seconds and peak memory, and, with --text,
perplexity before and after and the distance between the two models.

--recipe is a name or a JSON file (`glm_edge.to_json` writes one). A recipe of `quantize.*`
transforms is carried out one layer at a time, so the model need not fit in memory; killed, the same
command takes it up again. Other recipes (pruning, distillation) load the whole model.

--calibration is a UTF-8 text file, cut into --sequences windows of --length tokens, or an .npz file
of arrays `tokens` [N, T] and, where the model has encoders, `images` [N, ...] and `audio` [N, ...].
A model that reads images or audio refuses calibration without them unless --without says so. The
shipped model takes --calibration_screens drawn phone screens in their place.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")
# Threads of OpenBLAS, which factors Gram matrices, wait for each other by spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
from absl import app, flags

import glm_edge as ge
from experiments import calibration as calibration_lib
from experiments import exam, materials
from experiments.console import fail_in_one_line, print_table, refuse_arguments
from experiments.text import corpora
from experiments.text import tokenizer as text_tokenizer
from glm_edge.compress.progress import ProgressLine
from glm_edge.compress.report import Report
from glm_edge.compress.stream import compress_checkpoint, is_streamable
from glm_edge.compress.transform import Transform
from glm_edge.errors import CheckpointError

FLAGS = flags.FLAGS
EXTRAS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def define_flags() -> None:
    """Defines this script's flags."""
    flags.DEFINE_string("checkpoint", None, "Directory to compress; default: shipped nano.")
    flags.DEFINE_string("recipe", "phone", f"JSON file, or one of {', '.join(ge.recipes.NAMED)}.")
    flags.DEFINE_string("calibration", None, "Text file, or .npz of batches.")
    flags.DEFINE_integer("calibration_screens", 0, "Batches of drawn phone screens (nano).", 0)
    flags.DEFINE_integer("sequences", 64, "Windows of calibration text.", 1)
    flags.DEFINE_integer("length", 256, "Tokens of a window, of calibration and of --text.", 2)
    flags.DEFINE_integer("batch", 4, "Windows that run together.", 1)
    flags.DEFINE_list("without", [], "Inputs that calibration is known to lack: images, audio.")
    flags.DEFINE_string("text", None, "Text file to measure perplexity on, before and after.")
    flags.DEFINE_integer("text_tokens", 20000, "At most this many tokens of it are scored.", 2)
    flags.DEFINE_integer("seed", 0, "Seed of what transforms draw.")
    flags.DEFINE_enum(
        "compute",
        "float32",
        ["float32", "bfloat16"],
        "Products of calibration; bfloat16 is faster.",
    )
    flags.DEFINE_string("out_dir", None, "Directory for checkpoint and report.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace a checkpoint that lies in --out_dir.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    started = time.monotonic()
    source = materials.checkpoint_of(FLAGS.checkpoint)
    recipe = ge.recipes.find(FLAGS.recipe)
    out, rng = Path(FLAGS.out_dir), jax.random.key(FLAGS.seed)
    target = out / "checkpoint"
    batches = read_calibration(source)
    extras = {name: source / name for name in EXTRAS if (source / name).is_file()}
    if is_streamable(recipe):
        report = compress_checkpoint(
            source,
            target,
            recipe,
            batches,
            rng,
            ProgressLine(),
            FLAGS.without,
            FLAGS.overwrite,
            extras,
            FLAGS.compute,
        )
    else:
        model, params = ge.load(source, dtype="float32")
        model, params, report = recipe(
            model, params, batches, rng, ProgressLine(), without=FLAGS.without
        )
        ge.save(model, params, target, "safetensors", FLAGS.overwrite, extras)
    spent = time.monotonic() - started
    summary = summarize(source, target, recipe, report, spent)
    if FLAGS.text:
        summary["text"] = measure_text(source, target)
    corpora.write_text(out / "report.json", json.dumps(summary, indent=1) + "\n", overwrite=True)
    show(summary)


def read_calibration(source: Path) -> list[dict[str, Any]] | None:
    """Calibration batches that the flags name, or None."""
    found = []
    if FLAGS.calibration:
        found += calibration_lib.from_file(
            FLAGS.calibration,
            None if FLAGS.calibration.endswith(".npz") else ge.load_tokenizer(source),
            FLAGS.sequences,
            FLAGS.length,
            FLAGS.batch,
        )
    if FLAGS.calibration_screens:
        tokenizer = ge.load_tokenizer(source)
        config = ge.build(source).config
        if getattr(config, "vision", None) is None:
            raise CheckpointError(f"{source}: --calibration_screens needs a model with vision")
        learned, _, notes = materials.recordings(None, [], FLAGS.seed)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        found += calibration_lib.screen_batches(
            config, tokenizer, learned, None, FLAGS.seed, FLAGS.calibration_screens
        )
    return found or None


def summarize(
    source: Path, target: Path, recipe: Transform, report: Report, seconds: float
) -> dict[str, Any]:
    """What report.json holds, without the text."""
    return {
        "checkpoint": source.name,
        "recipe": json.loads(ge.to_json(recipe)),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "bits_per_weight": report.total.bits,
        "file_bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
        "seconds": round(seconds, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "parameters": [dataclasses.asdict(row) for row in report.rows],
        "notes": list(report.notes),
        "run": {
            "command": " ".join(["python -m experiments.compress", *sys.argv[1:]]),
            "seed": FLAGS.seed,
            "versions": materials.versions(),
        },
    }


def measure_text(source: Path, target: Path) -> dict[str, Any]:
    """Perplexity of both models, and how far their predictions differ."""
    tokenizer = ge.load_tokenizer(source)
    ids = text_tokenizer.encode_text(tokenizer, corpora.read_text(FLAGS.text))
    windows = corpora.windows(
        ids[: FLAGS.text_tokens], text_tokenizer.token_bytes(tokenizer), FLAGS.length
    )
    dense = ge.load(source)
    before = exam.text_loss(*dense, windows)
    after = exam.text_loss(*ge.load(target), windows, dense)
    return {
        "tokens": windows.num_scored,
        "before": before,
        "after": after,
        "relative_increase": after["perplexity"] / before["perplexity"] - 1.0,
    }


def show(summary: dict[str, Any]) -> None:
    """Prints the totals."""
    before, after = summary["bytes_before"], summary["bytes_after"]
    rows = [
        ["bytes before", f"{before:,}"],
        ["bytes after", f"{after:,} ({after / before:.1%})"],
        ["bits per weight", f"{summary['bits_per_weight']:.3f}"],
        ["seconds", f"{summary['seconds']:.1f}"],
        ["peak RSS", f"{summary['peak_rss_bytes'] / 1e9:.2f} GB"],
    ]
    text = summary.get("text")
    if text:
        rows += [
            ["perplexity before", f"{text['before']['perplexity']:.3f}"],
            ["perplexity after", f"{text['after']['perplexity']:.3f}"],
            ["relative increase", f"{text['relative_increase']:+.2%}"],
            ["KL (nats)", f"{text['after']['kl']:.4f}"],
            ["top-1 flips", f"{text['after']['flips']:.2%}"],
        ]
    print_table(["quantity", "value"], rows)


if __name__ == "__main__":
    define_flags()
    app.run(fail_in_one_line(main))
