"""Power of chips: switching, leakage, and memory traffic.

References:
  Linux's energy model (coefficients in uW/MHz/V^2), include/linux/energy_model.h.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from glm_edge.device.specs import OppTable

LEAKAGE_C = 25.0
"""Temperature at which leakage is stated, and at which tables of power were measured."""


def dynamic_power_w(
    coefficient_w_hz_v2: ArrayLike, frequency_hz: ArrayLike, voltage_v: ArrayLike
) -> Array:
    """Compute switching power, `C f V^2`.

    Args:
      coefficient_w_hz_v2: switched capacitance `C` in W/(Hz V^2); 1 uW/MHz/V^2 is 1e-12.
      frequency_hz: frequency in Hz.
      voltage_v: voltage in V.

    Returns:
      Watts.
    """
    return jnp.asarray(coefficient_w_hz_v2) * frequency_hz * jnp.square(voltage_v)


def leakage_power_w(
    leakage_w_v: ArrayLike, voltage_v: ArrayLike, temperature_c: ArrayLike, fold_k: ArrayLike
) -> Array:
    """Compute leakage, which grows exponentially with temperature.

    Args:
      leakage_w_v: leakage per volt at 25 C, in W/V.
      voltage_v: voltage in V; 0 for a collapsed rail.
      temperature_c: temperature of the die in C.
      fold_k: kelvins per e-fold.

    Returns:
      Watts.
    """
    rise = jnp.exp((jnp.asarray(temperature_c) - LEAKAGE_C) / fold_k)
    return jnp.asarray(leakage_w_v) * voltage_v * rise


def dram_energy_j(bytes_moved: ArrayLike, energy_j_byte: ArrayLike) -> Array:
    """Compute the energy of memory traffic in joules."""
    return jnp.asarray(bytes_moved) * energy_j_byte


def fit_coefficient(table: OppTable, static: bool = False) -> tuple[float, float, np.ndarray]:
    """Fit `C f V^2`, or `C f V^2 + b V`, to a measured table, by relative least squares.

    Args:
      table: table with measured power.
      static: adds the term `b V`, the part of power that does not switch.

    Returns:
      `(C, b, errors)`: in W/(Hz V^2), in W/V (0 without the static term), and the relative error
      of each point [K].
    """
    power = table.power_at(table.speed)
    columns = [table.frequency_hz * table.voltage_v**2] + [table.voltage_v] * static
    design = np.stack(columns, axis=1) / power[:, None]
    solution = np.linalg.lstsq(design, np.ones_like(power), rcond=None)[0]
    return float(solution[0]), float(solution[1]) if static else 0.0, design @ solution - 1.0
