"""Table (l): the shipped model, compressed and uncompressed, as files in LiteRT.

    python -m experiments.tables.lightweight --preset=quick
    python -m experiments.tables.lightweight --preset=full --digits_dir=MNIST --speech_dir=FSDD \\
        --speakers=lucas

The claim: 85 ms, 86.2 % and 5.1 GB for the lightweight model, compared with 210 ms, 91.7 % and 32.4
GB for the native one, on an unnamed phone and data set. `native` is the shipped model (or
--checkpoint) in float32. `lightweight` is the result of --recipe: a quarter of the heads and 30 %
of the neurons removed, healed by distillation, rounded to int4 and int8. Both are exported, and
their files are measured. Accuracy is the fraction of taps inside their box on unseen screens.
Latency covers a screenshot, a prompt of 128 tokens including the image, and the tokens of one tap.
Memory is the stored bytes, the file size, and the peak of a process that runs only this model.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import glm_edge as ge
from experiments.bench.runtimes.child import EngineProcess, Spec, spec_of
from experiments.common import eval_data, exported_eval, stage_eval, tap_eval
from experiments.common.child import ChildError
from experiments.nano.phone_screens import metrics
from experiments.quickstart import compressed
from experiments.tables import measure, table
from experiments.tables.table import PHONE, Row
from glm_edge import params as boxes
from glm_edge.cli.checkpoints import CHECKPOINT_HELP
from glm_edge.cli.console import launch
from glm_edge.cli.loss import WINDOW
from glm_edge.errors import DataError

FLAGS = flags.FLAGS
NAME = "lightweight"
KINDS = ("native", "lightweight")
CLAIMED_MS, CLAIMED_PERCENT, CLAIMED_GB = (210.0, 85.0), (91.7, 86.2), (32.4, 5.1)
SCREENS = {"quick": 100, "full": 1000}
DISTILL_STEPS = {"quick": 50, "full": None}
ROUNDS = {"quick": 9, "full": 40}
PROMPT, DECODED = 128, 20
ELSEWHERE = "; claim on a different device, model and data"


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_string("recipe", "quickstart", "Name of a recipe, or a JSON file.")
    flags.DEFINE_string(
        "digits_dir",
        None,
        "Folder of MNIST files for the keys of screens; default: scikit-learn's digits.",
    )
    flags.DEFINE_string(
        "speech_dir",
        None,
        "Folder of spoken digits for the measurement; default: synthetic voices.",
    )
    flags.DEFINE_list("speakers", [], "Speakers of --speech_dir to use; default: all.")
    flags.DEFINE_integer(
        "screens", None, "Number of questions of each kind; default: 100, or 1000 for full.", 1
    )
    flags.DEFINE_integer(
        "distill_steps", None, "Distillation steps; default: 50, or the recipe's for full.", 1
    )
    flags.DEFINE_integer("answer_tokens", 5, "Number of tokens of a tap, including its end.", 1)
    flags.DEFINE_integer(
        "rounds", None, "Number of measurements of each; default: 9, or 40 for full.", 1
    )
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads.", 1)


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    recipe = ge.recipes.find(FLAGS.recipe)
    checkpoint, model, params = stage_eval.opened(FLAGS.checkpoint)
    evaluation = eval_data.gather(
        model.config,
        checkpoint,
        text=None,
        digits_dir=FLAGS.digits_dir,
        speech_dir=FLAGS.speech_dir,
        speakers=FLAGS.speakers,
        screens=FLAGS.screens or SCREENS[FLAGS.preset],
        text_tokens=WINDOW,
        seed=FLAGS.seed,
        calibration_batches=96,
    )
    if not evaluation.written:
        raise DataError(f"{checkpoint}: measuring taps on screens needs a model with vision")
    for note in evaluation.notes:
        print(f"note: {note}", file=sys.stderr)
    steps = FLAGS.distill_steps or DISTILL_STEPS[FLAGS.preset]
    for _, *stage in compressed(recipe, (model, params), evaluation.calibration, FLAGS.seed, steps):
        small = stage
    rounds = FLAGS.rounds or ROUNDS[FLAGS.preset]
    with tempfile.TemporaryDirectory() as directory:
        files = {
            kind: write(*side, Path(directory) / f"{kind}.tflite")
            for kind, side in zip(KINDS, ((model, params), small), strict=True)
        }
        hits = {kind: taps(file, evaluation) for kind, file in files.items()}
        runs = timed(files, rounds, FLAGS.threads, FLAGS.answer_tokens)
    sizes = {
        kind: {
            "parameters": boxes.count(file.params),
            "stored": boxes.stored_bytes(file.params),
            "file": file.file_bytes,
        }
        for kind, file in files.items()
    }
    table.publish(
        NAME,
        "Lightweight compared with native: claimed 85 ms, 86.2 %, 5.1 GB against 210 ms, 91.7 %, "
        "32.4 GB",
        rows_of(hits, sizes, runs),
        (
            "checkpoint", "recipe", "digits_dir", "speech_dir", "speakers", "screens",
            "distill_steps", "answer_tokens", "rounds", "threads",
        ),
        {"hits": hits, "sizes": sizes, "runs": runs},
    )  # fmt: skip


def write(model: Any, params: Any, path: Path) -> Any:
    """Export a model for prompts of up to `PROMPT` tokens."""
    slots = exported_eval.cache_slots(model.config.decoder.max_position_embeddings)
    return ge.export.tflite(model, params, path, prefill_lengths=(PROMPT,), cache_slots=slots)


def taps(file: Any, evaluation: eval_data.EvalData) -> dict[str, list[float]]:
    """Return the hits of a file's taps, for written and spoken questions."""
    phone = ge.export.LiteRTModel(file.path)
    asked = {"written": evaluation.written, "spoken": evaluation.spoken}
    return {
        kind: tap_eval.hits(
            items,
            exported_eval.answers(
                phone, evaluation.tokenizer, items, f"{Path(file.path).stem}, {kind}"
            ),
        )
        for kind, items in asked.items()
        if items
    }


def timed(
    files: dict[str, Any], rounds: int, threads: int, answer_tokens: int
) -> dict[str, dict[str, Any]]:
    """Run every file in a separate process, in turns; an earlier process has packed its weights.

    Args:
      files: exported models by kind.
      rounds: number of measurements of each.
      threads: number of LiteRT threads.
      answer_tokens: number of tokens decoded after an image and its prompt.

    Returns:
      By kind: `load_seconds`; `actions`, seconds of image, prefill and decoding in each round;
      `steps`, median seconds of a decoding step in each round; `baseline_rss_bytes` of a process
      without a model, and `peak_rss_bytes`.

    Raises:
      DataError: LiteRT cannot run a file.
    """
    files_log: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        resident = {}
        try:
            for kind, file in files.items():
                spec = engine_of(kind, file, threads)
                with contextlib.closing(EngineProcess(spec)) as packing:
                    packing.load()
                resident[kind] = EngineProcess(spec)
                stack.callback(resident[kind].close)
                loaded = resident[kind].load()
                resident[kind].action(PROMPT, answer_tokens)
                files_log[kind] = {
                    "load_seconds": loaded["seconds"],
                    "baseline_rss_bytes": loaded["baseline_rss_bytes"],
                    "actions": [],
                    "steps": [],
                }
            for turn in range(rounds):
                for kind in list(files) if turn % 2 else list(files)[::-1]:
                    time.sleep(measure.PAUSE_S)
                    files_log[kind]["actions"].append(resident[kind].action(PROMPT, answer_tokens))
                    step = resident[kind].burst("decode", PROMPT, DECODED, pause_s=0.0)
                    files_log[kind]["steps"].append(step)
            for kind, engine in resident.items():
                files_log[kind]["peak_rss_bytes"] = engine.peak_bytes()
        except ChildError as error:
            raise DataError(f"LiteRT cannot run a file: {error}") from error
    return files_log


def engine_of(kind: str, file: Any, threads: int) -> Spec:
    """Return the engine spec of a file."""
    config, path = file.model.config, Path(file.path)
    return spec_of(
        kind,
        kind,
        path.resolve(),
        config,
        exported_eval.cache_slots(config.decoder.max_position_embeddings),
        contexts=(PROMPT,),
        lengths=(PROMPT,),
        threads=threads,
        options={
            "weight_cache": str(path.parent / "packed"),
            "prefix": (PROMPT - config.vision.num_tokens) // 2,
        },
    )


def rows_of(
    hits: dict[str, dict[str, list[float]]],
    sizes: dict[str, dict[str, int]],
    runs: dict[str, dict[str, Any]],
) -> list[Row]:
    """Return the table's rows.

    Args:
      hits: 1 or 0 per tap, by kind of model and of question.
      sizes: parameters and bytes by kind.
      runs: results of `timed`.
    """
    totals = {kind: [sum(run.values()) for run in runs[kind]["actions"]] for kind in KINDS}
    steps = {kind: runs[kind]["steps"] for kind in KINDS}
    rows = []
    for name, seconds, claims in (("a tap", totals, CLAIMED_MS), ("a token", steps, None)):
        for index, kind in enumerate(KINDS):
            claim, note = (claims[index], "LiteRT" + ELSEWHERE) if claims else (None, "LiteRT")
            millis = measure.median_ms(seconds[kind])
            rows.append(Row(f"latency of {name}, {kind}", "ms", claim, millis, note=note))
        low, middle, high = measure.ratio_quartiles(seconds["lightweight"], seconds["native"])
        claim = claims[1] / claims[0] if claims else None
        note = f"quartiles {low:.2f} - {high:.2f}"
        title = f"latency of {name}, lightweight over native"
        rows.append(Row(title, "x", claim, middle, note=note))
    for question in hits["native"]:
        # The claim does not name its measure of accuracy; the written questions are compared with
        # it.
        claims = CLAIMED_PERCENT if question == "written" else (None, None)
        files_log = [hits[kind][question] for kind in KINDS]
        for kind, claim, values in zip(KINDS, claims, files_log, strict=True):
            rate = metrics.wilson(int(sum(values)), len(values))
            note = f"{rate.count} screens, {table.interval(rate)}" + (ELSEWHERE if claim else "")
            title = f"taps in their box, {question}, {kind}"
            rows.append(Row(title, "%", claim, 100.0 * rate.value, note=note))
        rate = metrics.paired_difference(files_log[1], files_log[0])
        claim = claims[0] - claims[1] if question == "written" else None
        note = f"paired by screen, {table.interval(rate)}"
        rows.append(Row(f"taps lost, {question}", "points", claim, 100.0 * rate.value, note=note))
    rows += [
        Row(f"parameters, {kind}", "M", None, sizes[kind]["parameters"] / 1e6) for kind in KINDS
    ]
    peaks = {kind: runs[kind]["peak_rss_bytes"] for kind in KINDS}
    above = {kind: peaks[kind] - runs[kind]["baseline_rss_bytes"] for kind in KINDS}
    notes = {
        "stored": "parameters, scales included",
        "file": "all signatures",
        "peak of the process": "resident; Python and LiteRT included",
        "peak above an empty runtime": "resident; weights as LiteRT packs them, and its buffers",
    }
    memory = {
        "stored": {kind: sizes[kind]["stored"] for kind in KINDS},
        "file": {kind: sizes[kind]["file"] for kind in KINDS},
        "peak of the process": peaks,
        "peak above an empty runtime": above,
    }
    for name, numbers in memory.items():
        for kind in KINDS:
            rows.append(Row(f"{name}, {kind}", "MB", None, numbers[kind] / 1e6, note=notes[name]))
        factor = numbers["lightweight"] / numbers["native"]
        claim = CLAIMED_GB[1] / CLAIMED_GB[0]
        rows.append(Row(f"{name}, lightweight over native", "x", claim, factor))
    for kind, claim in zip(KINDS, CLAIMED_GB, strict=True):
        rows.append(Row(f"memory of the claim's model, {kind}", "GB", claim, None, note=PHONE))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
