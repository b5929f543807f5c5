"""Sizes of parameters in other formats, optimal allocation within a budget, and its table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from glm_edge import params as boxes
from glm_edge.compress.transform import Transform, to_json
from glm_edge.errors import BoxError, RecipeError
from glm_edge.params import Format
from glm_edge.params.layouts import Layout, by_name
from glm_edge.params.tree import Params, is_matrix
from glm_edge.tables import table_lines

KEEP = "keep"
# Limit of distinct search states; beyond it, states of similar size are merged.
_STATES = 1 << 17


def bytes_of(shape: tuple[int, ...], format: Format) -> int:
    """Return the stored bytes of a weight, including scales and zero points.

    Args:
      shape: shape `[..., out, in]` of the weight.
      format: storage format.

    Returns:
      Bytes.

    Raises:
      BoxError: columns do not divide into groups.
    """
    format.num_groups(shape[-1])
    return format.stored_bytes(shape)


def bytes_with(
    params: Params, formats: Mapping[str, Format], layouts: Mapping[str, Layout] | None = None
) -> int:
    """Compute the stored bytes of a tree with some matrices in other formats.

    Args:
      params: concrete or abstract arrays and boxes.
      formats: formats of matrices by path; other parameters keep theirs.
      layouts: layouts by path; None infers them from paths.

    Returns:
      Bytes.
    """
    return sum(
        bytes_of(_as_rows(path, leaf.shape, layouts), formats[path])
        if path in formats
        else boxes.stored_bytes(leaf)
        for path, leaf in boxes.path_items(params)
    )


def _as_rows(
    path: str, shape: tuple[int, ...], layouts: Mapping[str, Layout] | None
) -> tuple[int, ...]:
    """Return the stored shape of a matrix, `[..., out, in]`."""
    layout = by_name(path, shape) if layouts is None else layouts[path]
    if layout is None:
        raise RecipeError(
            f"plan: {path} {list(shape)}: its name does not define which axes are inputs"
        )
    return (*shape[: layout.stack], *layout.extent(shape))


def format_everything(
    params: Params,
    format: Format,
    fallback: Format,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Format]:
    """Map every matrix to the format, or to the fallback if columns do not divide into groups."""
    formats = {}
    for path, leaf in boxes.path_items(params):
        if is_matrix(path, leaf) and not isinstance(leaf, boxes.Quantized):
            try:
                format.num_groups(_as_rows(path, leaf.shape, layouts)[-1])
                formats[path] = format
            except BoxError:
                formats[path] = fallback
    return formats


class Option(NamedTuple):
    """A format for a group of parameters.

    Attributes:
      format: name of the format.
      bytes: stored bytes of the group.
      loss: mean divergence from the uncompressed model in nats per token, by kind of batch.
    """

    format: str
    bytes: int
    loss: Mapping[str, float]

    @property
    def cost(self) -> float:
        """Mean loss over kinds of batches, the additive cost of the search."""
        return max(0.0, float(np.mean(list(self.loss.values())))) if self.loss else 0.0


class Point(NamedTuple):
    """A Pareto-optimal size: its bytes, predicted loss, and the chosen option per group."""

    bytes: int
    cost: float
    choice: tuple[int, ...]


def frontier(groups: Sequence[Sequence[Option]], fixed_bytes: int = 0) -> list[Point]:
    """Compute the Pareto front of size and loss.

    Dynamic programming over groups; dominated states (not smaller and not better) are dropped.

    Args:
      groups: options of each group.
      fixed_bytes: bytes of parameters outside of all groups.

    Returns:
      Points by increasing size and decreasing loss.

    References:
      Pushing the Limits of LLM Quantization via the Linearity Theorem,
      https://arxiv.org/abs/2411.17525.
    """
    sizes, costs = np.array([fixed_bytes], np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    # Extend every state by every option of the group, and keep the non-dominated states.
    for options in groups:
        own_sizes = np.array([option.bytes for option in options], np.int64)
        own_costs = np.array([option.cost for option in options])
        all_sizes = (sizes[:, None] + own_sizes).ravel()
        all_costs = (costs[:, None] + own_costs).ravel()
        order = np.lexsort((all_costs, all_sizes))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], all_costs[order][:-1]]))
        states = _thinned(order[all_costs[order] < best_before], all_sizes)
        steps.append((states // len(options), states % len(options)))
        sizes, costs = all_sizes[states], all_costs[states]
    # Backtrack from the final states to the option of each group.
    choices = np.empty((len(sizes), len(groups)), np.int64)
    state = np.arange(len(sizes))
    for index in reversed(range(len(groups))):
        parent, chosen = steps[index]
        choices[:, index] = chosen[state]
        state = parent[state]
    rows = zip(sizes, costs, choices, strict=True)
    return [Point(int(size), float(cost), tuple(map(int, row))) for size, cost, row in rows]


def _thinned(states: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    if len(states) <= _STATES:
        return states
    low, high = sizes[states[0]], sizes[states[-1]]
    bucket = (sizes[states] - low) * (_STATES - 1) // (high - low)
    # Keep the last state of each bucket, which has the least loss, and the smallest state.
    last = np.append(bucket[1:] != bucket[:-1], True)
    last[0] = True
    return states[last]


def best_within(points: Sequence[Point], budget_bytes: int) -> Point:
    """Select the point with the least loss within the budget.

    Args:
      points: points of `frontier`.
      budget_bytes: maximum bytes.

    Returns:
      The point.

    Raises:
      RecipeError: every point exceeds the budget; the message names the smallest size.
    """
    fitting = [point for point in points if point.bytes <= budget_bytes]
    if not fitting:
        raise RecipeError(
            f"plan: budget_bytes={budget_bytes:,} is below {points[0].bytes:,}, the smallest size "
            "with these formats; add a smaller format, or prune layers, heads, neurons or "
            "vocabulary first"
        )
    return fitting[-1]


@dataclass(frozen=True)
class GroupRow:
    """The choice of a plan for one group of parameters.

    Attributes:
      group: name of the group.
      format: chosen format.
      weights: count of weights.
      bytes: stored bytes.
      loss: predicted contribution to the divergence in nats per token, by kind of batch.
    """

    group: str
    format: str
    weights: int
    bytes: int
    loss: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """A recipe within a budget of bytes, with predicted and measured divergence.

    Attributes:
      recipe: the transform.
      rows: one row per group.
      budget_bytes: requested budget.
      predicted_bytes: bytes of all parameters, computed from shapes.
      measured_bytes: bytes of all parameters after the recipe.
      fixed_bytes: bytes of parameters outside of all groups (norms, biases, tables).
      predicted: predicted divergence in nats per token by kind of batch, the sum over groups.
      measured: measured divergence of the compressed model, in the same unit.
      points: `(bytes, predicted divergence)` of the Pareto front.
      held_out: count of held-out batches by kind.
    """

    recipe: Transform
    rows: tuple[GroupRow, ...]
    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    fixed_bytes: int
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    points: tuple[tuple[int, float], ...] = field(repr=False)
    held_out: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = list(self.predicted)
        lines = [
            ["group", "format", "weights", "bytes", "bits/weight", *(f"KL {k}" for k in kinds)]
        ]
        for row in self.rows:
            bits = f"{8 * row.bytes / max(row.weights, 1):.3f}"
            losses = [f"{row.loss[kind]:.2e}" for kind in kinds]
            lines.append(
                [row.group, row.format, f"{row.weights:,}", f"{row.bytes:,}", bits, *losses]
            )
        lines.append(["(no group)", KEEP, "", f"{self.fixed_bytes:,}", "", *[""] * len(kinds)])
        total = [f"{self.predicted[kind]:.2e}" for kind in kinds]
        lines.append(["predicted", "", "", f"{self.predicted_bytes:,}", "", *total])
        measured = [f"{self.measured[kind]:.2e}" for kind in kinds]
        lines.append(["measured", "", "", f"{self.measured_bytes:,}", "", *measured])
        ratio = [_ratio(self.measured[kind], self.predicted[kind]) for kind in kinds]
        same = _ratio(self.measured_bytes, self.predicted_bytes)
        lines.append(["measured / predicted", "", "", same, "", *ratio])
        text = table_lines(lines, range(2, len(lines[0])))
        rule = "-" * max(map(len, text))
        counts = ", ".join(f"{count} {kind}" for kind, count in self.held_out.items())
        used = f"budget {self.budget_bytes:,} bytes, {self.predicted_bytes / self.budget_bytes:.1%}"
        last = f"{used} used; KL in nats per token on held-out batches: {counts}"
        return "\n".join([text[0], rule, *text[1:-4], rule, *text[-4:], rule, last])

    def to_json(self) -> str:
        """Format the plan, including its recipe, as JSON."""
        fields: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("budget_bytes", "predicted_bytes", "measured_bytes", "fixed_bytes")
        }
        fields |= {
            name: dict(getattr(self, name)) for name in ("predicted", "measured", "held_out")
        }
        fields["groups"] = [{**vars(row), "loss": dict(row.loss)} for row in self.rows]
        fields["points"] = [list(point) for point in self.points]
        fields["recipe"] = json.loads(to_json(self.recipe))
        return json.dumps(fields, indent=2) + "\n"


def _ratio(measured: float, predicted: float) -> str:
    return f"{measured / predicted:.3f}" if predicted else "-"
