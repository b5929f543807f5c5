"""Table (j): speed-up by precision in LiteRT.

    python -m experiments.tables.precision_speed --preset=quick
    python -m experiments.tables.precision_speed --preset=full

The claim: int8 is 2.5 to 3.5 times as fast as float32, int4 3.8 to 5.0 times. A decoder of --shape
with random weights (outputs have no meaning) is written as a `.tflite` file for each of --forms:
`mobile`, or a quarter of its layers and of its vocabulary. LiteRT loads each file in a separate
process, and all alternate: bursts of --steps decoding steps at context --context, and a prompt of
--prompt tokens. A step is timed from the token to its logits, a prompt from its tokens to the
logits of the last one. Speed-ups are medians over pairs of bursts of one round. The note states the
claim, and `ratio` is relative to its lower end.

int4 is per channel, int4-g32 in groups of 32 columns. LiteRT multiplies int8 and int4 weights with
rows of inputs that it rounds to int8 at run time. Embedding and head are rounded like the other
matrices.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import glm_edge as ge
from experiments.bench.export import decoder_of
from experiments.bench.runtimes import child as children
from experiments.bench.runtimes import compare, random_model
from experiments.bench.runtimes.child import EngineProcess, Spec
from experiments.bench.runtimes.compare import Burst, Bursts, Quartiles
from experiments.bench.runtimes.engine import Task
from experiments.bench.runtimes.litert import weight_bytes
from experiments.common.child import ChildError
from experiments.tables import table
from experiments.tables.table import Row
from glm_edge.cli.console import bar, launch
from glm_edge.configs import GLMConfig
from glm_edge.errors import DataError, ExportError

FLAGS = flags.FLAGS
NAME = "precision_speed"
BASE = "float32"
# Bits of a form, and its claimed speed-up over float32.
FORMS = {
    BASE: (32, None),
    "float16": (16, None),
    "int8": (8, (2.5, 3.5)),
    "int4": (4, (3.8, 5.0)),
    "int4-g32": (4, (3.8, 5.0)),
    "int2": (2, None),
}
SHAPES = {"quick": "mobile_quarter", "full": "mobile"}
ROUNDS = {"quick": 9, "full": 30}
PHASES = ("decode", "prefill")


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_enum(
        "shape",
        None,
        ["mobile", "mobile_quarter", "toy"],
        "Shape of the decoder; default: mobile_quarter, or mobile for full. toy has two small "
        "layers.",
    )
    flags.DEFINE_list("forms", ["float32", "int8", "int4", "int4-g32"], "Formats of the weights.")
    flags.DEFINE_integer("context", 128, "Tokens in the cache before a timed step.", 1)
    flags.DEFINE_integer("prompt", 128, "Tokens per prompt.", 2)
    flags.DEFINE_integer("slots", 512, "Number of cache slots.", 2)
    flags.DEFINE_integer(
        "rounds", None, "Number of rounds of bursts; default: 9, or 30 for full.", 1
    )
    flags.DEFINE_integer("steps", 8, "Decoding steps per burst.", 1)
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads.", 1)


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    name = FLAGS.shape or SHAPES[FLAGS.preset]
    with tempfile.TemporaryDirectory() as directory:
        specs = specs_of(shape_of(name), FLAGS.forms, Path(directory))
        written = {spec.name: write(spec.task) for spec in bar("files")(specs)}
        samples = bursts(specs, FLAGS.rounds or ROUNDS[FLAGS.preset], FLAGS.steps)
    table.publish(
        NAME,
        "Speed-up by precision in LiteRT: claimed int8 2.5-3.5 x, int4 3.8-5.0 x over float32",
        rows_of(written, samples, FLAGS.context, FLAGS.prompt),
        ("shape", "forms", "context", "prompt", "slots", "rounds", "steps", "threads"),
        {"shape": name, "files": written, "seconds": samples},
    )


def shape_of(name: str) -> GLMConfig:
    """Return a decoder without encoders."""
    if name != "mobile_quarter":
        return decoder_of(name)
    config = decoder_of("mobile")
    decoder = config.decoder
    fewer = dataclasses.replace(
        decoder, num_layers=decoder.num_layers // 4, vocab_size=decoder.vocab_size // 4
    )
    last = {"eos_token_ids": (fewer.vocab_size - 1,), "pad_token_id": fewer.vocab_size - 1}
    return dataclasses.replace(config, name=name, decoder=fewer, **last)


def specs_of(config: GLMConfig, forms: Sequence[str], directory: Path) -> list[Spec]:
    """Return one engine spec per form, float32 first.

    Raises:
      DataError: a form is unknown, or the phases do not fit the cache.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise DataError(f"--forms: {unknown[0]!r} is not one of {', '.join(FORMS)}")
    longest = max(FLAGS.context + FLAGS.steps, FLAGS.prompt)
    if longest > FLAGS.slots:
        raise DataError(
            f"--slots: {FLAGS.slots} are too few; --context with --steps, and --prompt, need "
            f"{longest}"
        )
    options = {"weight_cache": str(directory / "packed")}
    return [
        children.spec_of(
            form,
            form,
            directory / f"{form}.tflite",
            config,
            FLAGS.slots,
            contexts=(FLAGS.context,),
            lengths=(FLAGS.prompt,),
            threads=FLAGS.threads,
            bits=FORMS[form][0],
            options=options,
        )
        for form in dict.fromkeys([BASE, *forms])
    ]


def write(task: Task) -> dict[str, Any]:
    """Write a file of random weights; return its bytes, bytes per step, and conversions."""
    exported = random_model.exported(task, ge.export.tflite)
    return {
        "file_bytes": exported.file_bytes,
        "weight_bytes": weight_bytes(task.path, exported.model.config),
        "notes": sorted({conversion.rule for conversion in exported.conversions}),
    }


def bursts(specs: Sequence[Spec], rounds: int, steps: int) -> dict[str, Bursts]:
    """Measure seconds by form and phase, alternating, with every second round in reverse order.

    Args:
      specs: specs whose files are written.
      rounds: number of rounds of bursts.
      steps: decoding steps per burst, of which the median is used.

    Returns:
      Bursts of `decode` and `prefill` by form.
    """
    resident: dict[str, EngineProcess] = {}
    try:
        for spec in specs:
            resident[spec.name] = children.start(spec)[0]
        phase_samples: dict[str, Bursts] = {
            name: {phase: [] for phase in PHASES} for name in resident
        }
        for turn in bar("rounds")(range(rounds)):
            names = list(resident)
            for name in names if turn % 2 else names[::-1]:
                task = resident[name].spec.task
                for phase, count in zip(PHASES, task.contexts + task.lengths, strict=True):
                    seconds = resident[name].burst(phase, count, steps)
                    phase_samples[name][phase].append(Burst(turn, seconds))
        return phase_samples
    except ChildError as error:
        raise ExportError(f"LiteRT could not run a file: {error}") from error
    finally:
        for engine in resident.values():
            engine.close()


def rows_of(
    written: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Bursts],
    context: int,
    prompt: int,
) -> list[Row]:
    """Return the table's rows.

    Args:
      written: `weight_bytes` of each form's file.
      samples: results of `bursts`.
      context: number of tokens in the cache before a step.
      prompt: number of tokens per prompt.

    Returns:
      Rows with bytes that a step reads, times, and speed-ups over float32.
    """
    notes = {"decode": f"a step at context {context}", "prefill": f"a prompt of {prompt} tokens"}
    rows = [
        Row(f"weights, {form}", "MB", None, facts["weight_bytes"] / 1e6, note="read by a step")
        for form, facts in written.items()
    ]
    for phase in PHASES:
        for form, phase_samples in samples.items():
            time_ms = Quartiles.of([1e3 * burst.seconds for burst in phase_samples[phase]])
            rows.append(Row(f"{phase}, {form}", "ms", None, time_ms.median, note=notes[phase]))
        for form, phase_samples in samples.items():
            if form == BASE:
                continue
            claimed = FORMS[form][1]
            gain = compare.speedup(phase_samples[phase], samples[BASE][phase])
            note = f"quartiles {gain.low:.2f} - {gain.high:.2f}"
            if claimed:
                note += f"; claimed {claimed[0]} - {claimed[1]} on a different device"
            claim = claimed[0] if claimed else None
            rows.append(Row(f"{phase}, {form} over float32", "x", claim, gain.median, note=note))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
