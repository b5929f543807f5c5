"""Compresses random checkpoints of published shapes, and checks memory and time against limits.

    python -m experiments.bench.compress --run=edge_1_5b_rtn --work_dir=DIR --out=FILE.json

Each run is `python -m experiments.compress` in a separate process:

  edge_1_5b_rtn   GLM-Edge-1.5B's shape to int4 in groups of 32, rounded to nearest: at most 1.5 GB
  edge_1_5b_gptq  the same by GPTQ on 16 random sequences of 512 tokens: at most 4 GB, 40 minutes
  glm_4_9b_rtn    GLM-4-9B's shape, 9.4 billion parameters, rounded to nearest: at most 4 GB

The script writes the checkpoint to --work_dir unless it exists there. It first checks free disk
space for checkpoint and result (18.8 GB and about 5.6 GB for the largest). After an interruption,
the same command resumes. A run takes 13 s to half an hour on two cores. The exit status is 1 if a
limit is exceeded.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import flags

from experiments.common.provenance import provenance_of
from experiments.golden import make_checkpoint
from glm_edge.cli.console import launch, print_table, refuse_arguments
from glm_edge.cli.corpora import write_text
from glm_edge.errors import DataError

FLAGS = flags.FLAGS
SEQUENCES, LENGTH = 16, 512


@dataclass(frozen=True)
class Run:
    """One benchmark.

    Attributes:
      shape: shape of the checkpoint.
      recipe: name of the recipe.
      calibrated: whether to draw random calibration sequences.
      max_rss_bytes: limit of the peak RSS.
      max_seconds: limit of the time, or None.
    """

    shape: str
    recipe: str
    calibrated: bool
    max_rss_bytes: float
    max_seconds: float | None = None


RUNS = {
    "edge_1_5b_rtn": Run("glm_edge_1_5b", "rtn_4bit", False, 1.5e9),
    "edge_1_5b_gptq": Run("glm_edge_1_5b", "gptq_4bit", True, 4e9, 2400.0),
    "glm_4_9b_rtn": Run("glm_4_9b", "rtn_4bit", False, 4e9),
}


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_enum("run", None, list(RUNS), "Run to execute.", required=True)
    flags.DEFINE_string("work_dir", None, "Working directory for the checkpoints.", required=True)
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("keep", False, "Keep the compressed checkpoint.")


def main(argv: Sequence[str]) -> None:
    refuse_arguments(argv)
    run, work = RUNS[FLAGS.run], Path(FLAGS.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    fields = make_checkpoint.CONFIGS[run.shape]
    source, target = work / run.shape, work / FLAGS.run
    check_disk(source, fields)
    if not source.is_dir():
        make_checkpoint.write(fields, str(source), 2e9, seed=0)
    command = ["--checkpoint", source, "--recipe", run.recipe, "--out_dir", target]
    if run.calibrated:
        tokens = np.random.default_rng(0).integers(
            0, fields["vocab_size"], (SEQUENCES, LENGTH), dtype=np.int32
        )
        np.savez(work / "tokens.npz", tokens=tokens)
        command += ["--calibration", work / "tokens.npz", "--compute=bfloat16"]
    command = [sys.executable, "-m", "experiments.compress", *map(str, command)]
    if subprocess.run(command, check=False).returncode:
        raise DataError(f"{FLAGS.run}: the run failed; see its message above")
    report = json.loads((target / "report.json").read_text(encoding="utf-8"))
    summary = {name: report[name] for name in MEASURED} | {
        "run": FLAGS.run,
        "max_rss_bytes": run.max_rss_bytes,
        "max_seconds": run.max_seconds,
        "within_limits": report["peak_rss_bytes"] <= run.max_rss_bytes
        and report["seconds"] <= (run.max_seconds or float("inf")),
        **provenance_of("bench.compress", ("run",), ["--work_dir=DIR"], seed=0),
    }
    if not FLAGS.keep:
        shutil.rmtree(target)
    print_table(["quantity", "value"], [[name, summary[name]] for name in MEASURED])
    if FLAGS.out:
        write_text(FLAGS.out, json.dumps(summary, indent=1) + "\n", overwrite=True)
    if not summary["within_limits"]:
        sys.exit(f"{FLAGS.run}: a limit is exceeded")


MEASURED = (
    "bytes_before",
    "bytes_after",
    "bits_per_weight",
    "file_bytes",
    "seconds",
    "peak_rss_bytes",
)


def check_disk(source: Path, fields: dict) -> None:
    """Check that checkpoint and result fit the disk.

    Raises:
      OutputError: the disk is too full.
    """
    total = sum(2 * np.prod(s, dtype=float) for s in make_checkpoint.tensor_shapes(fields).values())
    make_checkpoint.require_space(source, 0.3 * total + (0 if source.is_dir() else total))


if __name__ == "__main__":
    define_flags()
    launch(main)
