"""Heat of a phone: a network of conductances and capacities, stepped exactly.

`C dT/dt = P - G (T - ambient)`, with temperatures relative to the ambient. `G` is a Laplacian whose
diagonal includes the way to the air. Letters: `N` nodes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.errors import DataError

Numbers = Any
"""Arrays of numpy, and of jax inside a compiled program."""


class Network(NamedTuple):
    """A thermal network.

    Attributes:
      conductance_w_k: symmetric matrix `G` [N, N] in W/K.
      capacity_j_k: heat capacities `C` [N] in J/K.
    """

    conductance_w_k: np.ndarray
    capacity_j_k: np.ndarray


class Step(NamedTuple):
    """Exact change of a network over one step of constant power.

    Only changes are stored: with `T + change` instead of `A T`, rounding in float32 does not act on
    the slow nodes, whose temperature changes by millionths per step.

    Attributes:
      rise_by_rise: change of temperatures per temperature, `A - I` [N, N].
      rise_by_power: change of temperatures per watt [N, N], K/W.
      lost_by_rise: joules to the air per kelvin of each node [N].
      lost_by_power: joules to the air per watt of each node [N].
      seconds: length of the step [].
    """

    rise_by_rise: Numbers
    rise_by_power: Numbers
    lost_by_rise: Numbers
    lost_by_power: Numbers
    seconds: Numbers


def network(
    resistances_k_w: Mapping[tuple[int, int | None], float], capacities_j_k: np.ndarray
) -> Network:
    """Build a network from thermal resistances.

    Args:
      resistances_k_w: resistance in K/W by pair of nodes; None is the air.
      capacities_j_k: heat capacities [N] in J/K.

    Returns:
      The network.

    Raises:
      DataError: a resistance or a capacity is not positive, or heat cannot leave a node.
    """
    capacity = np.asarray(capacities_j_k, float)
    conductance = np.zeros((len(capacity), len(capacity)))
    for (first, second), resistance in resistances_k_w.items():
        if not resistance > 0:
            raise DataError(
                f"network: resistance {first}-{second} is {resistance} K/W; it must be above 0"
            )
        conductance[first, first] += 1 / resistance
        if second is not None:
            conductance[second, second] += 1 / resistance
            conductance[first, second] -= 1 / resistance
            conductance[second, first] -= 1 / resistance
    if not (capacity > 0).all():
        raise DataError(f"network: capacities {capacity.tolist()} J/K must be above 0")
    if np.linalg.matrix_rank(conductance) < len(capacity):
        raise DataError("network: a node has no path to the air, so its heat cannot leave")
    return Network(conductance, capacity)


def discretize(network: Network, step_s: float) -> Step:
    """Compute the exact step of a network.

    `C^-1/2 G C^-1/2` is symmetric, so the modes decay independently: with rate `r`, a mode changes
    by `expm1(-r t)`, and its integral over the step is `-expm1(-r t) / r`.

    Args:
      network: the network.
      step_s: length of the step in seconds.

    Returns:
      The step, computed in float64.
    """
    root = np.sqrt(network.capacity_j_k)
    rates, modes = np.linalg.eigh(network.conductance_w_k / root / root[:, None])
    to_rise, from_rise = modes / root[:, None], modes.T * root
    from_power = modes.T / root
    change = np.expm1(-rates * step_s)
    integral = -change / rates
    # Integral over the step of a mode under constant power: (t - integral) / r.
    twice = (step_s - integral) / rates
    to_air = network.conductance_w_k.sum(axis=0)
    lost_by_rise = to_air @ (to_rise * integral) @ from_rise
    lost_by_power = to_air @ (to_rise * twice) @ from_power
    return Step(
        (to_rise * change) @ from_rise,
        (to_rise * integral) @ from_power,
        lost_by_rise,
        lost_by_power,
        np.float64(step_s),
    )


def advance(step: Step, rise_k: Array, power_w: Array) -> tuple[Array, Array]:
    """Advance the temperatures by one step of constant power.

    Args:
      step: from `discretize`.
      rise_k: temperatures above the ambient [N] in K.
      power_w: heat that enters each node [N] in W.

    Returns:
      `(change_k, lost_j)`: changes of the temperatures [N] in K, which the caller adds, and the
      heat that left to the air in J.
    """
    by_rise, by_power, lost_by_rise, lost_by_power, _ = map(jnp.asarray, step)
    change = by_rise @ rise_k + by_power @ power_w
    return change, lost_by_rise @ rise_k + lost_by_power @ power_w


def steady_rise_k(network: Network, power_w: np.ndarray) -> np.ndarray:
    """Solve for the temperatures above the ambient [N] at constant power [N]."""
    return np.linalg.solve(network.conductance_w_k, np.asarray(power_w, float))
