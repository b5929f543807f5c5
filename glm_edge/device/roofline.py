"""Time of operators on an engine, and the efficiency of runtimes fitted to published speeds.

A decoded token takes `bytes / (share x peak bandwidth) + layers x layer_s`. The share belongs to a
runtime and an engine, since it is a property of software, and is shrunk towards the mean of all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from glm_edge.device.specs import DecodeRow, Device
from glm_edge.device.workload import Op, Work
from glm_edge.errors import DataError

# Start of the fit, and the standard deviation of log shares between runtimes that it assumes.
START_SHARE, START_LAYER_S = 0.6, 1e-4
SHRINKAGE = 0.35
ITERATIONS = 200
# Relative spread of a prefill rate that only one row supports.
LEAST_PREFILL_SPREAD = 0.3


@dataclass(frozen=True)
class Efficiency:
    """Fitted efficiency of decoding.

    Attributes:
      mean_share: share of the peak bandwidth of an unknown runtime.
      shares: share by (runtime, engine).
      layer_s: fixed seconds per layer.
      rows: count of rows that were fitted.
    """

    mean_share: float
    shares: dict[tuple[str, str], float]
    layer_s: float
    rows: int

    def share(self, runtime: str | None, engine: str) -> float:
        """Return the share of a runtime on an engine, or the mean if it was not fitted."""
        return self.shares.get((runtime or "", engine), self.mean_share)

    def token_s(
        self,
        bytes_per_token: ArrayLike,
        layers: int,
        bandwidth_bytes_s: ArrayLike,
        runtime: str | None,
        engine: str,
    ) -> Array:
        """Compute the seconds of a decoded token.

        Args:
          bytes_per_token: weights and cache that it reads.
          layers: count of decoder layers.
          bandwidth_bytes_s: peak bandwidth of the memory.
          runtime: name of the program, None for an unknown one.
          engine: `cpu`, `gpu` or `npu`.

        Returns:
          Seconds.
        """
        rate = jnp.asarray(bandwidth_bytes_s) * self.share(runtime, engine)
        return jnp.asarray(bytes_per_token, float) / rate + layers * self.layer_s

    def row_tokens_s(self, row: DecodeRow) -> float:
        """Predict the tokens per second of a published row."""
        memory_s = row.bytes_per_token / row.bandwidth_bytes_s / self.share(*row.runtime_engine)
        return 1.0 / (memory_s + row.layers * self.layer_s)


def fit_efficiency(rows: Sequence[DecodeRow]) -> Efficiency:
    """Fit shares of bandwidth and the time per layer to published speeds.

    Least squares on log times, by damped Gauss-Newton. Runtimes differ from the mean by a normal
    effect of standard deviation 0.35 relative to residuals of 1, as in ridge regression.

    Args:
      rows: published rows.

    Returns:
      The efficiency.

    Raises:
      DataError: there are no rows.
    """
    if not rows:
        raise DataError("fit_efficiency: at least one row is needed")
    classes = sorted({row.runtime_engine for row in rows})
    member = np.array([classes.index(row.runtime_engine) for row in rows])
    ideal_s = np.array([row.bytes_per_token / row.bandwidth_bytes_s for row in rows])
    layers = np.array([row.layers for row in rows], float)
    target = -np.log([row.decode_tokens_s for row in rows])
    one_hot = member[:, None] == np.arange(len(classes))

    def residuals(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        memory_s = ideal_s * np.exp(-x[0] - x[2:][member])
        layer_s = layers * np.exp(x[1])
        share = memory_s / (memory_s + layer_s)
        jacobian = np.column_stack([-share, 1 - share, -share[:, None] * one_hot])
        prior = np.hstack([np.zeros((len(classes), 2)), SHRINKAGE * np.eye(len(classes))])
        residual = np.concatenate([np.log(memory_s + layer_s) - target, SHRINKAGE * x[2:]])
        return residual, np.vstack([jacobian, prior])

    x = np.concatenate([np.log([START_SHARE, START_LAYER_S]), np.zeros(len(classes))])
    damping, (residual, jacobian) = 1e-3, residuals(x)
    for _ in range(ITERATIONS):
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.eye(len(x)), -jacobian.T @ residual)
        trial, trial_jacobian = residuals(x + step)
        if trial @ trial <= residual @ residual:
            x, residual, jacobian, damping = x + step, trial, trial_jacobian, damping / 3
            if np.abs(step).max() < 1e-10:
                break
        else:
            damping *= 4
    shares = {c: float(np.exp(x[0] + effect)) for c, effect in zip(classes, x[2:], strict=True)}
    return Efficiency(float(np.exp(x[0])), shares, float(np.exp(x[1])), len(rows))


def log_errors_by_chip(rows: Sequence[DecodeRow]) -> dict[str, np.ndarray]:
    """Predict the rows of each chip from the rows of all others.

    Args:
      rows: published rows of at least two chips.

    Returns:
      Log of predicted over published speed of each row, by chip.

    Raises:
      DataError: the rows are of one chip.
    """
    chips = sorted({row.chip for row in rows})
    if len(chips) < 2:
        raise DataError("log_errors_by_chip: rows of at least two chips are needed")
    errors = {}
    for chip in chips:
        fitted = fit_efficiency([row for row in rows if row.chip != chip])
        chosen = [row for row in rows if row.chip == chip]
        errors[chip] = np.log([fitted.row_tokens_s(row) / row.decode_tokens_s for row in chosen])
    return errors


@dataclass(frozen=True)
class PrefillRate:
    """Achieved rate of prompts.

    Attributes:
      ops_s: operations of products per second.
      spread: standard deviation of its logarithm.
      basis: rows that it comes from.
    """

    ops_s: float
    spread: float
    basis: str


def prefill_rate(
    rows: Sequence[DecodeRow], chip: str, runtime: str | None, engine: str
) -> PrefillRate:
    """Average the achieved rate of published prompts, of rows as similar as there are.

    Args:
      rows: published rows.
      chip: name of the chip.
      runtime: name of the program, None for any.
      engine: `cpu`, `gpu` or `npu`.

    Returns:
      The geometric mean of the rows of this chip and runtime, else of this runtime, else of the
      engine.

    Raises:
      DataError: no row of the engine has a speed of prompts.
    """
    rated = [
        (row, 2.0 * row.body_parameters * row.prefill_tokens_s)
        for row in rows
        if row.engine == engine and row.prefill_tokens_s and row.body_parameters and row.usable
    ]
    levels = (
        (f"{runtime} on {chip}", [x for r, x in rated if (r.chip, r.runtime) == (chip, runtime)]),
        (f"{runtime} on other chips", [x for r, x in rated if r.runtime == runtime]),
        (f"all runtimes of the {engine}", [x for _, x in rated]),
    )
    for basis, rates in levels:
        if rates:
            logs = np.log(rates)
            spread = max(float(logs.std()), LEAST_PREFILL_SPREAD)
            plural = "" if len(rates) == 1 else "s"
            text = f"{len(rates)} row{plural}: {basis}"
            return PrefillRate(math.exp(logs.mean()), spread, text)
    raise DataError(f"prefill_rate: no published prompt speed of the {engine!r:.60}")


def op_time_s(
    ops: Sequence[Op],
    ops_s: ArrayLike,
    bandwidth_bytes_s: ArrayLike,
    layer_s: float = 0.0,
    speed: ArrayLike = 1.0,
) -> Array:
    """Compute the time of each operator: the slower of products and memory, and fixed times.

    Args:
      ops: operators.
      ops_s: operations per second at top speed.
      bandwidth_bytes_s: achieved bandwidth.
      layer_s: fixed seconds per layer at top speed.
      speed: relative speed of the engine; memory does not depend on it.

    Returns:
      Seconds per operator [len(ops)].
    """
    counts = jnp.asarray([op.ops for op in ops], float)
    moved = jnp.asarray([op.bytes for op in ops], float)
    layers = jnp.asarray([op.layers for op in ops], float)
    roof_s = jnp.maximum(counts / (jnp.asarray(ops_s) * speed), moved / bandwidth_bytes_s)
    return roof_s + layers * layer_s / speed


def decode_tokens_s(
    device: Device, work: Work, efficiency: Efficiency, engine: str, runtime: str | None = None
) -> float:
    """Predict the tokens per second of a model that fits in memory.

    Args:
      device: the device.
      work: sums of one token.
      efficiency: fitted efficiency.
      engine: engine that decodes.
      runtime: name of the program, None for an unknown one.

    Returns:
      Tokens per second, without heat.
    """
    peak = device.values["dram.bandwidth_bytes_s"]
    return 1.0 / float(efficiency.token_s(work.bytes, work.layers, peak, runtime, engine))
