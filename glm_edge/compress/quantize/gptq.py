"""Rounding weights column by column, against the inputs that meet them."""

import functools
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.compress.quantize.leaves import (
    box_of,
    dense_rows,
    quantize_leaf,
    relative_error,
    row,
)
from glm_edge.compress.quantize.options import Rounding, check_groups, spelled_out
from glm_edge.compress.rounding import triangular
from glm_edge.compress.rounding.gptq import MOST_DAMPING, damped_factor, solve
from glm_edge.compress.rounding.grid import normalized
from glm_edge.compress.stages import ROWS, Leaves
from glm_edge.compress.stagewise import Replaced, StageWork, register_stagewise
from glm_edge.compress.transform import Transform
from glm_edge.errors import RecipeError
from glm_edge.kernels import matmul
from glm_edge.params import Masked
from glm_edge.params.formats import PLAIN
from glm_edge.params.layouts import Layout

NAME = "quantize.gptq"
MOST_SWEEPS = 10_000
# Numbers of rows that are multiplied at once: few large products are faster than many small.
ROWS_AT_ONCE = 1 << 24


def gptq(
    bits: int = 4,
    group_size: int | str | None = None,
    symmetric: bool = True,
    where: str | None = None,
    scale: str = "mse",
    scale_dtype: str | None = None,
    qtype: str | None = None,
    fallback_bits: int | None = None,
    act_order: bool = True,
    damping: float = 0.01,
    sequential: bool = True,
    propagate: float = 0.5,
    refit: bool = True,
    sweeps: int = 3,
    stacked: str | None = None,
) -> Transform:
    """Rounds columns in turn, each making up for the errors of those before it.

    Scales are searched while a group is rounded, by the error at the output; then scales and codes
    are improved in turns. Matrices whose inputs calibration cannot see, such as embeddings, are
    rounded to nearest; the report counts them and says why.

        recipe = ge.quantize.gptq(bits=4, group_size=32)
        model, params, report = recipe(model, params, calibration=batches)

    Args:
      bits: 8, 6, 5, 4, 3 or 2.
      group_size: columns that share a scale; None per channel, `tensor` for one scale a matrix.
      symmetric: False for affine, with an integer zero point.
      where: regular expression searched in each path; None is every matrix not yet quantized.
      scale: `mse`, searched; `max`, from the largest magnitude; `extreme`, searched with both signs
        (symmetric integers only; scales may be negative, which phone kernels refuse).
      scale_dtype: `float32`, `float16` or `bfloat16`; None is float32 per channel and bfloat16 for
        groups.
      qtype: another format than integers, such as `ternary`, `ternary34` or `nf4`.
      fallback_bits: per-channel width for a matrix whose columns are not whole groups; None raises
        there.
      act_order: takes columns by falling input energy, groups staying whole.
      damping: fraction of the mean diagonal of the Gram matrix that is added to it, times ten until
        it has a factor.
      sequential: within a layer, collects the inputs of a matrix again when those before it are
        rounded; False collects once a layer.
      propagate: in 0..1, how much of the error of the inputs the weights make up for before they
        are rounded; at zero only the weights' own errors count.
      refit: fits scales by least squares after rounding.
      sweeps: passes of coordinate descent over the codes.
      stacked: regular expression of stock weights whose first axis is a layer axis (`nn.scan`),
        where the model itself does not show it.

    Returns:
      The transform; it needs calibration.

    Raises:
      RecipeError: an option has no meaning; on call, a pattern matches nothing or a quantized
        weight, columns are not whole groups, or weights or inputs are not finite.
      DataError: on call, calibration is missing.

    References:
      GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
      https://arxiv.org/abs/2210.17323;
      QuantEase: Optimization-based Quantization for Language Models,
      https://arxiv.org/abs/2309.01885;
      Quantization Error Propagation, https://arxiv.org/abs/2504.09629.
    """
    options = spelled_out(locals())
    Rounding.of(NAME, options, without=PLAIN)
    for name in ("act_order", "sequential", "refit"):
        if not isinstance(options[name], bool):
            raise RecipeError(f"{NAME}: {name} must be True or False, not {options[name]!r}")
    if not _is_number(damping) or not 0 <= damping <= MOST_DAMPING:
        raise RecipeError(
            f"{NAME}: damping must be a number of 0 to {MOST_DAMPING:g}, not {damping!r}"
        )
    if not _is_number(propagate) or not 0 <= propagate <= 1:
        raise RecipeError(f"{NAME}: propagate must be a number in 0..1, not {propagate!r}")
    if not isinstance(sweeps, int) or isinstance(sweeps, bool) or not 0 <= sweeps <= MOST_SWEEPS:
        raise RecipeError(
            f"{NAME}: sweeps must be a whole number of 0 to {MOST_SWEEPS}, not {sweeps!r}"
        )
    return Transform(NAME, options)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _round_stage(
    work: StageWork,
    act_order: bool,
    damping: float,
    sequential: bool,
    propagate: float,
    refit: bool,
    sweeps: int,
    **shared: Any,
) -> Replaced:
    if not work.selected:
        return {}, []
    rounding = Rounding.of(NAME, shared)
    formats = {p: rounding.format_of(p, work.columns(p)) for p in work.selected}
    replaced: Leaves = {}
    notes: dict[str, str] = {}
    errors: dict[str, float] = {}
    for met in matrices(NAME, work, replaced, sequential, propagate, damping):
        path, leaf = met.path, work.leaves[met.path]
        codes, grid, info = solve(
            met.weight,
            met.gram,
            formats[path],
            rounding.scale,
            act_order,
            damping,
            mask=met.mask,
            refit=refit,
            sweeps=sweeps,
        )
        replaced[path] = box_of(path, leaf, codes, grid, formats[path], met.layout)
        errors[path] = info.loss
        notes[path] = f"output error {info.loss:.3g}"
        if info.damping != damping:
            notes[path] += f", damping {info.damping:g}"
        work.advance(path)
    for path in work.selected:
        if path not in replaced:
            leaf, layout = work.leaves[path], work.layouts[path]
            replaced[path] = quantize_leaf(path, leaf, formats[path], rounding.scale, layout)[0]
            notes[path] = f"to nearest: {work.unseen(path)}"
            work.advance(path)
    return replaced, [
        _row(work, path, replaced[path], notes[path], errors.get(path)) for path in work.selected
    ]


class Met(NamedTuple):
    """A matrix and the inputs that are seen to meet it.

    Attributes:
      path: of the parameter.
      weight: float32 [out, in], with what it makes up for of the error of its inputs.
      mask: bool [out, in], or None where nothing is masked.
      gram: float32 [in, in], the sum of `x x^T`.
      layout: of the parameter.
    """

    path: str
    weight: Array
    mask: Array | None
    gram: Array
    layout: Layout


def matrices(
    name: str,
    work: StageWork,
    replaced: Leaves,
    sequential: bool,
    propagate: float,
    damping: float,
) -> Iterator[Met]:
    """The selected matrices of a stage in the order in which they run, with their inputs.

    Args:
      name: of the transform, for messages.
      work: on the stage.
      replaced: parameters by path; what the caller puts there between two matrices makes the inputs
        of those that run later.
      sequential: see `gptq`.
      propagate: see `gptq`.
      damping: see `gptq`.

    Yields:
      Those that an input is seen to meet.

    Raises:
      RecipeError: weights or inputs are not finite.
    """
    groups = [tuple(path for path in group if path in work.selected) for group in work.readers()]
    # What reads the same rows is measured once.
    first = {path: group[0] for group in groups for path in group}
    if not sequential:
        groups = [tuple(path for group in groups for path in group)]
    for group in filter(None, groups):
        met = tuple(dict.fromkeys(first[path] for path in group))
        grams, drifts = _measured(work, replaced, met, propagate > 0)
        for path in group:
            gram, drift = grams[first[path]], drifts.get(first[path])
            _check_inputs(name, path, gram, drift)
            leaf, layout = work.leaves[path], work.layouts[path]
            weight = dense_rows(path, leaf, layout)
            if drift is not None:
                weight = _corrected(weight, gram, drift, propagate, damping)
            mask = None
            if isinstance(leaf, Masked):
                mask = layout.rows(leaf.mask)
            yield Met(path, weight, mask, gram, layout)


def needs(options: Mapping[str, Any]) -> str:
    """What a stage needs: both models where errors of the inputs are made up for."""
    return "both" if options["propagate"] > 0 else "inputs"


register_stagewise(NAME, gptq, _round_stage, needs=needs, check=check_groups)


def _row(work: StageWork, path: str, box: Any, note: str, output_error: float | None) -> Any:
    before = work.leaves[path]
    return row(NAME, path, before, box, relative_error(before, box), note, output_error)


def _measured(
    work: StageWork, replaced: Leaves, paths: tuple[str, ...], paired: bool
) -> tuple[Mapping[str, Array], Mapping[str, Array]]:
    """Gram matrices of the inputs, and of what they miss of the original ones with them."""
    compute = getattr(work.model, "compute", "float32")
    paired = paired and work.original is not None
    ours, theirs = work.batches(replaced), work.original.batches() if paired else repeat(None)
    grams: dict[str, Array] = {}
    drifts: dict[str, Array] = {}
    waiting: dict[str, list[tuple[Array, ...]]] = {}

    def add(path: str) -> None:
        rows, *meant = (jnp.concatenate(parts) for parts in zip(*waiting.pop(path), strict=True))
        found = _products(rows, *meant, compute=compute)
        for sums, found_now in zip((grams, drifts), found, strict=False):
            sums[path] = sums[path] + found_now if path in sums else found_now

    for now, before in zip(ours, theirs, strict=False):
        seen = now.collect(ROWS, paths=paths)
        meant = before.collect(ROWS, paths=paths) if paired else {}
        for path, rows in seen.items():
            parts = waiting.setdefault(path, [])
            parts.append((rows, meant[path]) if paired else (rows,))
            if sum(part[0].size for part in parts) >= ROWS_AT_ONCE:
                add(path)
    for path in list(waiting):
        add(path)
    return grams, drifts


@functools.partial(jax.jit, static_argnames="compute")
def _products(rows: Array, meant: Array | None = None, *, compute: str) -> tuple[Array, ...]:
    product = matmul.dense_bf16 if compute == "bfloat16" else matmul.dense
    # Laid out anew: a product along the first axis of both takes twice the time on CPU.
    columns = jax.lax.optimization_barrier(rows.T)
    gram = product(columns, columns)
    if meant is None:
        return (gram,)
    return gram, product(jax.lax.optimization_barrier((meant - rows).T), columns)


def _corrected(weight: Array, gram: Array, drift: Array, propagate: float, damping: float) -> Array:
    """The weight that gives on the inputs as they are what it gave on the original ones."""
    factor, _, _ = damped_factor(gram, damping)
    drift = normalized(drift, jnp.max(jnp.abs(gram)))
    return _shifted(weight, factor, drift, propagate)


@jax.jit
def _all_finite(gram: Array, drift: Array | None) -> Array:
    finite = jnp.isfinite(gram).all()
    return finite if drift is None else finite & jnp.isfinite(drift).all()


@jax.jit
def _shifted(weight: Array, factor: Array, drift: Array, propagate: float) -> Array:
    pull = jnp.matmul(weight, drift, precision="highest")
    half = triangular.solve_upper(factor, jax.lax.optimization_barrier(pull).T)
    return weight + propagate * triangular.solve_upper(factor, half, transposed=True).T


def _check_inputs(name: str, path: str, gram: Array, drift: Array | None) -> None:
    if not bool(_all_finite(gram, drift)):
        raise RecipeError(
            f"{name}: {path}: calibration gives NaN or infinity at its input; mend the weights "
            "before it or the batch"
        )
