"""GPTQ: column-wise quantization of weights against their calibration inputs."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.domains import named_domains
from glm_edge.compress.layerwise.runner import Replaced, StageContext
from glm_edge.compress.layerwise.stages import Leaves
from glm_edge.compress.quantize.options import Quantizer, SolverOptions
from glm_edge.compress.quantize.parameter import (
    box_of,
    dense_rows,
    quantize_leaf,
    relative_error,
    row,
)
from glm_edge.compress.quantize.solvers import products, triangular
from glm_edge.compress.quantize.solvers.gptq_solver import damped_factor, solve
from glm_edge.compress.quantize.solvers.products import Products
from glm_edge.compress.quantize.solvers.scales import normalized
from glm_edge.compress.quantize.solvers.shrinkage import (
    CROSS_VALIDATE,
    Choice,
    PlainRounding,
    Trial,
    choose,
)
from glm_edge.compress.timing import timed
from glm_edge.compress.transform import register
from glm_edge.errors import RecipeError
from glm_edge.params import Masked
from glm_edge.params.formats import PLAIN
from glm_edge.params.layouts import Layout

NAME = "quantize.gptq"
# Entries of inputs per Gram product: few large products are faster than many small ones.
ROWS_AT_ONCE = 1 << 23


@register(NAME)
class GPTQ(Quantizer):
    """Rounds columns in turn; each column compensates for the errors of earlier columns.

    The scale of a group is searched by output error when the group is reached. Then scales and
    codes are refined alternately. Zero points between levels, as of `ternary-g32-affine`, are
    fitted together with scales. Matrices without calibration inputs, such as embeddings, are
    rounded to nearest; the report counts them with the reason.

        recipe = ge.quantize.gptq("int4-g32")
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      format: format of the weights, such as `int4-g32`, see `glm_edge.params.Format`.
      where: see `glm_edge.quantize.rtn`, also for `fallback_bits` and `stacked`.
      scale: `mse` searches scales by output error; `max` uses the largest magnitude; `fit` fits the
        weights of a group, see `glm_edge.quantize.rtn`; `extreme` searches scales of both signs
        (symmetric integers only; phone kernels refuse negative scales).
      solver: options of the solver, see `glm_edge.compress.SolverOptions`.

    Raises:
      RecipeError: an option is invalid; on call, a pattern matches nothing or a quantized weight,
        columns do not divide into groups, or weights or inputs are not finite.
      DataError: on call, calibration is missing.

    References:
      GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
      https://arxiv.org/abs/2210.17323;
      QuantEase: Optimization-based Quantization for Language Models,
      https://arxiv.org/abs/2309.01885;
      Quantization Error Propagation, https://arxiv.org/abs/2504.09629;
      PT2-LLM: Post-Training Ternarization for Large Language Models (affine ternary, fitting and
      activation-aware grids), https://arxiv.org/abs/2510.03267.
    """

    needs_model: ClassVar[bool] = True
    unsupported: ClassVar[tuple[str, ...]] = PLAIN

    solver: SolverOptions = SolverOptions()

    def __post_init__(self) -> None:
        self._set(solver=SolverOptions.of(NAME, "solver", self.solver))
        super().__post_init__()

    @property
    def needs(self) -> str:  # type: ignore[override]  # options decide
        """Models whose inputs are collected."""
        return self.solver.needs

    @property
    def in_turn(self) -> bool:  # type: ignore[override]  # options decide
        """True if inputs are collected again after earlier matrices."""
        return self.solver.sequential

    def compress_stage(self, work: StageContext) -> Replaced:
        if not work.selected:
            return {}, []
        rounding, solver = self.config, self.solver
        formats = {p: rounding.format_of(p, work.columns(p)) for p in work.selected}
        replaced: Leaves = {}
        notes: dict[str, str] = {}
        errors: dict[str, float] = {}
        for inputs in matrices(NAME, work, replaced, solver):
            path, leaf = inputs.path, work.leaves[inputs.path]
            trial = PlainRounding(formats[path], rounding.scale, solver.act_order)
            shrinkage = inputs.shrinkage(solver, trial)
            codes, grid, info = solve(
                inputs.weight,
                inputs.gram,
                formats[path],
                rounding.scale,
                solver.act_order,
                solver.damping,
                mask=inputs.mask,
                refit=solver.refit,
                sweeps=solver.sweeps,
                shrinkage=shrinkage.gamma,
            )
            replaced[path] = box_of(path, leaf, codes, grid, formats[path], inputs.layout)
            errors[path] = info.loss
            notes[path] = f"output error {info.loss:.3g}"
            if info.damping != solver.damping:
                notes[path] += f", damping {info.damping:g}"
            notes[path] += shrinkage.note
            work.advance(path)
        for path in work.selected:
            if path not in replaced:
                leaf, layout = work.leaves[path], work.layouts[path]
                replaced[path] = quantize_leaf(path, leaf, formats[path], rounding.scale, layout)[0]
                notes[path] = f"to nearest: {work.unseen(path)}"
                work.advance(path)
        return replaced, [
            _row(work, path, replaced[path], notes[path], errors.get(path))
            for path in work.selected
        ]


gptq = GPTQ


class LinearInputs(NamedTuple):
    """A matrix with statistics of its inputs.

    Attributes:
      path: path of the parameter.
      weight: float32 [out, in], after compensating for input error.
      mask: bool [out, in], or None without a mask.
      gram: float32 [in, in], the sum of `x x^T` over calibration inputs.
      layout: layout of the parameter.
      domains: the parts of `gram` by domain; a single part without cross-validation.
    """

    path: str
    weight: Array
    mask: Array | None
    gram: Array
    layout: Layout
    domains: Mapping[str | None, Array]

    def shrinkage(self, solver: SolverOptions, trial: Trial) -> Choice:
        """Return the shrinkage of the matrix, compared by a trial, see `shrinkage.choose`."""
        return choose(solver.shrinkage, self.weight, self.mask, self.domains, solver.damping, trial)


def matrices(
    name: str,
    work: StageContext,
    replaced: Leaves,
    solver: SolverOptions,
) -> Iterator[LinearInputs]:
    """Iterate over the selected matrices of a stage, in the order of computation.

    Args:
      name: name of the transform for messages.
      work: context of the stage.
      replaced: quantized parameters by path. Parameters that the caller adds between two matrices
        change the inputs of later matrices.
      solver: options of the solver.

    Yields:
      Each matrix that has calibration inputs, with their statistics.

    Raises:
      RecipeError: weights or inputs are not finite.
    """
    domains: tuple[str, ...] = ()
    if solver.shrinkage == CROSS_VALIDATE:
        domains = named_domains(work.domains)
    groups = [tuple(path for path in group if path in work.selected) for group in work.readers()]
    # Matrices that read the same rows share one measurement.
    first = {path: group[0] for group in groups for path in group}
    if not solver.sequential:
        groups = [tuple(path for group in groups for path in group)]
    for group in filter(None, groups):
        readers: dict[str, list[str]] = {}
        for path in group:
            readers.setdefault(first[path], []).append(path)
        measured = _measured(work, replaced, readers, solver.propagate > 0, domains)
        for path, inputs in measured.items():
            gram = functools.reduce(jnp.add, inputs.grams.values())
            _check_inputs(name, path, gram, inputs.drift)
            weights = [dense_rows(p, work.leaves[p], work.layouts[p]) for p in readers[path]]
            if inputs.drift is not None:
                weights = _corrected(weights, gram, inputs.drift, solver.propagate, solver.damping)
            for reader, weight in zip(readers[path], weights, strict=True):
                leaf, layout = work.leaves[reader], work.layouts[reader]
                mask = layout.rows(leaf.mask) if isinstance(leaf, Masked) else None
                yield LinearInputs(reader, weight, mask, gram, layout, inputs.grams)


def _row(work: StageContext, path: str, box: Any, note: str, output_error: float | None) -> Any:
    before = work.leaves[path]
    return row(NAME, path, before, box, relative_error(before, box), note, output_error)


class _Measured(NamedTuple):
    """Gram matrices `X^T X` by domain, and the drift of `products.Products`."""

    grams: dict[str | None, Array]
    drift: Array | None


def _measured(
    work: StageContext,
    replaced: Leaves,
    readers: Mapping[str, Sequence[str]],
    paired: bool,
    domains: tuple[str, ...],
) -> dict[str, _Measured]:
    """Compute the products of inputs of matrices.

    Args:
      work: context of the stage.
      replaced: quantized parameters by path.
      readers: matrices that read the same rows, by the path whose rows are collected.
      paired: True for drifts from the original model too.
      domains: names of domains; with two or more, there is a Gram matrix per domain, otherwise one
        for all batches, under None.

    Returns:
      Products by path.
    """
    compute = getattr(work.model, "compute", "float32")
    paths = tuple(readers)
    original = work.original if paired else None
    paired = original is not None
    batches = work.rows(replaced, paths)
    original_batches = repeat({}) if original is None else original.rows(None, paths)
    apart = len(domains) > 1
    # Rows of all domains wait together, so each has its part of the limit.
    most = ROWS_AT_ONCE // len(domains) if apart else ROWS_AT_ONCE
    totals: dict[str, dict[str | None, Products]] = {}
    waiting: dict[tuple[str, str | None], list[tuple[Array, ...]]] = {}
    weights: dict[str, Array | None] = dict.fromkeys(paths)
    for path in paths if paired else ():
        outputs = sum(work.layouts[p].extent(work.leaves[p].shape)[0] for p in readers[path])
        if products.is_shorter(outputs, work.columns(path), compute):
            matrices = [dense_rows(p, work.leaves[p], work.layouts[p]) for p in readers[path]]
            weights[path] = jnp.concatenate(matrices)

    def add(path: str, domain: str | None) -> None:
        parts = zip(*waiting.pop((path, domain)), strict=True)
        rows, *originals = (jnp.concatenate(part) for part in parts)
        result = timed(
            "Gram", products.products, rows, *originals, weight=weights[path], compute=compute
        )
        by_domain = totals.setdefault(path, {})
        by_domain[domain] = (
            products.added(by_domain[domain], result) if domain in by_domain else result
        )

    domain_of_batch = work.domains if apart else repeat(None)
    for domain, collected, originals in zip(
        domain_of_batch, batches, original_batches, strict=False
    ):
        for path, rows in collected.items():
            parts = waiting.setdefault((path, domain), [])
            parts.append((rows, originals[path]) if paired else (rows,))
            if sum(part[0].size for part in parts) >= most:
                add(path, domain)
    for key in list(waiting):
        add(*key)
    return {path: _joined(by_domain) for path, by_domain in totals.items()}


def _joined(by_domain: dict[str | None, Products]) -> _Measured:
    grams = {domain: products.symmetric(total.strips) for domain, total in by_domain.items()}
    drifts = [total.drift for total in by_domain.values() if total.drift is not None]
    return _Measured(grams, functools.reduce(jnp.add, drifts) if drifts else None)


def _corrected(
    weights: list[Array], gram: Array, drift: Array, propagate: float, damping: float
) -> list[Array]:
    """Return the weights that reproduce the original outputs on the current inputs.

    Args:
      weights: weights [out, in] that read the rows.
      gram: `H`, [in, in].
      drift: drift [in, in] of the rows, or its product with all weights, see `Products`.
      propagate: see `SolverOptions`.
      damping: see `SolverOptions`.

    Returns:
      `W' = W + propagate * W (X0 - X)^T X H^-1` for each weight `W`.
    """
    factor, _, _ = timed("factor", damped_factor, gram, damping)
    drift = normalized(drift, jnp.max(jnp.abs(gram)))
    if drift.shape[0] == drift.shape[1]:
        residuals = [_residual(weight, drift) for weight in weights]
    else:
        ends = list(itertools.accumulate(len(weight) for weight in weights))
        residuals = jnp.split(drift, ends[:-1])
    pairs = zip(weights, residuals, strict=True)
    return [_shifted(weight, factor, residual, propagate) for weight, residual in pairs]


@jax.jit
def _all_finite(gram: Array, drift: Array | None) -> Array:
    finite = jnp.isfinite(gram).all()
    return finite if drift is None else finite & jnp.isfinite(drift).all()


@jax.jit
def _residual(weight: Array, drift: Array) -> Array:
    return jnp.matmul(weight, drift, precision="highest")


@jax.jit
def _shifted(weight: Array, factor: Array, residual: Array, propagate: float) -> Array:
    # W' by two triangular systems with H = R R^T.
    half = triangular.solve_upper(factor, jax.lax.optimization_barrier(residual).T)
    return weight + propagate * triangular.solve_upper(factor, half, transposed=True).T


def _check_inputs(name: str, path: str, gram: Array, drift: Array | None) -> None:
    if not bool(_all_finite(gram, drift)):
        raise RecipeError(
            f"{name}: {path}: its calibration inputs contain NaN or infinity; fix the weights "
            "before it or the batch"
        )
