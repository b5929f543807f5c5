"""Scenarios of a simulated phone that the benchmark and the tables share.

Parameters that were fitted to a published row are constants here, and are printed with the row.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge.device import governors, thermal
from glm_edge.device.machine import machine
from glm_edge.device.schedule import Task, arrays_of
from glm_edge.device.simulate import Result, simulate
from glm_edge.device.specs import device
from glm_edge.device.ticks import run

# iPhone 17 Pro decoding Gemma 4 E2B (dev.to/john-rocky): seconds to -10 %, seconds to -25 %, and
# the share of the first speed after ten minutes.
THROTTLING = {
    "MLX, gpu": (5.0, 35.0, 0.38),
    "LiteRT, gpu": (13.0, 40.0, 0.48),
    "Core ML, npu": (93.0, 390.0, 0.67),
}
FIRST_TOKENS_S = {"MLX, gpu": 48.0, "LiteRT, gpu": 56.0, "Core ML, npu": 33.0}
# Fitted to the nine values of `THROTTLING`, from a physical start (Nelder-Mead, 900 evaluations).
FITTED_W = {"MLX, gpu": 9.22, "LiteRT, gpu": 7.89, "Core ML, npu": 5.45}
FITTED = {
    "thermal.gpu_to_spreader_k_w": 4.01,
    "thermal.spreader_to_case_k_w": 3.60,
    "thermal.case_to_air_k_w": 3.73,
    "thermal.gpu_j_k": 0.81,
    "thermal.spreader_j_k": 16.42,
    "thermal.case_j_k": 67.76,
    "gpu.power_exponent": 1.28,
}
FITTED_DIE_C, FITTED_SKIN_C, FITTED_GAIN_W_K = 78.37, 41.66, 0.25
# The engines that do not run are taken out of the network.
_ABSENT = {
    "phone.base_power_w": 0.7,
    "gpu.idle_share": 0.0,
    "gpu.leakage_w_v": 0.0,
    "cpu.idle_share": 0.0,
    "cpu.leakage_w_v": 0.0,
    "npu.idle_share": 0.0,
    "npu.leakage_w_v": 0.0,
    "thermal.cpu_j_k": 0.01,
    "thermal.npu_j_k": 0.01,
}
THROTTLING_S, THROTTLING_TICK_S = 600.0, 0.5


class Throttling(NamedTuple):
    """Simulated throttling of a runtime.

    Attributes:
      first_s: seconds to -10 % of the first speed, 600 if it is not reached.
      second_s: seconds to -25 %.
      share: share of the first speed after ten minutes.
      skin_c: temperature of the case after ten minutes.
    """

    first_s: float
    second_s: float
    share: float
    skin_c: float


def throttling() -> dict[str, Throttling]:
    """Simulate the throttling of three runtimes on one phone, with the fitted parameters."""
    phone = device("a19pro")
    limit = governors.policy(
        "performance",
        die=governors.proportional(FITTED_DIE_C, 1.0, FITTED_GAIN_W_K, 0.3),
        skin=governors.proportional(FITTED_SKIN_C, 1.0, 3 * FITTED_GAIN_W_K, 0.3),
    )
    results = {}
    for name, watts in FITTED_W.items():
        values = FITTED | _ABSENT | {"gpu.top_power_w": watts}
        arrays = machine(phone, values, THROTTLING_TICK_S)
        task = Task("decode", "gpu", float(arrays.ops_s[1]) * THROTTLING_TICK_S)
        ticks = round(THROTTLING_S / THROTTLING_TICK_S)
        _, trace = run(arrays, limit, arrays_of([task]), steps=1, ticks=ticks, every=1)
        speed = np.asarray(trace.speed)[:, 1]
        results[name] = Throttling(
            _first_below(speed, 0.9),
            _first_below(speed, 0.75),
            float(speed[-20:].mean()),
            float(trace.skin_c[-1]),
        )
    return results


def _first_below(speed: np.ndarray, share: float) -> float:
    below = speed < share
    return float((below.argmax() + 1) * THROTTLING_TICK_S) if below.any() else THROTTLING_S


# A model of 3 B parameters at about 3.3 bits: 1.25 GB and 6e9 operations per token, 28 layers.
DECODE = Task("decode", "gpu", 6e9, 1.25e9, 3e-3)
DECODE_LAYERS = 28
FRAME_HZ = 60.0
FRAME = Task("frame", "gpu", 4e9, 0.04e9, 1e-3, priority=10.0, period_s=1 / FRAME_HZ)


def by_layer(task: Task, layers: int = DECODE_LAYERS) -> Task:
    """Split the units of a task into layers, at whose ends it can be interrupted."""
    return dataclasses.replace(
        task,
        ops=task.ops / layers,
        bytes=task.bytes / layers,
        fixed_s=task.fixed_s / layers,
        parts=layers,
    )


def preemption(seconds: float = 30.0) -> dict[str, Result]:
    """Simulate frames of 60 Hz beside decoding, with three ways to share a phone."""
    phone = machine(device("sm8550"))
    cases = {
        "token boundaries": DECODE,
        "layer boundaries": by_layer(DECODE),
        "decoding on the npu": dataclasses.replace(DECODE, engine="npu"),
    }
    policy = governors.policy("performance")
    return {name: simulate(phone, policy, [task, FRAME], seconds) for name, task in cases.items()}


CORES, BUSY_CORES = 4, 2
CORE_TICK_S = 0.1
# Fitted, with the window, to the four values of the published table (random search within 3 to 40
# K/W, 1 to 6 W, 2 to 10 K/W, 1 to 10 K/W and exponents of 1.2 to 3; 672 evaluations of this code).
# The first and the last value are at a bound.
ROTATION = {
    "core_k_w": 40.0,
    "core_w": 2.70645458,
    "case_k_w": 2.26100808,
    "package_k_w": 1.14500873,
    "exponent": 1.2,
}
ROTATION_WINDOW_S = 180.0
HOT_C, COOL_C, LOW_SPEED = 85.0, 70.0, 0.6


class Rotation(NamedTuple):
    """Means of a window that starts at the beginning, over time.

    Attributes:
      mean_c: mean of the hottest core [S].
      performance: mean speed of the busy cores [S].
    """

    mean_c: np.ndarray
    performance: np.ndarray


def rotation(parameters: Mapping[str, float], rotate: bool, seconds: float = 1800.0) -> Rotation:
    """Simulate two busy cores of four, static or always the two coolest, with trips per core.

    Args:
      parameters: as `ROTATION`.
      rotate: moves the work to the coolest cores.
      seconds: simulated time.

    Returns:
      Running means.
    """
    package, case = CORES, CORES + 1
    links: dict[tuple[int, int | None], float] = {
        (core, package): parameters["core_k_w"] for core in range(CORES)
    }
    links[package, case] = parameters["package_k_w"]
    links[case, None] = parameters["case_k_w"]
    network = thermal.network(links, np.array([0.3] * CORES + [6.0, 120.0]))
    step = thermal.discretize(network, CORE_TICK_S)
    hottest, speed = _rotate(
        step,
        parameters["core_w"],
        parameters["exponent"],
        rotate,
        round(seconds / CORE_TICK_S),
    )
    count = np.arange(1, len(hottest) + 1)
    return Rotation(
        np.cumsum(np.asarray(hottest, float)) / count, np.cumsum(np.asarray(speed, float)) / count
    )


@functools.partial(jax.jit, static_argnames=("rotate", "ticks"))
def _rotate(step: Any, core_w: Any, exponent: Any, rotate: bool, ticks: int) -> Any:
    trip = governors.policy(hot_c=HOT_C, cool_c=COOL_C, low_speed=LOW_SPEED)

    def body(carry: Any, _: None) -> Any:
        rise, hot = carry
        rank = jnp.argsort(jnp.argsort(rise[:CORES])) if rotate else jnp.arange(CORES)
        busy = (rank < BUSY_CORES).astype(jnp.float32)
        speed, _ = governors.trips(trip, jnp.full(CORES, 75.0), hot)
        power = jnp.concatenate([busy * core_w * speed**exponent + 0.05, jnp.array([0.2, 0.5])])
        rise = rise + thermal.advance(step, rise, power)[0]
        die_c = rise[:CORES] + 25.0
        _, hot = governors.trips(trip, die_c, hot)
        return (rise, hot), (die_c.max(), (busy * speed).sum() / BUSY_CORES)

    start = (jnp.zeros(CORES + 2), jnp.zeros(CORES))
    return jax.lax.scan(body, start, None, length=ticks)[1]
