"""Runs `glm-edge export` from a clone.

    python -m experiments.export --checkpoint=DIR --format=tflite --out=phone.tflite --verify

The flags are those of the command.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

from glm_edge.cli import export
from glm_edge.cli.console import launch

if __name__ == "__main__":
    export.define_flags()
    launch(export.main, f"{__doc__}\n{export.__doc__}")
