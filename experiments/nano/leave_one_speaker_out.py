"""Measures the recognition of digits by people that an encoder has never heard.

    python -m experiments.nano.leave_one_speaker_out --speech_dir=DIR --work_dir=runs/speakers \\
        --out=experiments/results/speech_unheard.json

For every person of the folder and every seed, an encoder learns from all other people and from
synthetic voices, and is measured on that person after its last step only. The table shows the mean
over people with a 95 % t interval over people. An interrupted run resumes. --encoder=cnn trains a
small convolutional network instead, for comparison.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import numpy as np
from absl import flags

from experiments.common.provenance import provenance_of
from experiments.nano import digit_training
from experiments.nano.phone_screens import metrics, speech
from glm_edge import configs
from glm_edge.cli import corpora
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.errors import GlmEdgeError

FLAGS = flags.FLAGS
_DEFAULTS = digit_training.DigitTraining()
_OPTIONS = [field.name for field in dataclasses.fields(_DEFAULTS)]


def define_flags() -> None:
    """Define the flags; those of the training are the fields of `DigitTraining`."""
    flags.DEFINE_string("speech_dir", None, "Folder of spoken digits.", required=True)
    flags.DEFINE_string("work_dir", None, "Folder of the runs, to resume.", required=True)
    flags.DEFINE_string("out", None, "JSON log of the results.")
    flags.DEFINE_list("people", [], "People to measure; default: all of the folder.")
    flags.DEFINE_list("seeds", ["0", "1"], "Seeds; each is one training per person.")
    flags.DEFINE_enum("encoder", "nano", digit_training.ENCODERS, "Encoder to train.")
    flags.DEFINE_list("voices", ["espeak", "flite"], "Kinds of synthetic voices to learn from.")
    flags.DEFINE_integer("steps", _DEFAULTS.steps, "Steps per training.", 1)
    flags.DEFINE_integer("batch", _DEFAULTS.batch, "Recordings per step.", 1)
    flags.DEFINE_float("peak_rate", _DEFAULTS.peak_rate, "Peak of the learning rate.")
    flags.DEFINE_float("weight_decay", _DEFAULTS.weight_decay, "Decay of matrices.")
    flags.DEFINE_float("dropout", _DEFAULTS.dropout, "Probability of dropping neurons and heads.")
    flags.DEFINE_bool("spec_augment", _DEFAULTS.spec_augment, "Hide bands of time and frequency.")


def voices_of(kind: str, seed: int) -> list[speech.Utterance]:
    """Return the synthetic recordings of one kind to learn from, "espeak" or "flite"."""
    if kind == "flite":
        return speech.synthesize_with_flite(seed)
    return speech.synthesize_digits(seed, speech.VOICES["train"])


def accuracy_of(
    person: str, seed: int, recorded: list[speech.Utterance], options: digit_training.DigitTraining
) -> dict[str, Any]:
    """Train without one person, and measure on that person; read the result of an earlier run."""
    settings = {"encoder": FLAGS.encoder, "voices": FLAGS.voices, **dataclasses.asdict(options)}
    directory = Path(FLAGS.work_dir) / f"{FLAGS.encoder}_{person}_{seed}"
    file = directory / "result.json"
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["settings"] != settings:
            sys.exit(f"error: {file} has other settings; use another --work_dir")
        return result
    others, alone = speech.split_speakers(recorded, [person])
    groups = {"people": others} | {kind: voices_of(kind, seed) for kind in FLAGS.voices}
    encoder = digit_training.Encoder(FLAGS.encoder, configs.preset("nano"))
    state = digit_training.train(
        "speech", directory, encoder, encoder.initial(seed), groups, options, seed
    )
    right = digit_training.recognised(encoder, state, alone)
    result = {
        "person": person,
        "seed": seed,
        "accuracy": float(right.mean()),
        "recordings": len(alone),
        "heard": sorted({u.speaker for u in others}),
        "settings": settings,
    }
    corpora.write_text(file, json.dumps(result, indent=1) + "\n", overwrite=True)
    return result


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Average over seeds per person, then over people.

    Args:
      results: one per person and seed.

    Returns:
      Accuracy per person, and `mean`, `low` and `high` over people.
    """
    people = sorted({result["person"] for result in results})
    per_person = {
        person: float(np.mean([r["accuracy"] for r in results if r["person"] == person]))
        for person in people
    }
    return {"per_person": per_person, **vars(metrics.over_people(list(per_person.values())))}


def main(argv: list[str]) -> None:
    """Train and measure every pair of person and seed, then write the log."""
    refuse_arguments(argv)
    options = digit_training.DigitTraining(**{name: FLAGS[name].value for name in _OPTIONS})
    try:
        recorded = speech.fsdd_folder(FLAGS.speech_dir)
        people = FLAGS.people or sorted({u.speaker for u in recorded})
        results = [
            accuracy_of(person, int(seed), recorded, options)
            for person in people
            for seed in FLAGS.seeds
        ]
    except GlmEdgeError as error:
        sys.exit(f"error: {error}")
    totals = summary(results)
    rows = [[name, f"{100 * rate:.1f}"] for name, rate in totals["per_person"].items()]
    ends = "-".join(f"{100 * totals[end]:.1f}" for end in ("low", "high"))
    print_table(["person", "digits, %"], [*rows, ["mean", f"{100 * totals['value']:.1f} ({ends})"]])
    if FLAGS.out:
        names = ["people", "seeds", "encoder", "voices", *_OPTIONS]
        report = provenance_of(
            "nano.leave_one_speaker_out",
            names,
            ["--speech_dir=DIR", "--work_dir=DIR"],
            seed=int(FLAGS.seeds[0]),
        )
        report |= {"results": results, "summary": totals}
        corpora.write_text(FLAGS.out, json.dumps(report, indent=1) + "\n", overwrite=True)


if __name__ == "__main__":
    define_flags()
    launch(main)
