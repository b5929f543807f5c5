"""Simulation of tasks on a phone, checked, with a result that prints."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from glm_edge.device.governors import Policy
from glm_edge.device.machine import Machine
from glm_edge.device.schedule import Task, arrays_of, check_feasible, unit_seconds
from glm_edge.device.specs import ENGINES
from glm_edge.device.ticks import BASE, THROTTLED, State, Trace, run
from glm_edge.errors import DataError


class Result(NamedTuple):
    """A finished simulation; it prints as lines.

    Attributes:
      tasks: the tasks.
      state: last state.
      trace: samples.
      seconds: simulated seconds.
      sample_s: seconds per sample.
    """

    tasks: tuple[Task, ...]
    state: State
    trace: Trace
    seconds: float
    sample_s: float

    @property
    def energy_j(self) -> float:
        """Energy of engines, memory and base in joules."""
        return float(np.sum(np.asarray(self.state.totals[: BASE + 1], float)))

    @property
    def stopped_s(self) -> float | None:
        """Second at which a die reached the critical trip, or None."""
        off = float(self.state.off_s)
        return off if np.isfinite(off) else None

    def results_s(self, name: str, first_s: float = 0.0, last_s: float | None = None) -> float:
        """Compute the mean results (tokens, frames) per second of a task within a window."""
        index = [task.name for task in self.tasks].index(name)
        begin = int(first_s / self.sample_s)
        end = None if last_s is None else max(begin + 1, round(last_s / self.sample_s))
        rates = np.asarray(self.trace.units_s)[begin:end, index]
        return float(rates.mean() / self.tasks[index].parts)

    def late_share(self, name: str) -> float:
        """Compute the share of a periodic task's releases that were dropped."""
        index = [task.name for task in self.tasks].index(name)
        return float(self.state.late[index] / jnp.maximum(self.state.released[index], 1))

    def __str__(self) -> str:
        totals = np.asarray(self.state.totals, float)
        shares = ", ".join(
            f"{name} {joules:.1f} J"
            for name, joules in zip((*ENGINES, "memory", "base"), totals[: BASE + 1], strict=True)
        )
        lines = [
            f"simulated {self.seconds:g} s: {self.energy_j:.1f} J ({shares})",
            f"hottest die {float(self.state.peak_c):.1f} C, case "
            f"{float(self.state.peak_skin_c):.1f} C, throttled "
            f"{100 * totals[THROTTLED] / self.seconds:.0f} % of the time",
        ]
        lines += [
            f"{task.name}: {self.results_s(task.name):.2f} per second"
            + (f", {100 * self.late_share(task.name):.1f} % dropped" if task.period_s else "")
            for task in self.tasks
        ]
        if self.stopped_s is not None:
            lines.append(f"stopped after {self.stopped_s:.1f} s at the critical trip of the die")
        return "\n".join(lines)


def simulate(
    machine: Machine,
    policy: Policy,
    tasks: Sequence[Task],
    seconds: float,
    steps: int = 20,
    sample_s: float = 1.0,
) -> Result:
    """Simulate a phone.

    Args:
      machine: arrays of the device; its thermal step is a tick.
      policy: governors.
      tasks: tasks.
      seconds: simulated seconds, rounded up to samples.
      steps: scheduling steps per tick.
      sample_s: seconds per sample of the trace.

    Returns:
      The result. A die at the critical trip ends all work, and the result states when.

    Raises:
      DataError: a deadline can never be met, or a unit is shorter than a scheduling step.

    Example:
      >>> phone = machine(device("sm8550"))
      >>> result = simulate(phone, policy(), [Task("decode", "gpu", 6e9, 1.25e9)], 10.0)
    """
    check_feasible(tasks, machine)
    tick_s = float(machine.step.seconds)
    step_s = tick_s / steps
    for task, unit_s in zip(tasks, unit_seconds(tasks, machine), strict=True):
        # At most one unit ends per step, so shorter units would be slowed without a word.
        if unit_s < step_s * (1 - 1e-6):
            raise DataError(
                f"task {task.name!r:.60}: a unit takes {1e3 * unit_s:.3g} ms, less than a step of "
                f"{1e3 * step_s:.3g} ms; raise steps= to {int(np.ceil(tick_s / unit_s))}, or make "
                "units of several"
            )
    every = max(1, round(sample_s / tick_s))
    samples = max(1, int(np.ceil(seconds / (every * tick_s) - 1e-4)))
    state, trace = run(machine, policy, arrays_of(tasks), steps, samples * every, every)
    simulated = samples * every * tick_s
    return Result(tuple(tasks), state, trace, simulated, every * tick_s)
