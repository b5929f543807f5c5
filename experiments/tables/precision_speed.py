"""Table (j): speed-up by precision in LiteRT.

    python -m experiments.tables.precision_speed --preset=quick
    python -m experiments.tables.precision_speed --preset=full

The claim: int8 is 2.5 to 3.5 times as fast as float32, int4 3.8 to 5.0 times. A decoder of --shape
with random weights is written as a `.tflite` file once for each of --forms (the numbers mean
nothing, their sizes do): `mobile`, or a quarter of its layers and of its vocabulary. Each file is
loaded by LiteRT in a process of its own, and all take turns: bursts of --steps steps of decoding
behind --context tokens, and a prompt of --prompt tokens. A step counts from the token to its
scores, a prompt from its tokens to the scores of the last. Speed-ups are medians over pairs of
bursts of one round; the note says what was claimed, and `ratio` is to the least of it.

int4 is per channel, int4-g32 in groups of 32 columns. LiteRT multiplies int8 and int4 weights with
rows of inputs that it rounds to int8 itself; the vocabulary is rounded like the rest.
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
    """Defines this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_enum(
        "shape",
        None,
        ["mobile", "mobile_quarter", "toy"],
        "Of the decoder; default: mobile_quarter, or mobile in full. toy has two small layers.",
    )
    flags.DEFINE_list("forms", ["float32", "int8", "int4", "int4-g32"], "Of the weights.")
    flags.DEFINE_integer("context", 128, "Tokens in the cache before timed steps.", 1)
    flags.DEFINE_integer("prompt", 128, "Tokens of a prompt.", 2)
    flags.DEFINE_integer("slots", 512, "Slots of the cache.", 2)
    flags.DEFINE_integer("rounds", None, "Of bursts; default: 9, or 30 in full.", 1)
    flags.DEFINE_integer("steps", 8, "Steps of a burst of decoding.", 1)
    flags.DEFINE_integer("threads", 2, "Threads of LiteRT.", 1)


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
    """Returns a decoder without encoders."""
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
    """Returns an engine for each form, float32 first.

    Raises:
      DataError: a form is unknown, or what is to be run does not fit the cache.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown:
        raise DataError(f"--forms: {unknown[0]!r} is none of {', '.join(FORMS)}")
    longest = max(FLAGS.context + FLAGS.steps, FLAGS.prompt)
    if longest > FLAGS.slots:
        raise DataError(
            f"--slots: {FLAGS.slots} are too few; --context with --steps, and --prompt, take "
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
    """Writes a file of random weights; its bytes, those that a step reads, and its conversions."""
    exported = random_model.exported(task, ge.export.tflite)
    return {
        "file_bytes": exported.file_bytes,
        "weight_bytes": weight_bytes(task.path, exported.model.config),
        "notes": sorted({conversion.rule for conversion in exported.conversions}),
    }


def bursts(specs: Sequence[Spec], rounds: int, steps: int) -> dict[str, Bursts]:
    """Seconds by form and phase; all forms take turns, every second round in reverse order.

    Args:
      specs: whose files are written.
      rounds: of bursts.
      steps: of a burst of decoding, whose median counts.

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
    """Returns the table's rows.

    Args:
      written: `weight_bytes` of each form's file.
      samples: of `bursts`.
      context: tokens before a step.
      prompt: tokens of a prompt.

    Returns:
      Bytes that a step reads, times, and speed-ups over float32.
    """
    notes = {"decode": f"a step behind {context} tokens", "prefill": f"a prompt of {prompt} tokens"}
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
                note += f"; claimed {claimed[0]} - {claimed[1]} on another device"
            claim = claimed[0] if claimed else None
            rows.append(Row(f"{phase}, {form} over float32", "x", claim, gain.median, note=note))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
