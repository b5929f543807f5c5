"""Choice of one format per group of parameters within a budget of bytes.

References:
  Pushing the Limits of LLM Quantization via the Linearity Theorem (losses of layers are additive,
  and dynamic programming chooses formats), https://arxiv.org/abs/2411.17525.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.allocate.divergence import GROUPS, Divergence, split
from glm_edge.compress.allocate.knapsack import (
    KEEP,
    GroupRow,
    Option,
    Plan,
    best_within,
    bytes_with,
    format_everything,
    frontier,
)
from glm_edge.compress.batches import Batch
from glm_edge.compress.calibration import called
from glm_edge.compress.layerwise.runner import layouts_in
from glm_edge.compress.transform import Progress, Transform, chain, check_pattern, registered
from glm_edge.errors import BoxError, RecipeError
from glm_edge.params import Format, Quantized
from glm_edge.params.layouts import Layout
from glm_edge.params.patterns import compiled, shared_steps
from glm_edge.params.tree import Params

FORMATS = ("bfloat16", "int8", "int4-g32", "int3-g32", "int2-g32")
_FALLBACK_BITS = 8


def plan(
    model: nn.Module,
    params: Params,
    budget_bytes: int,
    formats: Sequence[str] = FORMATS,
    calibration: Sequence[Batch] | None = None,
    groups: Sequence[str] | None = None,
    transform: str | Transform = "rtn",
    progress: Progress | bool | None = None,
    rng: Array | None = None,
    without: Sequence[str] = (),
) -> Plan:
    """Find the recipe with the least loss within a budget of bytes, and measure it.

    The function compresses each group alone in each format, and measures the divergence of the
    logits from the uncompressed model on held-out batches, per kind of batch (text, images, audio).
    It assumes that losses of groups are additive. Dynamic programming finds the formats with the
    least total, averaged over kinds. Finally the recipe runs, and its divergence is measured.

    Every second batch of a kind is held out from the transform.

        plan = ge.plan(model, params, budget_bytes=2_500_000, calibration=batches)
        model, params, report = plan.recipe(model, params)

    Args:
      model: Linen module.
      params: parameters of the model.
      budget_bytes: maximum bytes of all stored parameters.
      formats: format strings such as `int4-g32` (see `glm_edge.params.Format`), or `keep` for no
        change. A matrix whose columns do not divide into groups uses int8 per channel.
      calibration: batches; at least one per kind of input, and two if the transform needs
        calibration.
      groups: regular expressions. A matrix belongs to the first one that matches its path; paths
        with the same matched text form one group. None means attention and feed-forward network of
        each decoder layer, each part of an encoder, the embedding and the head.
      transform: name of a quantizing transform such as `rtn` or `gptq`, or a transform whose other
        options are used.
      progress: True, or a function `progress(stage, done, total)`.
      rng: jax key for transforms that draw random values.
      without: inputs of the model that calibration intentionally lacks.

    Returns:
      The plan; `plan.recipe(model, params, calibration)` applies it.

    Raises:
      RecipeError: the budget is below the smallest size, which the message names, or an option is
        invalid.
      DataError: calibration is missing, or lacks an input of the model.
    """
    if not isinstance(budget_bytes, int) or isinstance(budget_bytes, bool) or budget_bytes < 1:
        raise RecipeError(f"plan: budget_bytes must be a whole number, not {budget_bytes!r}")
    maker = _Maker(transform)
    members = group_paths(params, GROUPS if groups is None else groups)
    leaves = dict(boxes.path_items(params))
    layouts = layouts_in("plan", model, leaves, calibration, None)
    assigned = {name: _assign(params, name, layouts) for name in dict.fromkeys(formats)}
    if not assigned:
        raise RecipeError("plan: formats is empty")
    for chosen in assigned.values():
        maker.check(chosen)
    batches.check(model, calibration, "plan", without)
    calibrating, held_out = split(calibration, maker.reads)
    reader = called(model, calibration)
    measure = Divergence(reader, params, held_out)
    inside = {path for paths in members.values() for path in paths}
    fixed = boxes.stored_bytes([leaf for path, leaf in leaves.items() if path not in inside])

    def compress(recipe: Transform) -> tuple[nn.Module, Params]:
        return recipe(
            model, params, calibration=calibrating, rng=rng, without=_lacking(model, calibrating)
        )[:2]

    options: dict[str, list[Option]] = {name: [] for name in members}
    total = len(members) * len(assigned) + 1
    for number, (name, chosen) in enumerate(assigned.items()):
        leaves_together = None
        if chosen:
            recipe = maker.recipe(chosen, sorted(inside), leaves)
            leaves_together = dict(boxes.path_items(compress(recipe)[1]))
            # A transform that also changes other parameters must run on each group separately.
            if any(
                leaves_together[path] is not leaf
                for path, leaf in leaves.items()
                if path not in inside
            ):
                leaves_together = None
        for index, (group, paths) in enumerate(members.items()):
            if not chosen:
                changed = {}
            elif leaves_together is None:
                group_recipe = maker.recipe(chosen, paths, leaves)
                changed = dict(boxes.path_items(compress(group_recipe)[1]))
            else:
                changed = {path: leaves_together[path] for path in paths}
            loss = measure({**leaves, **changed}) if changed else dict.fromkeys(measure.kinds, 0.0)
            group_formats = {path: chosen[path] for path in paths if path in chosen}
            group_bytes = bytes_with({path: leaves[path] for path in paths}, group_formats, layouts)
            options[group].append(Option(name, group_bytes, loss))
            if callable(progress):
                progress(f"plan: {group} {name}", number * len(members) + index + 1, total)
    points = frontier(list(options.values()), fixed)
    point = best_within(points, budget_bytes)
    best = {g: options[g][index] for g, index in zip(options, point.choice, strict=True)}
    recipe = maker.chosen_recipe(best, members, assigned, leaves)
    compressed_model, compressed = compress(recipe)
    if boxes.stored_bytes(compressed) != point.bytes:
        raise RecipeError(
            f"plan: {maker.name} stored {boxes.stored_bytes(compressed):,} bytes, but its formats "
            f"need {point.bytes:,}; plan cannot use a transform that stores more than codes and "
            "scales"
        )
    compressed_reader = called(compressed_model, calibration)
    measured = measure(dict(boxes.path_items(compressed)), compressed_reader)
    if callable(progress):
        progress("plan: measured", total, total)
    return Plan(
        recipe=recipe,
        rows=tuple(
            GroupRow(
                group,
                best[group].format,
                boxes.count([leaves[path] for path in paths]),
                best[group].bytes,
                best[group].loss,
            )
            for group, paths in members.items()
        ),
        budget_bytes=budget_bytes,
        predicted_bytes=point.bytes,
        measured_bytes=boxes.stored_bytes(compressed),
        fixed_bytes=fixed,
        predicted={k: sum(option.loss[k] for option in best.values()) for k in measure.kinds},
        measured=measured,
        points=tuple((point.bytes, point.cost) for point in points),
        held_out={kind: len(kind_batches) for kind, kind_batches in held_out.items()},
    )


@shared_steps()
def group_paths(params: Params, patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Group the matrices that are not quantized yet, in the tree's order.

    Args:
      params: tree of arrays and boxes.
      patterns: regular expressions, see `plan`.

    Returns:
      Paths by name of the group.

    Raises:
      RecipeError: a pattern is malformed, or no pattern matches.
    """
    for pattern in patterns:
        check_pattern("plan", "groups", pattern)
    groups: dict[str, list[str]] = {}
    for path, leaf in boxes.path_items(params):
        if not boxes.is_matrix(path, leaf) or isinstance(leaf, Quantized):
            continue
        group = next(filter(None, (compiled(pattern).match(path) for pattern in patterns)), None)
        if group:
            groups.setdefault(group, []).append(path)
    if not groups:
        raise RecipeError(f"plan: groups={list(patterns)} match no matrix that is not quantized")
    return {name: tuple(paths) for name, paths in groups.items()}


class _Maker:
    """Builds the transforms that store parameters in chosen formats."""

    def __init__(self, transform: str | Transform) -> None:
        self._transform: Any
        if isinstance(transform, Transform):
            self._transform = transform
            if transform.teachers:
                raise RecipeError("plan: transform= contains arrays; pass one without arrays")
        else:
            kind: Any = registered(f"quantize.{transform}")
            self._transform = kind(scale="mse") if transform == "rtn" else kind()
        self.name = self._transform.name
        known = {item.name for item in dataclasses.fields(self._transform)}
        missing = {"format", "where"} - known
        if missing:
            raise RecipeError(
                f"plan: {self.name} has no option {min(missing)}=, so plan cannot use it; use rtn"
            )
        self.reads = getattr(self._transform, "needs", "nothing") != "nothing"

    def check(self, formats: Mapping[str, Format]) -> None:
        """Check each format by building a transform."""
        for format in set(formats.values()):
            self._of(format, None)

    def recipe(
        self, formats: Mapping[str, Format], paths: Any, leaves: Mapping[str, Any]
    ) -> Transform:
        """Build a transform that stores paths in formats."""
        by_format: dict[Format, list[str]] = {}
        for path in paths:
            by_format.setdefault(formats[path], []).append(path)
        return chain(
            *(
                self._of(format, pattern_of(paths_of_format, leaves))
                for format, paths_of_format in by_format.items()
            )
        )

    def chosen_recipe(
        self,
        chosen: Mapping[str, Option],
        members: Mapping[str, Sequence[str]],
        assigned: Mapping[str, Mapping[str, Format]],
        leaves: Mapping[str, Any],
    ) -> Transform:
        """Build a transform that stores every group in its chosen format."""
        formats = {
            path: assigned[option.format][path]
            for group, option in chosen.items()
            for path in members[group]
            if path in assigned[option.format]
        }
        return self.recipe(formats, list(formats), leaves)

    def _of(self, format: Format, where: str | None) -> Transform:
        kind: Any = registered("quantize.rtn")
        if format.plain:
            return kind(format, where=where)
        return dataclasses.replace(self._transform, format=format, where=where)


def pattern_of(paths: Sequence[str], leaves: Mapping[str, Any]) -> str:
    """Build a regular expression that matches exactly these paths among a tree's matrices."""
    matrices = [path for path, leaf in leaves.items() if boxes.is_matrix(path, leaf)]
    wanted, parts = set(paths), []
    remaining = list(paths)
    while remaining:
        names = remaining[0].split("/")
        # The shortest prefix whose matrices are all wanted.
        for depth in range(1, len(names) + 1):
            prefix = "/".join(names[:depth])
            below = [p for p in matrices if p == prefix or p.startswith(f"{prefix}/")]
            if wanted.issuperset(below):
                break
        parts.append(prefix)
        remaining = [path for path in remaining if path not in below]
    return f"^(?:{'|'.join(map(re.escape, parts))})(?:/|$)"


def _assign(params: Params, name: str, layouts: Mapping[str, Layout]) -> dict[str, Format]:
    if name == KEEP:
        return {}
    try:
        format = Format.parse(name)
    except (BoxError, TypeError) as error:
        raise RecipeError(f"plan: {error}; or {KEEP!r}") from error
    return format_everything(params, format, Format(f"int{_FALLBACK_BITS}"), layouts)


def _lacking(model: nn.Module, calibrating: Sequence[Batch] | None) -> tuple[str, ...]:
    kinds = set().union(*map(batches.keys_of, () if calibrating is None else calibrating))
    return tuple(name for name in ("images", "audio") if name not in kinds)
