"""Tasks that share a phone's engines, their deadlines, and the choice of an engine.

A task is a sequence of units. A unit that began is finished: preemption happens at the end of a
unit, so a token that is split into its layers can be interrupted between layers. Letters: `M`
tasks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glm_edge.device.machine import Machine
from glm_edge.device.specs import ENGINES
from glm_edge.device.thermal import Numbers
from glm_edge.device.workload import Work
from glm_edge.errors import DataError

PREEMPTION = ("token", "layer")
CPU_WEIGHT, MEMORY_WEIGHT = 0.6, 0.4


@dataclass(frozen=True)
class Task:
    """A task of one engine.

    Attributes:
      name: name for messages and tables.
      engine: `cpu`, `gpu` or `npu`.
      ops: operations of one unit.
      bytes: bytes of memory that one unit moves.
      fixed_s: fixed time of one unit at top speed, such as launches.
      priority: tasks with a larger priority start first.
      period_s: seconds between releases, which are also deadlines; 0 for a task that always has
        work.
      units: units of one release.
      start_s: begin of the task.
      parts: units that form one result, such as the layers of a token.
    """

    name: str
    engine: str
    ops: float
    bytes: float = 0.0
    fixed_s: float = 0.0
    priority: float = 0.0
    period_s: float = 0.0
    units: int = 1
    start_s: float = 0.0
    parts: int = 1

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise DataError(
                f"task {self.name!r:.60}: engine {self.engine!r:.60} is not one of "
                f"{', '.join(ENGINES)}"
            )
        amounts = (self.ops, self.bytes, self.fixed_s, self.period_s, self.start_s)
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts):
            raise DataError(
                f"task {self.name!r:.60}: ops, bytes, fixed_s, period_s and start_s must be finite "
                "and not negative"
            )
        if not self.ops + self.bytes + self.fixed_s > 0:
            raise DataError(f"task {self.name!r:.60}: a unit must have ops, bytes or fixed_s")
        if self.units < 1 or self.parts < 1:
            raise DataError(f"task {self.name!r:.60}: units and parts must be at least 1")


class TaskArrays(NamedTuple):
    """Tasks as arrays [M], with the fields of `Task`."""

    engine: Numbers
    ops: Numbers
    bytes: Numbers
    fixed_s: Numbers
    priority: Numbers
    period_s: Numbers
    units: Numbers
    start_s: Numbers


def arrays_of(tasks: Sequence[Task]) -> TaskArrays:
    """Convert tasks to arrays.

    Args:
      tasks: at least one task.

    Returns:
      The arrays.

    Raises:
      DataError: there is no task.
    """
    if not tasks:
        raise DataError("tasks: at least one task is needed")

    def column(name: str) -> np.ndarray:
        return np.asarray([getattr(task, name) for task in tasks], float)

    engine = np.asarray([ENGINES.index(task.engine) for task in tasks])
    return TaskArrays(engine, *(column(name) for name in TaskArrays._fields[1:]))


def decoding(
    work: Work,
    engine: str,
    preempt: str = "token",
    layer_s: float = 0.0,
    priority: float = 0.0,
    name: str = "decode",
) -> Task:
    """Build the task of decoding without end.

    Args:
      work: sums of one token, `workload.total(decode_ops(...))`.
      engine: engine that decodes.
      preempt: `token` to interrupt between tokens, `layer` to interrupt between layers.
      layer_s: fixed time per layer in seconds.
      priority: see `Task`.
      name: see `Task`.

    Returns:
      The task; `parts` units form a token.

    Raises:
      DataError: `preempt` is unknown.
    """
    if preempt not in PREEMPTION:
        raise DataError(f"decoding: preempt {preempt!r:.60} is not one of {', '.join(PREEMPTION)}")
    parts = max(work.layers, 1) if preempt == "layer" else 1
    return Task(
        name,
        engine,
        work.ops / parts,
        work.bytes / parts,
        layer_s * work.layers / parts,
        priority,
        parts=parts,
    )


def unit_seconds(tasks: Sequence[Task], machine: Machine) -> np.ndarray:
    """Compute the seconds of one unit of each task, alone at top speed [M]."""
    ops_s, bandwidth = np.asarray(machine.ops_s), np.asarray(machine.bandwidth_bytes_s)
    times = []
    for task in tasks:
        engine = ENGINES.index(task.engine)
        rate = min(bandwidth[engine], float(machine.shared_bytes_s))
        times.append(max(task.ops / ops_s[engine], task.bytes / rate) + task.fixed_s)
    return np.array(times)


def check_feasible(tasks: Sequence[Task], machine: Machine) -> None:
    """Refuse tasks that miss deadlines at top speed without any other task.

    Args:
      tasks: the tasks.
      machine: arrays of the device.

    Raises:
      DataError: a release takes longer than its period, or the periodic tasks of an engine need
        more than all of its time.
    """
    demand = dict.fromkeys(ENGINES, 0.0)
    for task, seconds in zip(tasks, unit_seconds(tasks, machine), strict=True):
        if not task.period_s:
            continue
        share = task.units * seconds / task.period_s
        if share > 1:
            raise DataError(
                f"task {task.name!r:.60}: needs {1e3 * task.units * seconds:.3g} ms at the top "
                f"speed of the {task.engine}, more than its period of {1e3 * task.period_s:.3g} ms"
            )
        demand[task.engine] += share
    for engine, share in demand.items():
        if share > 1:
            names = ", ".join(t.name for t in tasks if t.engine == engine and t.period_s)
            raise DataError(
                f"tasks {names:.200}: need {100 * share:.0f} % of the {engine}'s time at its top "
                "speed, so some deadlines can never be met; lengthen a period or move a task"
            )


class Placement(NamedTuple):
    """An engine that could run a task.

    Attributes:
      engine: name of the engine.
      latency_s: seconds of one unit.
      energy_j: joules of one unit.
      cpu_ratio: available over required compute.
      memory_ratio: available over required memory.
    """

    engine: str
    latency_s: float
    energy_j: float
    cpu_ratio: float = 1.0
    memory_ratio: float = 1.0


def placement_score(cpu_ratio: float, memory_ratio: float, capped: bool = True) -> float:
    """Compute 0.6 of the compute ratio plus 0.4 of the memory ratio.

    Args:
      cpu_ratio: available over required compute.
      memory_ratio: available over required memory.
      capped: limits each ratio to 1. Without it, as published, an engine with much spare memory
        wins although its compute does not suffice.

    Returns:
      The score.
    """
    if capped:
        cpu_ratio, memory_ratio = min(cpu_ratio, 1.0), min(memory_ratio, 1.0)
    return CPU_WEIGHT * cpu_ratio + MEMORY_WEIGHT * memory_ratio


PLACEMENTS: dict[str, Callable[[Placement], tuple[float, ...]]] = {
    "score": lambda p: (-placement_score(p.cpu_ratio, p.memory_ratio), p.latency_s),
    "published_score": lambda p: (-placement_score(p.cpu_ratio, p.memory_ratio, capped=False),),
    "energy": lambda p: (p.energy_j,),
    "latency": lambda p: (p.latency_s,),
}
"""Orders of engines by name of the rule; the smallest value is chosen."""


def choose_engine(options: Sequence[Placement], rule: str = "score") -> Placement:
    """Choose the engine of a task.

    Args:
      options: at least one option.
      rule: a key of `PLACEMENTS`.

    Returns:
      The best option; of equal ones the first.

    Raises:
      DataError: there is no option, or the rule is unknown.
    """
    if rule not in PLACEMENTS:
        raise DataError(f"choose_engine: {rule!r:.60} is not one of {', '.join(PLACEMENTS)}")
    if not options:
        raise DataError("choose_engine: there is no engine to choose")
    return min(options, key=PLACEMENTS[rule])
