"""Ticks of a phone: scheduling steps, then one exact thermal step, then the governors.

A tick is one thermal step, divided into equal scheduling steps at constant speeds. Letters: `E`
engines, `M` tasks, `N` thermal nodes, `S` samples.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.device import governors, thermal
from glm_edge.device.governors import Policy
from glm_edge.device.machine import Machine
from glm_edge.device.power import dram_energy_j, leakage_power_w
from glm_edge.device.schedule import TaskArrays
from glm_edge.device.specs import ENGINES

COUNT = len(ENGINES)
SKIN = COUNT + 1
# Half-life of the utilization, as of Linux's per-entity load tracking.
UTILIZATION_HALF_S = 0.032
# Smallest activity for which the allocator plans power.
LEAST_ACTIVITY = 0.05
# Positions in `State.totals` after the energies of the engines.
DRAM, BASE, LOST, THROTTLED, DIE_SUM = range(COUNT, COUNT + 5)


class State(NamedTuple):
    """State of a simulated phone.

    Times are counted in ticks, and sums carry their rounding errors, since float32 sums of
    milliseconds are 28 s short after half an hour.

    Attributes:
      tick: finished ticks [].
      rise_k: temperatures above the ambient [N].
      rise_error: rounding error of `rise_k` [N].
      point: operating point [E].
      utilization: smoothed busy share times speed [E].
      running: task per engine, -1 for none [E].
      remaining: share of the running unit that remains [E].
      credit_s: time of the last step that a finished unit did not use [E].
      phase: share of the period since the last release [M].
      backlog: units that wait, the running one included [M].
      released: releases [M].
      done: finished units [M].
      late: releases whose predecessor was unfinished, which is dropped [M].
      totals: energy of each engine, of memory, base, heat to the air in J; throttled seconds; the
        integral of the hottest die in C s.
      totals_error: rounding errors of `totals`.
      integral_w: integrals of the two allocators in W [2].
      hot: 1 between the trips [].
      off_s: second of the shutdown at the critical trip, infinity before [].
      peak_c: highest temperature of a die [].
      peak_skin_c: highest temperature of the case [].
    """

    tick: Array
    rise_k: Array
    rise_error: Array
    point: Array
    utilization: Array
    running: Array
    remaining: Array
    credit_s: Array
    phase: Array
    backlog: Array
    released: Array
    done: Array
    late: Array
    totals: Array
    totals_error: Array
    integral_w: Array
    hot: Array
    off_s: Array
    peak_c: Array
    peak_skin_c: Array


class Trace(NamedTuple):
    """Samples of a simulation, each the mean of several ticks.

    Attributes:
      die_c: hottest die [S].
      skin_c: case [S].
      speed: relative speeds [S, E].
      units_s: units per second, fractions included [S, M].
      power_w: engines, memory and base [S].
    """

    die_c: Array
    skin_c: Array
    speed: Array
    units_s: Array
    power_w: Array


class _Step(NamedTuple):
    """Sums over the scheduling steps of a tick: energies in J, times in s, and units."""

    switching_j: Array
    dram_j: Array
    busy_s: Array
    active_s: Array
    units: Array


def initial(machine: Machine, policy: Policy, tasks: TaskArrays) -> State:
    """Return an idle phone at the temperature of the air, at the speeds of its governor."""
    count, nodes = tasks.priority.shape[0], machine.capacity_j_k.shape[0]
    zeros = functools.partial(jnp.zeros, dtype=float)
    wanted = governors.speed_of(policy, zeros(COUNT))
    return State(
        tick=jnp.zeros((), jnp.int32),
        rise_k=zeros(nodes),
        rise_error=zeros(nodes),
        point=_lowest_at_or_above(machine.speed, wanted),
        utilization=zeros(COUNT),
        running=-jnp.ones(COUNT, int),
        remaining=zeros(COUNT),
        credit_s=zeros(COUNT),
        phase=jnp.ones(count, float),
        backlog=zeros(count),
        released=zeros(count),
        done=zeros(count),
        late=zeros(count),
        totals=zeros(DIE_SUM + 1),
        totals_error=zeros(DIE_SUM + 1),
        integral_w=zeros(2),
        hot=zeros(()),
        off_s=jnp.asarray(jnp.inf, float),
        peak_c=machine.ambient_c,
        peak_skin_c=machine.ambient_c,
    )


def _sum(total: Array, error: Array, amount: Array) -> tuple[Array, Array]:
    """Add with Kahan's compensation."""
    amount = amount - error
    following = total + amount
    return following, (following - total) - amount


def _release(tasks: TaskArrays, state: State, now_s: Array, step_s: Array) -> State:
    """Release the periodic tasks that are due; a late release is dropped, not queued."""
    is_on = (now_s >= tasks.start_s) & jnp.isinf(state.off_s)
    periodic = tasks.period_s > 0
    due = is_on & periodic & (state.phase >= 1.0)
    phase = jnp.where(due, state.phase - 1.0, state.phase)
    backlog = jnp.where(due, tasks.units, state.backlog)
    backlog = jnp.where(periodic, backlog, jnp.where(is_on, 1.0, 0.0))
    return state._replace(
        phase=phase + jnp.where(is_on & periodic, step_s / jnp.maximum(tasks.period_s, 1e-9), 0.0),
        backlog=backlog,
        released=state.released + due,
        late=state.late + (due & (state.backlog > 0)),
    )


def _schedule(
    machine: Machine,
    tasks: TaskArrays,
    steps: int,
    speed: Array,
    switching_w: Array,
    carry: tuple[State, _Step],
    index: Array,
) -> tuple[tuple[State, _Step], None]:
    """Run one scheduling step at constant speeds."""
    state, sums = carry
    step_s = machine.step.seconds / steps
    state = _release(tasks, state, (state.tick * steps + index) * step_s, step_s)
    # A unit that began is finished; a free engine takes the ready task of highest priority.
    is_on = jnp.isinf(state.off_s)
    ready = (state.backlog > 0) & (tasks.engine == jnp.arange(COUNT)[:, None]) & is_on
    score = jnp.where(ready, tasks.priority, -jnp.inf)
    best, has_task = jnp.argmax(score, axis=1), ready.any(axis=1)
    goes_on = (state.running >= 0) & (state.remaining > 0) & is_on
    running = jnp.where(goes_on, state.running, jnp.where(has_task, best, -1))
    remaining = jnp.where(goes_on, state.remaining, jnp.where(has_task, 1.0, 0.0))
    active = running >= 0
    task = jnp.maximum(running, 0)
    # Roofline of a unit: the slower of products and memory, and a fixed time.
    slowed = jnp.maximum(speed, 1e-3)
    readers = (active & (tasks.bytes[task] > 0)).sum()
    bandwidth = jnp.minimum(
        machine.bandwidth_bytes_s, machine.shared_bytes_s / jnp.maximum(readers, 1)
    )
    ops_time_s = tasks.ops[task] / (machine.ops_s * slowed)
    unit_s = jnp.maximum(ops_time_s, tasks.bytes[task] / bandwidth) + tasks.fixed_s[task] / slowed
    # Progress of the step. Behind a finished unit the next one of the same task begins at once; if
    # there is none, the unused time is credited to the task that runs in the next step.
    available_s = step_s + jnp.where(active, state.credit_s, 0.0)
    progress = jnp.where(active, available_s / unit_s, 0.0)
    finished = active & (progress >= remaining)
    by_task = (task[:, None] == jnp.arange(tasks.priority.shape[0])) & active[:, None]
    ended = (by_task & finished[:, None]).sum(axis=0)
    backlog = jnp.where(tasks.period_s > 0, state.backlog - ended, state.backlog)
    again = finished & (backlog[task] > 0) & (task == best)
    amount = jnp.where(finished & ~again, remaining, progress)
    busy_s = amount * unit_s
    credit_s = jnp.where(finished & ~again, jnp.minimum(available_s - busy_s, step_s), 0.0)
    remaining = jnp.where(again, 1.0, 0.0) + remaining - amount
    # Clocks toggle while a unit waits for memory, products only for their share of it.
    computing = jnp.clip(ops_time_s / unit_s, 0.0, 1.0)
    active_s = busy_s * (machine.stall_share + (1.0 - machine.stall_share) * computing)
    idle_s = jnp.maximum(step_s - busy_s, 0.0) * is_on
    sums = _Step(
        sums.switching_j + switching_w * (active_s + idle_s * machine.idle_share),
        sums.dram_j + dram_energy_j((tasks.bytes[task] * amount).sum(), machine.dram_j_byte),
        sums.busy_s + busy_s,
        sums.active_s + active_s,
        sums.units + (by_task * amount[:, None]).sum(axis=0),
    )
    state = state._replace(
        running=jnp.where(finished & ~again, -1, running),
        remaining=remaining,
        credit_s=credit_s,
        backlog=backlog,
        done=state.done + ended,
    )
    return (state, sums), None


def tick(
    machine: Machine, policy: Policy, tasks: TaskArrays, steps: int, state: State
) -> tuple[State, Trace]:
    """Advance a phone by one tick.

    Args:
      machine: arrays of the device, whose thermal step is the tick.
      policy: governors.
      tasks: tasks as arrays.
      steps: scheduling steps per tick.
      state: state before the tick.

    Returns:
      The state after the tick, and a sample.
    """
    seconds = machine.step.seconds

    def at_point(table: Array) -> Array:
        return jnp.take_along_axis(table, state.point[:, None], axis=1)[:, 0]

    speed, is_on = at_point(machine.speed), jnp.isinf(state.off_s)
    zeros = jnp.zeros(COUNT, float)
    sums = _Step(zeros, jnp.zeros((), float), zeros, zeros, jnp.zeros_like(tasks.priority))
    body = functools.partial(_schedule, machine, tasks, steps, speed, at_point(machine.switching_w))
    (state, sums), _ = jax.lax.scan(body, (state, sums), jnp.arange(steps))
    # Heat of the tick and the exact thermal step.
    dies_c = state.rise_k[:COUNT] + machine.ambient_c
    leakage = leakage_power_w(
        machine.leakage_w_v, at_point(machine.voltage_v), dies_c, machine.leakage_fold_k
    )
    engines_w = sums.switching_j / seconds + leakage * is_on
    dram_w, base_w = sums.dram_j / seconds, machine.base_w * is_on
    power_w = jnp.concatenate([engines_w, dram_w[None], base_w[None]])
    change, lost_j = thermal.advance(machine.step, state.rise_k, power_w)
    rise_k, rise_error = _sum(state.rise_k, state.rise_error, change)
    dies_c = rise_k[:COUNT] + machine.ambient_c
    die_c, skin_c = jnp.max(dies_c), rise_k[SKIN] + machine.ambient_c
    # Governors of speed, then the limits of heat; the lowest limit counts.
    decay = 0.5 ** (seconds / UTILIZATION_HALF_S)
    busy = jnp.minimum(sums.busy_s / seconds, 1.0) * speed
    utilization = decay * state.utilization + (1.0 - decay) * busy
    wanted = governors.speed_of(policy, utilization)
    trip_speed, hot = governors.trips(policy, die_c, state.hot)
    die_w, die_integral = governors.power_budget_w(policy.die, die_c, state.integral_w[0], seconds)
    skin_w, skin_integral = governors.power_budget_w(
        policy.skin, skin_c, state.integral_w[1], seconds
    )
    # An idle engine requests nothing, but its table has power, or any point would fit its grant.
    activity = jnp.minimum(sums.active_s / seconds, 1.0)
    table_w = machine.switching_w * jnp.maximum(activity, LEAST_ACTIVITY)[:, None]
    wanted_point = _lowest_at_or_above(machine.speed, wanted)
    at_wanted = jnp.take_along_axis(machine.switching_w, wanted_point[:, None], axis=1)[:, 0]
    requested = activity * at_wanted
    granted = governors.split_budget_w(jnp.minimum(die_w, skin_w), requested, table_w[:, -1])
    granted_point = _highest_within(table_w, granted[:, None])
    trip_point = _highest_within(machine.speed, jnp.full((COUNT, 1), trip_speed))
    limit = jnp.minimum(granted_point, trip_point)
    point = jnp.minimum(wanted_point, limit)
    throttled = jnp.any((point < wanted_point) & (sums.busy_s > 0))
    amounts = jnp.concatenate(
        [
            power_w * seconds,
            jnp.stack([lost_j, throttled * seconds, die_c * seconds]),
        ]
    )
    totals, totals_error = _sum(state.totals, state.totals_error, amounts)
    ended_s = (state.tick + 1) * seconds
    state = state._replace(
        tick=state.tick + 1,
        rise_k=rise_k,
        rise_error=rise_error,
        point=point,
        utilization=utilization,
        totals=totals,
        totals_error=totals_error,
        integral_w=jnp.stack([die_integral, skin_integral]),
        hot=hot,
        off_s=jnp.where(is_on & (die_c >= policy.critical_c), ended_s, state.off_s),
        peak_c=jnp.maximum(state.peak_c, die_c),
        peak_skin_c=jnp.maximum(state.peak_skin_c, skin_c),
    )
    return state, Trace(die_c, skin_c, speed, sums.units / seconds, power_w.sum())


def _lowest_at_or_above(table: Array, wanted: Array) -> Array:
    below = (table < wanted[:, None] - 1e-6).sum(axis=1)
    return jnp.minimum(below, table.shape[1] - 1)


def _highest_within(table: Array, limit: Array) -> Array:
    return jnp.maximum((table <= limit * (1.0 + 1e-6)).sum(axis=1) - 1, 0)


@functools.partial(jax.jit, static_argnames=("steps", "ticks", "every"))
def run(
    machine: Machine, policy: Policy, tasks: TaskArrays, steps: int, ticks: int, every: int
) -> tuple[State, Trace]:
    """Simulate, as a pure function that `jax.vmap` maps over phones, policies and tasks.

    Units are counted whole, so derivatives through it are not those of the speed.

    Args:
      machine: arrays of the device.
      policy: governors.
      tasks: tasks as arrays.
      steps: scheduling steps per tick.
      ticks: count of ticks, a multiple of `every`.
      every: ticks per sample.

    Returns:
      The last state, and samples.
    """

    def sample(state: State, _: None) -> tuple[State, Trace]:
        body = functools.partial(tick, machine, policy, tasks, steps)
        state, traces = jax.lax.scan(lambda s, _: body(s), state, None, length=every)
        return state, jax.tree.map(lambda values: values.mean(axis=0), traces)

    # Arrays of numpy cannot be indexed by traced ones.
    machine, policy, tasks = jax.tree.map(jnp.asarray, (machine, policy, tasks))
    start = initial(machine, policy, tasks)
    return jax.lax.scan(sample, start, None, length=ticks // every)
