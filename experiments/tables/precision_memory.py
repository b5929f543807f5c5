"""Table (i): memory saved by float16, int8 and mixed precision.

    python -m experiments.tables.precision_memory --preset=quick

The claim: 50, 75 and 75 %. The shipped model (or --checkpoint) is rounded in four ways: everything
to bfloat16; int8 per channel; int8 with float16 embeddings; and int4 in groups of 32 for the
decoder with int8 for the rest. The claim does not define mixed precision, so the last two are
compared with it. `stored` counts every stored array, including scales. `running` is the peak memory
of the compiled forward pass over --tokens tokens as XLA reports it: parameters, inputs, outputs and
temporaries.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

import glm_edge as ge
from experiments.common import stage_eval
from experiments.tables import table
from experiments.tables.table import Row
from glm_edge import params as boxes
from glm_edge.cli.checkpoints import CHECKPOINT_HELP
from glm_edge.cli.console import bar, launch
from glm_edge.compress import quantize
from glm_edge.compress.transform import Transform

FLAGS = flags.FLAGS
NAME = "precision_memory"
TOKENS = {"quick": (128,), "full": (1, 128, 512)}
CLAIMS = {"bfloat16": 50.0, "int8": 75.0, "int8 and float16": 75.0, "int4 and int8": 75.0}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_string("checkpoint", None, CHECKPOINT_HELP)
    flags.DEFINE_list(
        "tokens",
        None,
        "Lengths of the forward pass in tokens; default: 128, and also 1 and 512 for full.",
    )


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    _, model, params = stage_eval.opened(FLAGS.checkpoint)
    lengths = [int(n) for n in FLAGS.tokens or TOKENS[FLAGS.preset]]
    sizes_by_form = {"float32": sizes(model, params, lengths)}
    for name, recipe in bar("precisions")(recipes().items()):
        sizes_by_form[name] = sizes(model, recipe(model, params)[1], lengths)
    table.publish(
        NAME,
        "Memory saved by precision: claimed 50 % (float16), 75 % (int8), 75 % (mixed)",
        rows_of(sizes_by_form),
        ("checkpoint", "tokens"),
        {"bytes": sizes_by_form, "parameters": boxes.count(params)},
    )


def recipes() -> dict[str, Transform]:
    """List the recipes by name."""
    return {
        "bfloat16": quantize.rtn("bfloat16"),
        "int8": quantize.rtn("int8"),
        "int8 and float16": ge.recipes.named("int8_float16_embeddings"),
        "int4 and int8": ge.recipes.named("phone"),
    }


def sizes(model: Any, params: Any, lengths: Sequence[int]) -> dict[str, int]:
    """Measure stored bytes, and peak bytes of a forward pass by its length.

    Args:
      model: a GLM.
      params: its parameters, arrays or boxes.
      lengths: numbers of tokens of one row.

    Returns:
      `stored`, and `running <length>` for each length.
    """
    sizes_by_form = {"stored": boxes.stored_bytes(params)}
    for length in lengths:
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
        memory = run.lower(params, tokens).compile().memory_analysis()
        sizes_by_form[f"running {length}"] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return sizes_by_form


def rows_of(sizes_by_form: dict[str, dict[str, int]]) -> list[Row]:
    """Return the table's rows: bytes of float32, and the savings of other precisions."""
    base = sizes_by_form["float32"]
    rows = [Row(f"{quantity}, float32", "MB", None, size / 1e6) for quantity, size in base.items()]
    for quantity in base:
        for name, claim in CLAIMS.items():
            saved = 100.0 * (1.0 - sizes_by_form[name][quantity] / base[quantity])
            note = "every array, scales included"
            if quantity != "stored":
                note = f"forward pass, {quantity.split()[1]} token(s), by XLA"
            note += "; claim on a different model and device"
            label = quantity.split()[0]
            rows.append(Row(f"{label}, {name}", "% saved", claim, saved, note=note))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
