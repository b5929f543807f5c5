"""Shrinkage of a Hessian towards its diagonal, chosen by cross-validation over domains.

GPTQ compensates the error of a column by its correlations with later columns. Correlations of the
calibration text hold less for another text than input energies, the diagonal. Shrinkage `gamma`
therefore scales the entries off the diagonal by `1 - gamma`. Cross-validation solves a matrix on
all domains but one for each `gamma`, and measures the output error on the omitted domain.

Arrays are transposed internally, [in, out].

References:
  A well-conditioned estimator for large-dimensional covariance matrices, Ledoit and Wolf,
  https://doi.org/10.1016/S0047-259X(03)00096-4.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.compress.quantize.solvers import columns, gptq_solver
from glm_edge.compress.quantize.solvers.products import energy
from glm_edge.params import Format

CROSS_VALIDATE = "cross-validate"
# On nano at 2 bits, KL changes by at most 8 % between 0.1, 0.3 and 0.6, so few values suffice.
# With larger values, GPTQ hardly compensates.
GRID = (0.0, 0.05, 0.1, 0.3, 0.6)
# Rows share a Hessian, so a sample of them ranks the values of gamma.
MOST_ROWS = 128

Trial = Callable[[Array, Array, float | Array, Array | None], Array]
"""A hashable function `(weight, gram, damping, mask)` that returns errors `W - Q`, [in, out]."""


class Choice(NamedTuple):
    """A shrinkage.

    Attributes:
      gamma: the shrinkage, in 0..1.
      domains: count of domains that cross-validation compared; 0 without it.
    """

    gamma: float
    domains: int = 0

    @property
    def note(self) -> str:
        """Text for the report; empty without shrinkage and without cross-validation."""
        if self.domains:
            return f", shrinkage {self.gamma:g} by {self.domains} domains"
        return f", shrinkage {self.gamma:g}" if self.gamma else ""


@dataclass(frozen=True)
class PlainRounding:
    """The solve of a trial: one pass of GPTQ, without refitted scales and coordinate descent.

    Attributes:
      format: target format.
      scale: see `gptq_solver.solve`.
      act_order: see `gptq_solver.solve`.
    """

    format: Format
    scale: str
    act_order: bool

    def __call__(
        self, weight: Array, gram: Array, damping: float | Array, mask: Array | None
    ) -> Array:
        """Return the errors of a weight [in, out]."""
        order = None
        if self.act_order:
            groups = self.format.num_groups(weight.shape[0])
            order = gptq_solver.column_order(gram, groups, self.format.qtype == "ternary34")
            weight, gram = weight[order], gram[order][:, order]
            mask = None if mask is None else mask[order]
        factor, _ = gptq_solver.factored(gram, damping)
        codes, grid = gptq_solver.by_groups(weight, factor, mask, self.format, self.scale)
        errors = weight - columns.decoded(codes, grid, self.format)
        return errors if order is None else errors[jnp.argsort(order)]


def choose(
    option: float | str,
    weight: Array,
    mask: Array | None,
    grams: Mapping[str | None, Array],
    damping: float,
    trial: Trial,
) -> Choice:
    """Return the shrinkage of an option for one matrix.

    Args:
      option: a shrinkage, or `cross-validate`.
      weight: `W`, [out, in].
      mask: bool [out, in], False where a weight stays zero; None without a mask.
      grams: float32 [in, in] by domain. The entry of None is never omitted.
      damping: see `gptq_solver.solve`; it is not increased for a matrix without a factor.
      trial: solve to compare by.

    Returns:
      The option itself; or the value of `GRID` with the least mean of relative output errors on the
      omitted domains, the smaller one of equal values. 0 for fewer than two domains, and if no
      trial has a finite error.
    """
    if not isinstance(option, str):
        return Choice(float(option))
    names = [name for name in grams if name is not None]
    if len(names) < 2:
        return Choice(0.0)
    rows = np.unique(np.linspace(0, len(weight) - 1, min(MOST_ROWS, len(weight))).astype(int))
    weight, mask = weight[rows].T, None if mask is None else mask[rows].T
    errors = np.zeros(len(GRID))
    for omitted in names:
        others = (gram for name, gram in grams.items() if name != omitted)
        train = functools.reduce(jnp.add, others)
        losses = _losses(weight, train, grams[omitted], mask, damping, trial)
        errors += np.asarray(losses, np.float64) / len(names)
    # A matrix without a factor has no finite error.
    errors = np.where(np.isfinite(errors), errors, np.inf)
    return Choice(GRID[int(np.argmin(errors))], len(names))


@functools.partial(jax.jit, static_argnames="trial")
def _losses(
    weight: Array,
    train: Array,
    omitted: Array,
    mask: Array | None,
    damping: float,
    trial: Trial,
) -> Array:
    """Compute the relative output error on the omitted domain per value of `GRID`."""
    weight = weight.astype(jnp.float32)
    train, omitted = gptq_solver.scaled(train), gptq_solver.scaled(omitted)
    power = energy(omitted, weight)

    def loss(gamma: Array) -> Array:
        errors = trial(weight, gptq_solver.shrunk(train, gamma), damping, mask)
        return energy(omitted, errors) / jnp.where(power > 0, power, 1.0)

    # A loop, since batched products may sum in another order for another count of threads.
    return jax.lax.map(loss, jnp.asarray(GRID, jnp.float32))
