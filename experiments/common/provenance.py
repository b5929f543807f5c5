"""What a run was: its command, commit, machine and versions, kept beside its numbers."""

import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common.eval_data import machine
from experiments.quickstart import commit
from glm_edge.cli.run import versions

FLAGS = flags.FLAGS


def provenance_of(script: str, names: Sequence[str], peers: Sequence[str] = ()) -> dict[str, Any]:
    """Command, commit, machine and versions of a run.

    Args:
      script: of `experiments`.
      names: of the flags that matter.
      peers: whose interpreters may be named by a flag.
    """
    values = {name: FLAGS[name].value for name in names}
    given = [
        shlex.quote(f"--{name}={','.join(value) if isinstance(value, list) else value}")
        for name, value in values.items()
    ]
    given += [f"--{peer}_python=PYTHON" for peer in peers if FLAGS[f"{peer}_python"].value]
    return {
        "command": f"python -m experiments.{script} {' '.join(given)} --work_dir=DIR",
        "commit": commit(),
        **machine(),
        "versions": versions(),
    }
