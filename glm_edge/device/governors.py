"""Governors of speed and of heat, as pure functions of arrays.

Letters: `E` engines.

References:
  Linux's schedutil, kernel/sched/cpufreq_schedutil.c.
  Linux's power allocator, drivers/thermal/gov_power_allocator.c.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from glm_edge.device.specs import Device
from glm_edge.device.thermal import Numbers
from glm_edge.errors import DataError

PERFORMANCE, POWERSAVE, SCHEDUTIL, FIXED = range(4)
GOVERNORS = {
    "performance": PERFORMANCE,
    "powersave": POWERSAVE,
    "schedutil": SCHEDUTIL,
    "fixed": FIXED,
}
# Limits of the allocator's integral, as shares of the sustainable power: a cool phone may exceed it
# by less than a hot one falls short of it, so that the skin overshoots little.
INTEGRAL_LOW, INTEGRAL_HIGH = -1.0, 0.25
CUTOFF_K = 5.0


class Policy(NamedTuple):
    """Parameters of the governors, all arrays, so that `jax.vmap` runs many policies.

    A limit of infinity turns its rule off.

    Attributes:
      governor: index of `GOVERNORS`.
      fixed_speed: relative speed of the governor `fixed`.
      headroom: 1.25 of schedutil.
      hot_c: die temperature above which speed is limited to `low_speed`.
      cool_c: die temperature below which that limit ends.
      low_speed: relative speed between the trips.
      critical_c: die temperature at which the phone shuts down.
      die: allocator on the hottest die.
      skin: allocator on the case.
    """

    governor: Numbers
    fixed_speed: Numbers
    headroom: Numbers
    hot_c: Numbers
    cool_c: Numbers
    low_speed: Numbers
    critical_c: Numbers
    die: "Allocator"
    skin: "Allocator"


class Allocator(NamedTuple):
    """A controller of power that holds a temperature.

    Attributes:
      control_c: temperature to hold, infinity for no control.
      sustainable_w: power at that temperature.
      over_w_k: gain above the temperature (`k_po`).
      under_w_k: gain below it (`k_pu`).
      integral_w_ks: gain of the integral (`k_i`).
      floor_w: power that is always granted.
    """

    control_c: Numbers
    sustainable_w: Numbers
    over_w_k: Numbers
    under_w_k: Numbers
    integral_w_ks: Numbers
    floor_w: Numbers


def allocator(
    control_c: float = jnp.inf,
    sustainable_w: float = 3.0,
    switch_on_c: float | None = None,
    integral: float = 0.02,
    floor_w: float = 0.05,
) -> Allocator:
    """Build an allocator with the kernel's default gains.

    Args:
      control_c: temperature to hold in C; infinity for no control.
      sustainable_w: power in W that holds it.
      switch_on_c: temperature below which nothing is limited; default 10 K below `control_c`.
      integral: share of the kernel's default `k_i`, which oscillates on a skin's slow node.
      floor_w: power in W that is always granted.

    Returns:
      The allocator.
    """
    span = 10.0 if switch_on_c is None else control_c - switch_on_c
    over, under = sustainable_w / span, 2 * sustainable_w / span
    values = (control_c, sustainable_w, over, under, integral * under / 10, floor_w)
    return Allocator(*(np.asarray(value, float) for value in values))


def proportional(
    control_c: float, sustainable_w: float, gain_w_k: float, floor_w: float = 0.05
) -> Allocator:
    """Build an allocator without an integral and with one gain.

    Args:
      control_c: temperature in C at which `sustainable_w` is granted.
      sustainable_w: power in W.
      gain_w_k: further power per kelvin below `control_c`.
      floor_w: power in W that is always granted.

    Returns:
      The allocator.
    """
    values = (control_c, sustainable_w, gain_w_k, gain_w_k, 0.0, floor_w)
    return Allocator(*(np.asarray(value, float) for value in values))


def policy(
    governor: str = "schedutil",
    fixed_speed: float = 1.0,
    headroom: float = 1.25,
    hot_c: float = jnp.inf,
    cool_c: float = jnp.inf,
    low_speed: float = 0.6,
    critical_c: float = 110.0,
    die: Allocator | None = None,
    skin: Allocator | None = None,
) -> Policy:
    """Build a policy.

    Args:
      governor: a key of `GOVERNORS`.
      fixed_speed: relative speed of `fixed`.
      headroom: of `schedutil`.
      hot_c: upper trip in C; infinity for none.
      cool_c: lower trip in C.
      low_speed: relative speed between the trips.
      critical_c: temperature in C of a shutdown; infinity for none.
      die: allocator on the die, None for none.
      skin: allocator on the case, None for none.

    Returns:
      The policy.

    Raises:
      DataError: the governor is unknown.
    """
    if governor not in GOVERNORS:
        raise DataError(f"policy: governor {governor!r:.60} is not one of {', '.join(GOVERNORS)}")
    return Policy(
        governor=np.asarray(GOVERNORS[governor], float),
        fixed_speed=np.asarray(fixed_speed, float),
        headroom=np.asarray(headroom, float),
        hot_c=np.asarray(hot_c, float),
        cool_c=np.asarray(cool_c, float),
        low_speed=np.asarray(low_speed, float),
        critical_c=np.asarray(critical_c, float),
        die=die or allocator(),
        skin=skin or allocator(),
    )


def of_device(device: Device, governor: str = "schedutil") -> Policy:
    """Build the policy of a device's own limits: trips of the die, allocator on the skin.

    Args:
      device: the device.
      governor: a key of `GOVERNORS`.

    Returns:
      The policy.
    """
    values = device.values
    return policy(
        governor,
        hot_c=values["limits.hot_c"],
        cool_c=values["limits.cool_c"],
        low_speed=values["limits.low_speed"],
        critical_c=values["limits.critical_c"],
        skin=allocator(
            values["limits.skin_c"], values["limits.sustainable_w"], values["limits.skin_c"] - 5.0
        ),
    )


def performance(utilization: Array) -> Array:
    """Return the top speed for every engine [E]."""
    return jnp.ones_like(utilization)


def powersave(utilization: Array) -> Array:
    """Return the lowest speed for every engine [E]."""
    return jnp.zeros_like(utilization)


def schedutil(utilization: Array, headroom: ArrayLike = 1.25) -> Array:
    """Compute the speed that a utilization asks for.

    Args:
      utilization: busy share times speed, relative to the top speed [E].
      headroom: factor of the utilization; 1.25 raises the speed at 80 % load.

    Returns:
      Relative speeds [E], at most 1.
    """
    return jnp.minimum(headroom * utilization, 1.0)


def speed_of(policy: Policy, utilization: Array) -> Array:
    """Compute the speed that a policy's governor asks for [E]."""
    options = jnp.stack(
        [
            performance(utilization),
            powersave(utilization),
            schedutil(utilization, policy.headroom),
            jnp.full_like(utilization, policy.fixed_speed),
        ]
    )
    return options[policy.governor.astype(int)]


def trips(policy: Policy, die_c: Array, hot: Array) -> tuple[Array, Array]:
    """Apply two trip points with hysteresis.

    Args:
      policy: `hot_c`, `cool_c` and `low_speed`.
      die_c: temperature of the hottest die in C.
      hot: 1 between the upper and the lower trip, else 0.

    Returns:
      `(speed, hot)`: highest allowed relative speed, and the new state.
    """
    hot = jnp.where(die_c > policy.hot_c, 1.0, jnp.where(die_c < policy.cool_c, 0.0, hot))
    return jnp.where(hot > 0, policy.low_speed, 1.0), hot


def power_budget_w(
    control: Allocator, temperature_c: Array, integral_w: Array, seconds: Array
) -> tuple[Array, Array]:
    """Compute the power that an allocator grants, `sustainable + k error + k_i sum(error)`.

    Args:
      control: the allocator.
      temperature_c: of its zone, in C.
      integral_w: the integral so far, `k_i sum(error)` in W.
      seconds: length of the step.

    Returns:
      `(budget_w, integral_w)`; an allocator without control grants infinity.
    """
    is_on = jnp.isfinite(control.control_c)
    error = jnp.where(is_on, control.control_c - temperature_c, 0.0)
    # Far below the temperature the kernel does not integrate.
    grown = integral_w + jnp.where(error < CUTOFF_K, control.integral_w_ks * error * seconds, 0.0)
    low, high = INTEGRAL_LOW * control.sustainable_w, INTEGRAL_HIGH * control.sustainable_w
    integral_w = jnp.clip(grown, low, high)
    gain = jnp.where(error < 0, control.over_w_k, control.under_w_k)
    budget = control.sustainable_w + gain * error + integral_w
    return jnp.where(is_on, jnp.maximum(budget, control.floor_w), jnp.inf), integral_w


def split_budget_w(budget_w: Array, requested_w: Array, highest_w: Array) -> Array:
    """Split a budget in proportion to requests; what one engine cannot use goes to the others.

    Args:
      budget_w: power to split in W; infinity grants every engine its highest power.
      requested_w: requested power [E] in W.
      highest_w: highest power of each engine [E] in W.

    Returns:
      Granted power [E] in W, at most `highest_w`.
    """
    finite = jnp.where(jnp.isfinite(budget_w), budget_w, 0.0)
    granted = finite * requested_w / jnp.maximum(requested_w.sum(), 1e-9)
    surplus = jnp.maximum(granted - highest_w, 0.0).sum()
    granted = jnp.minimum(granted, highest_w)
    room = highest_w - granted
    granted = granted + room * jnp.minimum(surplus / jnp.maximum(room.sum(), 1e-9), 1.0)
    return jnp.where(jnp.isfinite(budget_w), granted, highest_w)
