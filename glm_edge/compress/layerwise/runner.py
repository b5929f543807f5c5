"""Layer-wise transforms, which compress one stage of a model at a time.

Such a transform is one function of a `StageContext`. The same function serves calls in memory,
chains, and `compress_checkpoint`, which keeps one stage in memory.
"""

import contextlib
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import called
from glm_edge.compress.domains import domain_of
from glm_edge.compress.layerwise.stages import (
    ROWS,
    Leaves,
    Stage,
    State,
    Statistic,
    first_states,
    stages,
)
from glm_edge.compress.layerwise.walk import Walk, supports_walk
from glm_edge.compress.readings import UNWATCHED, Layouts, layouts_of
from glm_edge.compress.report import Report, Row
from glm_edge.compress.transform import Context, Result, Transform
from glm_edge.errors import DataError, RecipeError
from glm_edge.params import Quantized
from glm_edge.params.layouts import Layout
from glm_edge.params.tree import Params, nested

NEEDS = ("nothing", "inputs", "both")
_UNSEEN = ", as calibration cannot record their inputs"
# Actions of rows for matrices that a transform treats differently, and the common reason.
_FALLBACKS = {
    "to nearest": _UNSEEN,
    "by magnitude": _UNSEEN,
    "without a range": _UNSEEN,
    "without a factor": "",
}
Replaced = tuple[Leaves, list[Row]]


@dataclass
class StageInputs:
    """One stage of a model with its parameters and inputs.

    Attributes:
      stage: the stage.
      leaves: parameters of the stage by full path, arrays and boxes.
      states: state of each calibration batch before the stage; empty if inputs are not needed.
      borrowed: parameters of earlier stages that the stage reads too.
      walk: pass of the batches in segments, shared by all views of the stage; None without one.
    """

    stage: Stage
    leaves: Leaves
    states: Sequence[State] = ()
    borrowed: Leaves = field(default_factory=dict)
    walk: Walk | None = None

    def collect(
        self,
        statistic: Statistic,
        leaves: Leaves | None = None,
        paths: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Reduce the input rows of each weight.

        Args:
          statistic: reduction such as `ROWS`, see `glm_edge.compress.layerwise.stages`.
          leaves: parameters by path that replace those of the stage.
          paths: paths of the weights; None selects all.

        Returns:
          Results by path of the weight.
        """
        return self.stage.collect(self._decoded(leaves), self.states, statistic, paths)

    def readers(self) -> list[tuple[str, ...]]:
        """Group the weights that read the same rows, in the order of computation."""
        groups: dict[tuple[str, ...], None] = {}
        # Each reading traces the stage, so only one batch per distinct shape is read.
        distinct = {str(jax.tree.map(jax.typeof, state)): state for state in self.states}
        for state in distinct.values():
            groups.update(dict.fromkeys(self.stage.readers(self._all(None), state)))
        return list(groups)

    def batches(self, leaves: Leaves | None = None) -> list["StageInputs"]:
        """Split the stage into one `StageInputs` per batch, with weights dequantized once.

        Args:
          leaves: parameters by path that replace those of the stage.

        Returns:
          One entry per batch.
        """
        decoded = self._decoded(leaves)
        return [StageInputs(self.stage, decoded, [state]) for state in self.states]

    def rows(self, leaves: Leaves | None, paths: Sequence[str]) -> Iterator[dict[str, Array]]:
        """Iterate over the input rows of weights, batch by batch.

        With a walk and one path, the pass continues from the previous call, see `Walk.rows`.

        Args:
          leaves: parameters by path that replace those of the stage.
          paths: paths of the weights.

        Yields:
          Rows float32 [N, in] by path, per batch.
        """
        if self.walk is None or len(paths) != 1:
            for view in self.batches(leaves):
                yield view.collect(ROWS, paths=paths)
        else:
            yield from self.walk.rows(self._all(leaves), paths[0])

    def outputs(self, leaves: Leaves | None = None) -> list[Array]:
        """Return the activations after the stage, of the batches that have any."""
        return [state["x"] for state in self.run(leaves) if "x" in state]

    def run(self, leaves: Leaves | None = None) -> list[State]:
        """Return the states after the stage."""
        return self.stage.run(self._decoded(leaves), self.states)

    def finish(self) -> list[State]:
        """Return the states after the stage; a walk continues from its last rows."""
        return self.run() if self.walk is None else self.walk.finish(self._all(None))

    def _all(self, leaves: Leaves | None) -> Leaves:
        return {**self.borrowed, **self.leaves, **(leaves or {})}

    def _decoded(self, leaves: Leaves | None) -> Leaves:
        """Return all parameters, dequantized once for all batches if results stay equal."""
        leaves_by_path = self._all(leaves)
        if getattr(self.stage.module, "compute", None) != "float32":
            return leaves_by_path
        return {
            path: leaf.replace(dtype="float32").unbox() if isinstance(leaf, Quantized) else leaf
            for path, leaf in leaves_by_path.items()
        }


@dataclass
class StageContext(StageInputs):
    """Inputs of a layer-wise transform for one stage.

    Attributes:
      model: the complete model.
      selected: paths in this stage that the transform's `where` matches and that are not quantized.
      named: all paths in this stage that `where` matches, quantized or not.
      layouts: layouts by path; access to an unknown one raises RecipeError.
      original: the same stage of the uncompressed model, with its inputs; only for needs="both".
      context: context of the transform.
      rng: key of this stage, or None.
      domains: domain of each batch of `states`, None for a batch without one.
      done: function of the path of a finished parameter.
    """

    model: nn.Module | None = None
    selected: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    original: StageInputs | None = None
    context: Context | None = None
    rng: Array | None = None
    domains: Sequence[str | None] = ()
    done: Callable[[str], None] = lambda path: None
    _reasons: dict[str, str] | None = None

    @property
    def uncompressed(self) -> StageInputs:
        """Return the same stage before any rounding.

        Raises:
          RecipeError: the transform does not declare needs="both".
        """
        if self.original is None:
            raise RecipeError(f"{self.stage.name}: the original's inputs are for needs='both'")
        return self.original

    def advance(self, path: str) -> None:
        """Report a finished parameter to the progress callback."""
        self.done(path)

    def columns(self, path: str) -> int:
        """Return the count of inputs of a matrix."""
        return self.layouts[path].extent(self.leaves[path].shape)[1]

    def unseen(self, path: str) -> str:
        """Return the reason why calibration cannot record the inputs of a weight."""
        if self._reasons is None:
            self._reasons = self.stage.unseen(self._all(None), self.states)
        return self._reasons.get(path, UNWATCHED)


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerwiseTransform(Transform):
    """A transform that compresses one stage of a model at a time.

    Attributes:
      rounds: refuses a `where` that matches quantized weights.
      needs: `nothing`; `inputs` for calibration inputs of each stage; or `both` for inputs of the
        compressed and the uncompressed model. A property if it depends on options.
      in_turn: compresses a weight on inputs that the compressed weights before it compute.
    """

    rounds: ClassVar[bool] = True
    needs: ClassVar[str] = "nothing"
    in_turn: ClassVar[bool] = False

    def compress_stage(self, stage: StageContext) -> Replaced:
        """Compress the selected parameters of one stage.

        Args:
          stage: stage with its parameters and inputs.

        Returns:
          `(replaced parameters by path, rows of the report)`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no compress_stage")

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Check options against the selected parameters, before any computation.

        Args:
          sizes: `(out, in)` of each parameter by path.

        Raises:
          RecipeError: an option does not match a parameter.
        """

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        """Compress a model in memory, stage by stage."""
        return apply_layerwise(self, model, params, context)


def apply_layerwise(
    transform: LayerwiseTransform, model: nn.Module, params: Params, context: Context
) -> Result:
    """Apply a layer-wise transform in memory.

    Args:
      transform: the transform.
      model: Linen module, or None.
      params: parameters of the model.
      context: data, randomness and original model.

    Returns:
      `(model, params, report)`.
    """
    step = BoundTransform(transform, context.rng)
    leaves = dict(boxes.path_items(params))
    step.select(leaves, set(), model, context.calibration)
    runner = LayerwiseRunner(model, [step], context)
    reference = None
    if transform.needs == "both":
        reference = _compared_with(leaves, context)
    rows: list[Row] = []
    for stage in runner.stages:
        stage_leaves = {path: leaf for path, leaf in leaves.items() if stage.holds(path)}
        stage_reference = reference and {p: leaf for p, leaf in reference.items() if stage.holds(p)}
        after, stage_rows = runner.compress(stage, stage_leaves, stage_reference)
        leaves.update(after)
        rows += stage_rows
    changed = nested(leaves)
    notes = (*runner.notes, *fallback_notes(rows))
    return model, changed, Report.of(rows, params, changed, notes=notes)


def fallback_notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """Build notes that count the matrices with a fallback, by reason.

    Args:
      rows: rows of the report. Actions of fallbacks end with `to nearest: reason`, `by magnitude:
        reason`, `without a range: reason` or `without a factor: reason`.

    Returns:
      Notes for the report.
    """
    reasons: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        fallback = re.search(rf"[( ]({'|'.join(_FALLBACKS)}): (.+)\)$", row.action)
        if fallback:
            reasons.setdefault((row.transform, fallback[1]), Counter())[fallback[2]] += 1
    # Parameters that are only divided by a factor, such as norms, do not count as matrices.
    totals = Counter(
        row.transform
        for row in rows
        if "divided by" not in row.action
        or any(words in row.action for words in ("columns times", "without a factor"))
    )
    return tuple(
        f"{name}: {sum(counts.values())} of {totals[name]} matrices went {how}{_FALLBACKS[how]}: "
        f"{'; '.join(f'{n} as {why}' for why, n in counts.items())}"
        for (name, how), counts in reasons.items()
    )


class _Extents(Mapping[str, tuple[int, int]]):
    """A mapping of paths to `(out, in)`; access to an unknown one raises RecipeError."""

    def __init__(self, layouts: Layouts, leaves: Leaves, paths: Iterable[str]) -> None:
        self._layouts, self._leaves, self._paths = layouts, leaves, sorted(paths)

    def __getitem__(self, path: str) -> tuple[int, int]:
        return self._layouts[path].extent(tuple(self._leaves[path].shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def layouts_in(
    name: str,
    model: nn.Module | None,
    leaves: Leaves,
    calibration: Sequence[batches.Batch] | None,
    stacked: str | None,
) -> Layouts:
    """Infer the layout of each parameter, see `glm_edge.compress.readings.layouts_of`.

    Args:
      name: name of the transform for messages.
      model: Linen module, or None.
      leaves: parameters by path.
      calibration: batches, of which the first is run abstractly, or None.
      stacked: see `glm_edge.quantize.rtn`.

    Returns:
      Layouts by path.

    Raises:
      RecipeError: `stacked` matches a parameter that is not a stack.
    """
    watch = None
    if calibration is not None and isinstance(model, nn.Module):
        with contextlib.suppress(DataError):
            # A transform that needs no data may be called with any batches.
            run = called(model, calibration)
            states, staged = first_states(run, itertools.islice(calibration, 1)), stages(run)
            if states and len(staged) == 1:
                watch = functools.partial(staged[0].watch, leaves, states[0])
    return layouts_of(name, model, leaves, stacked, watch)


def _compared_with(leaves: Leaves, context: Context) -> Leaves:
    """Return the reference, or the current model if earlier transforms changed shapes."""
    reference = dict(boxes.path_items((context.reference or context.original)[1]))
    before, now = ({p: tuple(x.shape) for p, x in tree.items()} for tree in (reference, leaves))
    return reference if before == now else dict(leaves)


class BoundTransform:
    """A layer-wise transform with its key and its selected parameters."""

    def __init__(self, transform: LayerwiseTransform, rng: Array | None = None) -> None:
        self.transform, self.rng = transform, rng
        self.name = transform.name
        self.selected: frozenset[str] = frozenset()
        self.named: frozenset[str] = frozenset()
        self.layouts: Mapping[str, Layout] = {}
        self.notes: tuple[str, ...] = ()

    def select(
        self,
        leaves: Leaves,
        rounded: set[str],
        model: nn.Module | None = None,
        calibration: Sequence[batches.Batch] | None = None,
    ) -> None:
        """Select the parameters of the transform, and add them to `rounded`.

        Args:
          leaves: concrete or abstract parameters of the model by path.
          rounded: paths that earlier transforms of the same run quantize.
          model: module that reads the parameters.
          calibration: batches, or None.

        Raises:
          RecipeError: the pattern matches nothing, or a quantized weight.
        """
        where, rounds = getattr(self.transform, "where", None), self.transform.rounds
        chosen = boxes.select(nested(leaves), where)
        again = [p for p in chosen if p in rounded or isinstance(leaves[p], Quantized)]
        if rounds and where is not None and again:
            first = leaves[again[0]]
            earlier = not isinstance(first, Quantized)
            state = "quantized by an earlier transform" if earlier else first.format
            raise RecipeError(
                f"{self.name}: where={where!r} matches {again[0]}, which is {state} already; "
                "narrow the pattern"
            )
        self.named = frozenset(chosen)
        self.selected = self.named - frozenset(again)
        if rounds and not self.selected:
            self.notes = (
                f"{self.name}: nothing to do: all {len(chosen)} matrices are quantized already; "
                "chain it before the transform that quantized them, or narrow where= of that one",
            )
        if rounds:
            rounded |= self.selected
        stacked = getattr(self.transform, "stacked", None)
        self.layouts = layouts_in(self.name, model, leaves, calibration, stacked)
        self.transform.check(_Extents(self.layouts, leaves, self.selected))


class LayerwiseRunner:
    """A runner of transforms over the stages of a model, with the states of calibration batches.

    Attributes:
      stages: stages of the model.
      notes: notes for the report.
    """

    def __init__(self, model: nn.Module, steps: Sequence[BoundTransform], context: Context) -> None:
        """Check calibration if a transform needs it.

        Raises:
          DataError: calibration is missing, empty or malformed, or lacks a modality.
        """
        self.model, self.steps, self.context = model, steps, context
        self.notes = tuple(note for step in steps for note in step.notes)
        self.needs = max(
            (step.transform.needs for step in steps), key=NEEDS.index, default="nothing"
        )
        self._states: list[State] = []
        self._domains: list[str | None] = []
        if self.needs != "nothing":
            name = next(step.name for step in steps if step.transform.needs != "nothing")
            self.notes += batches.check(model, context.calibration, name, context.without)
            model = called(model, context.calibration)
            for batch in context.calibration or ():
                self._states += first_states(model, [batch])
                self._domains.append(domain_of(batch))
        self.stages = stages(model)
        self._original_states = self._states
        self._in_turn = any(step.transform.in_turn for step in steps)
        self._walks: tuple[Walk | None, Walk | None] = None, None
        self._lent: Leaves = {}
        self._lent_original: Leaves = {}
        self._total = sum(len(step.selected) for step in steps)
        self._done = 0

    def compress(
        self, stage: Stage, leaves: Leaves, original: Leaves | None = None
    ) -> tuple[Leaves, list[Row]]:
        """Apply every transform to one stage, and run the batches through the result.

        Args:
          stage: the next stage of `stages`.
          leaves: parameters of the stage by full path.
          original: parameters of the uncompressed model; None means `leaves` after the leading
            exact transforms.

        Returns:
          `(parameters after, rows)`.
        """
        rows: list[Row] = []
        uncompressed = original
        original = original or leaves
        self._start_walks(stage, leaves)
        for index, step in enumerate(self.steps):
            work = self._work(stage, step, leaves, original)
            replaced, stage_rows = step.transform.compress_stage(work)
            leaves = {**leaves, **replaced}
            rows += stage_rows
            exact = all(s.transform.exact for s in self.steps[: index + 1])
            if uncompressed is None and exact:
                original = leaves
        self.carry(stage, leaves, original)
        self._advance_to(stage)
        return leaves, rows

    def skip(self, stage: Stage, leaves: Leaves, after: Leaves) -> None:
        """Skip a stage that an earlier run finished.

        Args:
          stage: the next stage of `stages`.
          leaves: parameters of the stage before.
          after: parameters of the stage from the earlier run.
        """
        original = leaves
        self._start_walks(stage, leaves)
        if self.needs == "both":
            for step in self.steps:
                if not step.transform.exact:
                    break
                work = self._work(stage, step, original, original)
                original = {**original, **step.transform.compress_stage(work)[0]}
        self.carry(stage, after, original)
        self._advance_to(stage)

    def carry(self, stage: Stage, leaves: Leaves, original: Leaves) -> None:
        """Run the batches through a finished stage."""
        self._lent |= {p: leaf for p, leaf in leaves.items() if self._is_borrowed(p)}
        self._lent_original |= {p: leaf for p, leaf in original.items() if self._is_borrowed(p)}
        if stage is self.stages[-1]:
            self._states = self._original_states = []
        if self._states:
            self._states = self._view(stage, leaves).finish()
        if self.needs == "both" and self._original_states:
            self._original_states = self._view_original(stage, original).finish()
        self._walks = None, None

    def _start_walks(self, stage: Stage, leaves: Leaves) -> None:
        """Prepare to run a stage in segments, if a transform compresses its weights in turn."""
        if not self._in_turn or not self._states:
            return
        groups = tuple(self._view(stage, leaves).readers())
        if groups and supports_walk(stage, groups):
            compressed = Walk(stage, self._states, groups)
            both = self.needs == "both"
            original = Walk(stage, self._original_states, groups, fixed=True) if both else None
            self._walks = compressed, original

    def _work(
        self, stage: Stage, step: BoundTransform, leaves: Leaves, original: Leaves
    ) -> StageContext:
        view = self._view(stage, leaves)
        rng = step.rng
        return StageContext(
            **vars(view),
            model=self.model,
            selected=tuple(path for path in leaves if path in step.selected),
            named=tuple(path for path in leaves if path in step.named),
            layouts=step.layouts,
            original=self._view_original(stage, original)
            if step.transform.needs == "both"
            else None,
            context=self.context,
            rng=None if rng is None else jax.random.fold_in(rng, self.stages.index(stage)),
            domains=self._domains,
            done=functools.partial(self._advance, step.name),
        )

    def _view(self, stage: Stage, leaves: Leaves) -> StageInputs:
        borrowed = self._borrowed(stage, self._lent)
        return StageInputs(stage, leaves, self._states, borrowed, self._walks[0])

    def _view_original(self, stage: Stage, leaves: Leaves) -> StageInputs:
        lent = self._borrowed(stage, self._lent_original)
        return StageInputs(stage, leaves, self._original_states, lent, self._walks[1])

    def _borrowed(self, stage: Stage, lent: Leaves) -> Leaves:
        return {path: lent[path] for path in stage.borrows if path in lent}

    def _is_borrowed(self, path: str) -> bool:
        return any(path in stage.borrows for stage in self.stages)

    def _advance(self, name: str, path: str) -> None:
        self._done = min(self._done + 1, self._total)
        self.context.advance(f"{name}: {path}", self._done, self._total)

    def _advance_to(self, stage: Stage) -> None:
        """Advance the progress past parameters that transforms did not report."""
        passed = self.stages[: self.stages.index(stage) + 1]
        due = sum(
            any(s.holds(path) for s in passed) for step in self.steps for path in step.selected
        )
        if due > self._done:
            self._done = due
            self.context.advance(f"{self.steps[-1].name}: {stage.name}", due, self._total)
