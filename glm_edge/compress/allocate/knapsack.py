"""Sizes of parameters in other formats, the best choice within a budget, and the table about it."""

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
# States of the search that are kept apart; beyond, neighbours in size share one.
_STATES = 1 << 17


def bytes_of(shape: tuple[int, ...], format: Format) -> int:
    """Stored bytes of a weight `[..., out, in]`, scales and zero points included.

    Raises:
      BoxError: its columns are not whole groups.
    """
    format.num_groups(shape[-1])
    return format.stored_bytes(shape)


def bytes_with(
    params: Params, formats: Mapping[str, Format], layouts: Mapping[str, Layout] | None = None
) -> int:
    """Stored bytes of a tree once some of its matrices are in other formats.

    Args:
      params: arrays and boxes, or their abstract values.
      formats: of matrices by path; what is not named stays as it is.
      layouts: which axes of each matrix are inputs, by path; None takes what names say.

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
    """The shape in which a matrix is stored, `[..., out, in]`."""
    layout = by_name(path, shape) if layouts is None else layouts[path]
    if layout is None:
        raise RecipeError(
            f"plan: {path} {list(shape)}: its name does not say which axes are inputs"
        )
    return (*shape[: layout.stack], *layout.extent(shape))


def format_everything(
    params: Params,
    format: Format,
    fallback: Format,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Format]:
    """The format of every matrix: the one asked for, or the fallback where groups do not divide."""
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
      format: its name.
      bytes: stored bytes of the group.
      loss: mean divergence from the uncompressed model, in nats a token, by kind of batch.
    """

    format: str
    bytes: int
    loss: Mapping[str, float]

    @property
    def cost(self) -> float:
        """Averages over kinds of batches, which the search adds up."""
        return max(0.0, float(np.mean(list(self.loss.values())))) if self.loss else 0.0


class Point(NamedTuple):
    """A size that can be reached, the least loss predicted for it, and the option of each group."""

    bytes: int
    cost: float
    choice: tuple[int, ...]


def frontier(groups: Sequence[Sequence[Option]], fixed_bytes: int = 0) -> list[Point]:
    """Every size worth choosing: none smaller has as little loss.

    Dynamic programming over bytes, a group at a time; of two states the one that is larger and
    loses as much is dropped.

    Args:
      groups: options of each group.
      fixed_bytes: of what no group holds.

    Returns:
      Points by rising size and falling loss.
    """
    sizes, costs = np.array([fixed_bytes], np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
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
    # The last of a bucket loses least, and the first of all stays reachable.
    last = np.append(bucket[1:] != bucket[:-1], True)
    last[0] = True
    return states[last]


def best_within(points: Sequence[Point], budget_bytes: int) -> Point:
    """The point of least loss that fits.

    Raises:
      RecipeError: none does; the message names the smallest size.
    """
    fitting = [point for point in points if point.bytes <= budget_bytes]
    if not fitting:
        raise RecipeError(
            f"plan: budget_bytes={budget_bytes:,} is below {points[0].bytes:,}, the smallest size "
            "that these formats reach; add a smaller format, or remove layers, heads, neurons or "
            "vocabulary first"
        )
    return fitting[-1]


@dataclass(frozen=True)
class GroupRow:
    """The choice of a plan for one group of parameters.

    Attributes:
      group: name.
      format: chosen.
      weights: number of them.
      bytes: stored.
      loss: predicted divergence that it adds, in nats a token, by kind of batch.
    """

    group: str
    format: str
    weights: int
    bytes: int
    loss: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """A recipe that fits a budget, with what was predicted and what was then measured.

    Attributes:
      recipe: the transform.
      rows: a line for each group.
      budget_bytes: asked for.
      predicted_bytes: of all parameters, from shapes.
      measured_bytes: of all parameters, as stored by the recipe.
      fixed_bytes: of what no group holds (norms, biases, tables).
      predicted: divergence in nats a token by kind of batch: the sum over groups.
      measured: the same of the model that the recipe made.
      points: `(bytes, predicted divergence)` of every size worth choosing.
      held_out: batches of each kind that divergence was measured on.
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
        last = f"{used} used; KL in nats a token on batches held out: {counts}"
        return "\n".join([text[0], rule, *text[1:-4], rule, *text[-4:], rule, last])

    def to_json(self) -> str:
        """The plan as JSON, its recipe included."""
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
