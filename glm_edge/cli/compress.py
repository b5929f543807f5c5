"""Compresses any checkpoint that the library loads, and reports the error of every parameter.

    glm-edge compress --checkpoint=DIR --recipe=gptq_4bit --calibration=FILE --text=FILE \\
        --out_dir=DIR

Writes --out_dir/checkpoint (which `glm_edge.load` opens) and --out_dir/report.json. The report
contains bytes, bits and error of every parameter, total bytes before and after, seconds and peak
memory. With --text it also contains perplexity before and after, and the distance between the two
models. Other commands accept --out_dir as their --checkpoint. Tokenizer, chat template and
processor files are copied to the new checkpoint.

--recipe is a name or a JSON file (`glm_edge.to_json` writes one). A recipe of `quantize.*`
transforms processes one layer at a time, so the model need not fit in memory. After an
interruption, the same command resumes. Other recipes (pruning, distillation) load the complete
model and compute in float32; floating-point parameters are then stored in the source's type again.

--calibration is a UTF-8 text file, or an .npz file of arrays `tokens` [N, T] and, where the model
has encoders, `images` [N, ...] and `audio` [N, ...]; or a comma-separated list of such files. Texts
are cut into --sequences windows of --length tokens, an equal number per file. Each file is a
domain: with several, `quantize.gptq` and `prune.sparsegpt` lose less on texts of other domains. A
model with encoders rejects calibration batches without images or audio, unless --without names
them. On two cores, a checkpoint of 1.5 billion parameters takes 13 s by rounding to nearest, and
about 28 minutes by GPTQ.
"""

import dataclasses
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

import glm_edge as ge
from glm_edge.cli import calibration, corpora
from glm_edge.cli.checkpoints import CHECKPOINT_HELP, checkpoint_of
from glm_edge.cli.console import print_table, progress, refuse_arguments
from glm_edge.cli.in_memory import as_stored, load_wide
from glm_edge.cli.loss import text_loss
from glm_edge.cli.run import run_of
from glm_edge.compress.domains import KEY as DOMAIN
from glm_edge.compress.layerwise.stream import compress_checkpoint, is_streamable
from glm_edge.compress.report import Report
from glm_edge.compress.transform import Transform
from glm_edge.writers import check_target

FLAGS = flags.FLAGS
Batches = list[dict[str, Any]]

flags.disclaim_key_flags()


def define_flags() -> None:
    """Define the command's flags."""
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_string("recipe", "phone", f"JSON file, or one of {', '.join(ge.recipes.NAMED)}.")
    flags.DEFINE_list("calibration", [], "UTF-8 text files, or .npz files of batches.")
    flags.DEFINE_integer("sequences", 64, "Number of windows of calibration text, of all files.", 1)
    flags.DEFINE_integer("length", 256, "Tokens per window, of calibration and of --text.", 2)
    flags.DEFINE_integer("batch", 4, "Windows per batch.", 1)
    flags.DEFINE_list("without", [], "Inputs that calibration may omit: images, audio.")
    flags.DEFINE_string(
        "text", None, "UTF-8 file on which perplexity is measured before and after."
    )
    flags.DEFINE_integer("text_tokens", 20000, "Maximum number of tokens of --text to score.", 2)
    flags.DEFINE_integer("seed", 0, "Seed of the transforms' random values.")
    flags.DEFINE_enum(
        "compute",
        "float32",
        ["float32", "bfloat16"],
        "Arithmetic of calibration; bfloat16 is faster.",
    )
    flags.DEFINE_string(
        "out_dir", None, "Output directory of checkpoint and report.", required=True
    )
    flags.DEFINE_bool("overwrite", False, "Replace an existing checkpoint in --out_dir.")


def main(argv: Sequence[str], draw: Callable[[Path], Batches] | None = None) -> None:
    """Run the command.

    Args:
      argv: the program's name.
      draw: function that returns further calibration batches for a checkpoint, or None.
    """
    refuse_arguments(argv)
    started = time.monotonic()
    source = checkpoint_of(FLAGS.checkpoint)
    recipe = ge.recipes.find(FLAGS.recipe)
    out, rng = Path(FLAGS.out_dir), jax.random.key(FLAGS.seed)
    target = out / "checkpoint"
    check_target(target, FLAGS.overwrite)
    corpora.check_absent(out / "report.json", FLAGS.overwrite)
    windows = read_windows(source) if FLAGS.text else None
    batches = (read_calibration(source) + (draw(source) if draw else [])) or None
    if is_streamable(recipe):
        report = compress_checkpoint(
            source,
            target,
            recipe,
            batches,
            rng,
            progress(),
            FLAGS.without,
            FLAGS.overwrite,
            compute=FLAGS.compute,
        )
    else:
        model, params, stored = load_wide(source)
        model, params, report = recipe(
            model, params, batches, rng, progress(), without=FLAGS.without
        )
        params, report = as_stored(params, stored, report)
        ge.save(model, params, target, "safetensors", FLAGS.overwrite, source=source)
    spent = time.monotonic() - started
    summary = summarize(source, target, recipe, report, spent)
    if windows is not None:
        summary["text"] = measure_text(source, target, windows)
    content = json.dumps(summary, indent=1) + "\n"
    corpora.write_text(out / "report.json", content, FLAGS.overwrite)
    show(summary)


def read_calibration(source: Path) -> Batches:
    """Read the calibration batches that the flags name; return none without --calibration."""
    paths = FLAGS.calibration
    return [
        {DOMAIN: Path(path).stem, **batch}
        for path in paths
        for batch in calibration.from_file(
            path,
            None if path.endswith(".npz") else ge.load_tokenizer(source),
            max(1, FLAGS.sequences // len(paths)),
            FLAGS.length,
            FLAGS.batch,
        )
    ]


def summarize(
    source: Path, target: Path, recipe: Transform, report: Report, seconds: float
) -> dict[str, Any]:
    """Return the fields of report.json, except those of --text."""
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
        "run": run_of(FLAGS.seed),
    }


def read_windows(source: Path) -> corpora.Windows:
    """Cut --text into evaluation windows."""
    tokenizer = ge.load_tokenizer(source)
    ids = corpora.encode_text(tokenizer, corpora.read_text(FLAGS.text))
    return corpora.windows(ids[: FLAGS.text_tokens], corpora.token_bytes(tokenizer), FLAGS.length)


def measure_text(source: Path, target: Path, windows: corpora.Windows) -> dict[str, Any]:
    """Measure the perplexity of both models, and the distance between their predictions."""
    dense = ge.load(source)
    before = text_loss(*dense, windows)
    after = text_loss(*ge.load(target), windows, dense)
    return {
        "tokens": windows.num_scored,
        "before": before,
        "after": after,
        "relative_increase": after["perplexity"] / before["perplexity"] - 1.0,
    }


def show(summary: dict[str, Any]) -> None:
    """Print the totals and notes."""
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
    for note in summary["notes"]:
        print(f"note: {note}")
