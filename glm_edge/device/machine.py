"""A device as arrays, so that `jax.vmap` runs many phones, or one phone with varied assumptions.

Letters: `E` engines, `K` operating points, `N` thermal nodes: the die of each engine, the heat
spreader, the case.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from glm_edge.device import thermal
from glm_edge.device.specs import ENGINES, UNITS, Device
from glm_edge.device.thermal import Numbers
from glm_edge.errors import DataError

TICK_S = 0.02
LOWEST_SPEED, FINE_POINTS = 0.1, 64
AMBIENT_C = 25.0
ASSUMPTION_SPREAD = 0.3
# Shares are at most 1.
_CLIPPED = 1.0


class Machine(NamedTuple):
    """Arrays of a device, of numpy until a compiled program reads them.

    Attributes:
      speed: ascending relative speeds [E, K].
      voltage_v: voltages [E, K].
      switching_w: power of a busy engine without leakage [E, K].
      ops_s: achieved operations per second at top speed [E].
      bandwidth_bytes_s: achieved bandwidth of each engine alone [E].
      shared_bytes_s: achieved bandwidth of all together [].
      dram_j_byte: energy per byte moved [].
      base_w: power of display, radio and rails, which heats the case [].
      stall_share: share of switching power that a stalled engine draws [E].
      idle_share: share that an idle engine draws [E].
      leakage_w_v: leakage per volt at 25 C [E].
      leakage_fold_k: kelvins per e-fold of leakage [].
      step: exact thermal step of one tick.
      capacity_j_k: heat capacities [N].
      ambient_c: temperature of the air [].
    """

    speed: Numbers
    voltage_v: Numbers
    switching_w: Numbers
    ops_s: Numbers
    bandwidth_bytes_s: Numbers
    shared_bytes_s: Numbers
    dram_j_byte: Numbers
    base_w: Numbers
    stall_share: Numbers
    idle_share: Numbers
    leakage_w_v: Numbers
    leakage_fold_k: Numbers
    step: thermal.Step
    capacity_j_k: Numbers
    ambient_c: Numbers


def thermal_network(values: Mapping[str, float]) -> thermal.Network:
    """Build the network of a device: dies to the spreader, to the case, to the air.

    Args:
      values: numbers of `specs.UNITS`.

    Returns:
      The network of `len(ENGINES) + 2` nodes.
    """
    spreader = len(ENGINES)
    case = spreader + 1
    links: dict[tuple[int, int | None], float] = {
        (index, spreader): values[f"thermal.{engine}_to_spreader_k_w"]
        for index, engine in enumerate(ENGINES)
    }
    links[spreader, case] = values["thermal.spreader_to_case_k_w"]
    links[case, None] = values["thermal.case_to_air_k_w"]
    nodes = (*ENGINES, "spreader", "case")
    return thermal.network(links, np.array([values[f"thermal.{node}_j_k"] for node in nodes]))


def machine(
    device: Device,
    values: Mapping[str, float] | None = None,
    tick_s: float = TICK_S,
    ambient_c: float = AMBIENT_C,
) -> Machine:
    """Build the arrays of a device.

    Args:
      device: the device.
      values: numbers that replace those of the device.
      tick_s: thermal step in seconds.
      ambient_c: temperature of the air in C.

    Returns:
      The arrays.

    Raises:
      DataError: `values` names an unknown number.
    """
    unknown = set(values or {}) - set(UNITS)
    if unknown:
        raise DataError(f"machine: {min(unknown)!r:.60} is not a number of a device")
    numbers = device.values | dict(values or {})
    speed, voltage, watts = device.cpu_points()
    speeds, voltages = [speed], [voltage]
    powers = [watts * numbers["cpu.power_scale"]]
    # The points of a phone's GPU and NPU are not public; a fine grid depends on none of them.
    fine = np.linspace(LOWEST_SPEED, 1.0, FINE_POINTS)
    for engine in ENGINES[1:]:
        # Power over speed is `C f V^2`, so voltage grows with half of the exponent above 1.
        exponent = numbers[f"{engine}.power_exponent"]
        speeds.append(fine)
        voltages.append(numbers[f"{engine}.top_voltage_v"] * fine ** ((exponent - 1) / 2))
        powers.append(numbers[f"{engine}.top_power_w"] * fine**exponent)
    leakage = np.array([numbers[f"{engine}.leakage_w_v"] for engine in ENGINES])
    # Tables state all power at 25 C, so leakage is taken out of them once.
    tables = [
        np.stack([_padded(row, FINE_POINTS) for row in rows]) for rows in (speeds, voltages, powers)
    ]
    switching = np.maximum(tables[2] - leakage[:, None] * tables[1], 0.0)
    network = thermal_network(numbers)
    peak = numbers["dram.bandwidth_bytes_s"]

    def by_engine(name: str) -> np.ndarray:
        return np.asarray([numbers[f"{engine}.{name}"] for engine in ENGINES], float)

    def scalar(name: str, factor: float = 1.0) -> np.ndarray:
        return np.asarray(factor * numbers[name], float)

    return Machine(
        speed=tables[0],
        voltage_v=tables[1],
        switching_w=switching,
        ops_s=by_engine("ops_s"),
        bandwidth_bytes_s=np.minimum(by_engine("bandwidth_share"), _CLIPPED) * peak,
        shared_bytes_s=scalar("dram.shared_share", peak),
        dram_j_byte=scalar("dram.energy_j_byte"),
        base_w=scalar("phone.base_power_w"),
        stall_share=by_engine("stall_share"),
        idle_share=by_engine("idle_share"),
        leakage_w_v=np.asarray(leakage, float),
        leakage_fold_k=scalar("thermal.leakage_fold_k"),
        step=thermal.discretize(network, tick_s),
        capacity_j_k=np.asarray(network.capacity_j_k, float),
        ambient_c=np.asarray(ambient_c, float),
    )


def variations(
    device: Device, count: int, seed: int, spread: float = ASSUMPTION_SPREAD
) -> list[dict[str, float]]:
    """Draw values of a device's assumed numbers, each uniformly within a share of its value.

    Args:
      device: the device; measured and published numbers do not vary.
      count: count of draws.
      seed: seed of the draws.
      spread: largest relative change, 0.3 for 30 %.

    Returns:
      Values by name, per draw; shares stay at most 1, and the skin's limit varies by 3 K.
    """
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(count):
        factors = dict(
            zip(device.assumed, rng.uniform(-spread, spread, len(device.assumed)), strict=True)
        )
        draws.append({name: _varied(name, device.values[name], f) for name, f in factors.items()})
    return draws


def _varied(name: str, value: float, factor: float) -> float:
    unit, _, highest = UNITS[name]
    if unit == "C":
        # A share of a Celsius temperature has no meaning; 10 K per unit of spread.
        return value + 10.0 * factor
    if name.endswith("power_exponent"):
        return 1.0 + (value - 1.0) * (1.0 + factor)
    return min(value * (1.0 + factor), highest)


def _padded(row: np.ndarray, points: int) -> np.ndarray:
    """Repeat the top point of a table, so that all tables have one length."""
    return np.pad(row, (0, points - len(row)), mode="edge")


def stacked(machines: Sequence[Machine]) -> Machine:
    """Stack machines for `jax.vmap`.

    Args:
      machines: at least one machine.

    Returns:
      A machine whose arrays have a leading axis.
    """
    return jax.tree.map(lambda *arrays: np.stack(arrays), *machines)


__all__ = [
    "Machine",
    "machine",
    "stacked",
    "thermal_network",
    "variations",
]
