"""Runs `glm-edge plan` from a clone.

    python -m experiments.plan_phone --preset=phone_9b --budget_gb=1.8

The flags are those of the command.
"""

from glm_edge.cli import plan
from glm_edge.cli.console import launch

if __name__ == "__main__":
    plan.define_flags()
    launch(plan.main, f"{__doc__}\n{plan.__doc__}")
