"""Runs `glm-edge compress`, with generated phone screens as optional calibration data.

    python -m experiments.compress --recipe=gptq_4bit --calibration_screens=8 --without=audio \\
        --out_dir=DIR
"""

import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")
# OpenBLAS factors Gram matrices; its threads spin while they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from absl import flags

import glm_edge as ge
from experiments.common import calibration_data, eval_data
from glm_edge.cli import compress
from glm_edge.cli.console import launch
from glm_edge.errors import CheckpointError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the command's flags, and one for generated screens."""
    compress.define_flags()
    flags.DEFINE_integer(
        "calibration_screens",
        0,
        "Number of calibration batches of generated phone screens (nano only).",
        0,
    )


def draw_screens(source: Path) -> compress.Batches:
    """Draw --calibration_screens batches of screens for a checkpoint."""
    if not FLAGS.calibration_screens:
        return []
    tokenizer = ge.load_tokenizer(source)
    config = ge.build(source).config
    if getattr(config, "vision", None) is None:
        raise CheckpointError(f"{source}: --calibration_screens needs a model with vision")
    learned, _, notes = eval_data.recordings(None, [], FLAGS.seed)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return calibration_data.screen_batches(
        config, tokenizer, learned, None, FLAGS.seed, FLAGS.calibration_screens
    )


if __name__ == "__main__":
    define_flags()
    main = functools.partial(compress.main, draw=draw_screens)
    launch(main, f"{__doc__}\n{compress.__doc__}")
