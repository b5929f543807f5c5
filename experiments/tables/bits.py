"""Table (h): loss by number of bits.

    python -m experiments.tables.bits --preset=quick
    python -m experiments.tables.bits --preset=full --text=FILE --digits_dir=MNIST --speech_dir=FSDD

The claim: 8 bits lose 2 %, 4 bits 10 %, 2 bits over 20 %; it does not name the measure. The
matrices that match --where in the shipped model (or --checkpoint) are rounded to 8, 4, 3 and 2
bits, in groups of 32 columns and, with --preset=full, also per channel (one scale per row). Each is
rounded to nearest (`rtn`) and by `gptq`, calibrated on text and screens that differ from those of
the measurement. Two losses are compared with the claim, both relative to the model before rounding:
the increase of perplexity on held-out text, and the decrease of taps in the box. `stored` includes
scales. The same float32 programs run all models.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import numpy as np
from absl import flags

from experiments.common import eval_data, stage_eval, tap_eval
from experiments.tables import table
from experiments.tables.table import Row
from glm_edge import params as boxes
from glm_edge.cli.checkpoints import CHECKPOINT_HELP
from glm_edge.cli.console import bar, launch
from glm_edge.cli.loss import text_loss
from glm_edge.compress import quantize
from glm_edge.compress.transform import Transform

FLAGS = flags.FLAGS
NAME = "bits"
CLAIMS = {8: 2.0, 4: 10.0, 2: 20.0}
ELSEWHERE = "claim on a different model"
NOTES = {2: f"claimed: over 20 %; {ELSEWHERE}"}
SIZES = {
    "quick": {"screens": 32, "text_tokens": 4_000, "batches": 2, "groups": [32]},
    "full": {"screens": 500, "text_tokens": 60_000, "batches": 16, "groups": [32, 0]},
}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_string("where", "^decoder/", "Regular expression of the matrices to round.")
    flags.DEFINE_list("bits", ["8", "4", "3", "2"], "Of a weight.")
    flags.DEFINE_list(
        "groups", None, "Group sizes in columns, 0 for one scale per row; default: the preset's."
    )
    flags.DEFINE_string(
        "text", None, "UTF-8 file: a third for calibration, the rest for the measurement."
    )
    flags.DEFINE_string(
        "digits_dir",
        None,
        "Folder of MNIST files for the keys of screens; default: scikit-learn's digits.",
    )
    flags.DEFINE_string("speech_dir", None, "Folder of spoken digits; default: synthetic voices.")
    flags.DEFINE_list("speakers", [], "Speakers of --speech_dir to use; default: all.")
    flags.DEFINE_integer(
        "screens", None, "Number of questions of each kind; default: the preset's.", 1
    )
    flags.DEFINE_integer(
        "text_tokens", None, "Maximum number of tokens to score; default: the preset's.", 512
    )


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    checkpoint, model, params = stage_eval.opened(FLAGS.checkpoint)
    amount = SIZES[FLAGS.preset]
    data = eval_data.gather(
        model.config,
        checkpoint,
        FLAGS.text,
        FLAGS.digits_dir,
        FLAGS.speech_dir,
        FLAGS.speakers,
        FLAGS.screens or amount["screens"],
        FLAGS.text_tokens or amount["text_tokens"],
        FLAGS.seed,
        amount["batches"],
    )
    measurements = {"float32": measured(model, params, data, FLAGS.where)}
    groups = [int(size) for size in FLAGS.groups or amount["groups"]]
    recipes_by_name = recipes([int(width) for width in FLAGS.bits], groups)
    for name, transform in bar("rounding methods")(recipes_by_name.items()):
        measurements[name] = measured(
            model, rounded(transform, model, params, data.calibration), data, FLAGS.where
        )
    table.publish(
        NAME,
        "Bits against loss: claimed 2 % at 8 bits, 10 % at 4, over 20 % at 2",
        rows_of(measurements),
        ("checkpoint", "where", "bits", "groups", "text", "digits_dir", "speech_dir", "screens",
         "text_tokens"),
        {"settings": measurements, "notes": data.notes, "tokens": data.windows.num_scored},
    )  # fmt: skip


def recipes(bits: Sequence[int], groups: Sequence[int]) -> dict[str, Transform]:
    """List rounding methods by name, such as `4 bits, gptq, groups of 32`."""
    measurements = {}
    for width in bits:
        for size in groups:
            label = f"groups of {size}" if size else "per channel"
            format = f"int{width}-g{size}" if size else f"int{width}"
            measurements[f"{width} bits, rtn, {label}"] = quantize.rtn(format, where=FLAGS.where)
            measurements[f"{width} bits, gptq, {label}"] = quantize.gptq(format, where=FLAGS.where)
    return measurements


def rounded(transform: Transform, model: Any, params: Any, batches: Sequence[Any]) -> Any:
    """Quantize parameters by a transform with the available calibration."""
    inputs = {name for batch in batches for name in batch}
    lacking = [name for name in ("images", "audio") if name not in inputs]
    key = jax.random.key(FLAGS.seed)
    return transform(model, params, batches, key, without=lacking)[1]


def measured(
    model: Any, params: Any, data: eval_data.EvalData, where: str
) -> dict[str, float | None]:
    """Measure perplexity, taps in the box in percent by kind of question, and bits per weight.

    Args:
      model: a GLM.
      params: arrays or boxes; boxes are made dense, so that one program runs all models.
      data: data of the measurement.
      where: pattern of the matrices whose bits are counted.

    Returns:
      `perplexity`, `bits stored`, and, if available, `taps, written` and `taps, spoken`.
    """
    leaves = dict(boxes.path_items(params))
    chosen = {path: leaves[path] for path in boxes.select(params, where)}
    bits = 8 * boxes.stored_bytes(chosen) / boxes.count(chosen)
    dense = jax.tree.map(boxes.dense, params, is_leaf=boxes.is_box)
    measurements = {
        "bits stored": bits,
        "perplexity": text_loss(model, dense, data.windows)["perplexity"],
    }
    for kind, items in (("written", data.written), ("spoken", data.spoken)):
        if items:
            texts = tap_eval.answers(model, dense, data.tokenizer, items)
            measurements[f"taps, {kind}"] = 100.0 * float(np.mean(tap_eval.hits(items, texts)))
    return measurements


def rows_of(measurements: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Return the table's rows: float32, and the loss of each recipe.

    Args:
      measurements: results of `measured` by name: `float32` and the names of `recipes`.

    Returns:
      The rows.
    """
    base = measurements["float32"]
    rows = [Row("perplexity, float32", "perplexity", None, base["perplexity"])]
    kinds = [kind for kind in base if kind.startswith("taps")]
    rows += [Row(f"{kind}, float32", "% of taps", None, base[kind]) for kind in kinds]
    for name, now in measurements.items():
        if name == "float32":
            continue
        bits = int(name.split()[0])
        claim = CLAIMS.get(bits)
        note = NOTES.get(bits, ELSEWHERE) if claim else ""
        growth = 100.0 * (now["perplexity"] / base["perplexity"] - 1.0)
        rows.append(Row(f"{name}: perplexity grows", "% lost", claim, growth, note=note))
        for kind in kinds:
            lost = 100.0 * (1.0 - now[kind] / base[kind]) if base[kind] else None
            rows.append(Row(f"{name}: {kind}", "% lost", claim, lost, note=note))
        rows.append(Row(f"{name}: stored", "bits a weight", None, now["bits stored"]))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
