"""Options of a mask, and masks from scores, which all masking transforms share."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.prune.masks import allocation as allocations
from glm_edge.compress.prune.masks import shapes
from glm_edge.compress.prune.masks.shapes import Member, Pool, Shape
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.prune.scores.from_weights import Score
from glm_edge.compress.report import Row
from glm_edge.compress.transform import check_fraction, is_number
from glm_edge.errors import RecipeError

TENSOR, ROW = "tensor", "row"
Leaves = Mapping[str, Any]


@dataclass(frozen=True)
class MaskConfig:
    """Options of `mask`, parsed and checked."""

    name: str
    sparsity: float | None
    score: Score
    shape: Shape
    allocation: str
    within: str
    levels: tuple[float, ...]
    budget_bytes: int | None = None
    budget_flops: int | None = None
    label: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        *,
        score: str,
        shape: str,
        sparsity: float | None,
        allocation: str = allocations.UNIFORM,
        within: str | None = None,
        levels: Sequence[float] = (0.0,),
        **budgets: int | None,
    ) -> "MaskConfig":
        """Parse the options of a transform, see `glm_edge.prune.mask`.

        Raises:
          RecipeError: one has no meaning, or two contradict each other.
        """
        parsed_score, parsed_shape = weight_scores.parse(name, score), shapes.parse(name, shape)
        parsed_score.fits(name, parsed_shape.kind)
        known = (allocations.UNIFORM, allocations.GLOBAL, allocations.MEASURED)
        if allocation not in known:
            raise RecipeError(
                f"{name}: allocation must be one of {', '.join(known)}, not {allocation!r}"
            )
        if parsed_shape.kind == "n:m" and allocation != allocations.UNIFORM:
            raise RecipeError(f"{name}: shape={shape!r} is uniform; allocate other shapes")
        single = parsed_shape.kind == shapes.SINGLE and allocation == allocations.UNIFORM
        if within is None:
            within = ROW if parsed_score.kind == "wanda" and single else TENSOR
        if within not in (TENSOR, ROW) or (within == ROW and not single):
            raise RecipeError(
                f"{name}: within must be tensor, or row for unstructured masks under uniform "
                f"allocation, not {within!r}"
            )
        if not levels or not all(is_number(level) and 0 <= level < 1 for level in levels):
            raise RecipeError(f"{name}: levels must be sparsities in 0..1, below 1, not {levels}")
        config = cls(
            name,
            sparsity,
            parsed_score,
            parsed_shape,
            allocation,
            within,
            tuple(sorted(set(levels))),
            label=f"{shape}, {score}",
            **budgets,
        )
        return dataclasses.replace(config, sparsity=config._checked_sparsity())

    def _checked_sparsity(self) -> float | None:
        budgets = {"budget_bytes": self.budget_bytes, "budget_flops": self.budget_flops}
        budgets_set = {option: value for option, value in budgets.items() if value is not None}
        for option, value in budgets_set.items():
            if self.allocation != allocations.MEASURED or self.shape.of_matrix:
                raise RecipeError(
                    f"{self.name}: {option} is for allocation='measured' and shapes that can be "
                    f"taken out of the arrays ({', '.join(shapes.REMOVABLE)}); other masks save "
                    "neither bytes nor operations"
                )
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RecipeError(f"{self.name}: {option} must be a whole number, not {value!r}")
        fixed = self.shape.sparsity
        if fixed is not None and self.sparsity in (None, fixed):
            return fixed
        if len(budgets_set) + (self.sparsity is not None) != 1 or fixed is not None:
            hint = f"the shape says {fixed:g}" if fixed is not None else "give it or one budget"
            raise RecipeError(f"{self.name}: sparsity is {self.sparsity!r} and {hint}")
        if self.sparsity is not None:
            check_fraction(self.name, sparsity=self.sparsity)
        return self.sparsity

    @property
    def by_stage(self) -> bool:
        """True where one stage of a model can be masked without the others."""
        return (
            self.allocation == allocations.UNIFORM
            and self.shape.of_matrix
            and not self.score.reads_gradients
        )

    @property
    def fraction(self) -> float:
        """Sparsity, which all but measured allocations have."""
        if self.sparsity is None:
            raise RecipeError(f"{self.name}: sparsity is missing")
        return self.sparsity

    @property
    def reads(self) -> bool:
        """True where calibration is needed."""
        measures = self.allocation == allocations.MEASURED
        return measures or self.score.reads_inputs or self.score.reads_gradients


def without_masked(
    pools: Sequence[Pool], leaves: Leaves, scores: Sequence[Array]
) -> list[np.ndarray]:
    """Copy scores to the host, -inf for units masked before and inf for those that must remain."""
    all_scores = []
    for pool, pool_scores in zip(pools, scores, strict=True):
        values = np.array(pool_scores, np.float32)
        remaining = units_left(pool, leaves)
        if remaining is not None:
            values[~remaining] = -np.inf
        values[:, list(pool.needed)] = np.inf
        all_scores.append(values)
    return all_scores


def units_left(pool: Pool, leaves: Leaves) -> np.ndarray | None:
    """Mark the units that have a weight which is not masked.

    Args:
      pool: of units.
      leaves: parameters by path.

    Returns:
      bool [g, u]; None without a mask.
    """
    if not any(isinstance(leaves[member.path], boxes.Masked) for member in pool.members):
        return None
    rows = {member.path: _mask_of(member, leaves[member.path]) for member in pool.members}
    return np.asarray(pool.reduced(rows, np.inf)) > 0


def _mask_of(member: Member, leaf: Any) -> Array:
    keep = leaf.mask if isinstance(leaf, boxes.Masked) else jnp.ones(leaf.shape, bool)
    return member.layout.matrices(keep.astype(jnp.float32))


def masked_leaves(
    masking: MaskConfig,
    leaves: Leaves,
    pools: Sequence[Pool],
    scores: Sequence[np.ndarray],
    counts: Sequence[int],
) -> dict[str, boxes.Masked]:
    """Mask the lowest units of each pool.

    Args:
      masking: options of the mask.
      leaves: parameters by path.
      pools: of units.
      scores: [g, u] of each pool.
      counts: units that each group of each pool loses.

    Returns:
      Boxes by path.
    """
    keeps = [
        allocations.mark_kept(values, count) for values, count in zip(scores, counts, strict=True)
    ]
    sizes = {member.path: leaves[member.path].shape for pool in pools for member in pool.members}
    return {
        path: boxes.mask(leaves[path], jnp.asarray(keep))
        for path, keep in shapes.spread_over(pools, keeps, sizes).items()
    }


def mask_row(
    masking: MaskConfig, path: str, before: Any, after: boxes.Masked, note: str = ""
) -> Row:
    """Describe a masked weight in a row of the report."""
    old, new = (np.asarray(boxes.dense(leaf), np.float32) for leaf in (before, after))
    norm, lost = float(np.linalg.norm(old)), float(np.linalg.norm(new - old))
    stored = boxes.stored_bytes(after)
    parts = [part for part in (masking.label, note) if part]
    return Row(
        masking.name,
        path,
        f"masked ({', '.join(parts)})" if parts else "masked",
        float(np.mean(after.mask)),
        8 * stored / old.size,
        boxes.stored_bytes(before),
        stored,
        lost / norm if norm else 0.0,
    )


def mask_notes(shape: Shape, masks: Collection[boxes.Masked]) -> tuple[str, ...]:
    """Describe the bytes of masks, and the savings by zeros of this shape."""
    taken = sum(box.mask.size * box.mask.dtype.itemsize for box in masks)
    if shape.of_matrix:
        saved = "zeros of this shape save no bytes by themselves"
    else:
        saved = "bytes fall once masked units are taken out of the arrays (prune.compact)"
    return (f"masks take {taken:,} bytes, which are counted; {saved}",)
