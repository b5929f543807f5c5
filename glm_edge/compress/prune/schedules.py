"""Schedules of rising sparsity: functions of the step, masks during training, and rounds."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress.distill.distill import distill
from glm_edge.compress.options import TrainOptions
from glm_edge.compress.prune.mask import mask
from glm_edge.compress.prune.masks import shapes
from glm_edge.compress.prune.scores import from_model as model_scores
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.readings import Layouts, layouts_of
from glm_edge.compress.transform import (
    Transform,
    chain,
    check_fraction,
    check_pattern,
    check_whole,
)
from glm_edge.errors import RecipeError
from glm_edge.params.patterns import compiled
from glm_edge.params.tree import Params, path_string

Schedule = Callable[[Any], Array]
_HEALING = TrainOptions(steps=100)
_RISES = ("linear", "cubic")
# Schedules are asked about step 0 and these.
_CHECKED_STEPS = tuple(1 << exponent for exponent in range(31))


def one_shot(sparsity: float, step: int = 0) -> Schedule:
    """Make a schedule that is zero before `step` and `sparsity` from it on.

    Args:
      sparsity: fraction of zeros, in 0..1, below 1.
      step: of the optimizer, counted from 0.

    Returns:
      A function of the step.

    Raises:
      RecipeError: an argument has no meaning.
    """
    check_fraction("prune.one_shot", sparsity=sparsity)
    return lambda now: jnp.where(jnp.asarray(now) >= step, jnp.float32(sparsity), 0.0)


def cubic(final: float, begin: int, end: int, initial: float = 0.0) -> Schedule:
    """Make a cubic schedule: `s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3`.

    Sparsity rises fast at first, then slower.

    Args:
      final: sparsity from step `end` on.
      begin: step at which pruning begins; before it there is none.
      end: step at which it ends.
      initial: sparsity at step `begin`.

    Returns:
      A function of the step.

    Raises:
      RecipeError: an argument has no meaning.

    References:
      To prune, or not to prune, https://arxiv.org/abs/1710.01878.
    """
    check_fraction("prune.cubic", final=final, initial=initial)
    _check_steps("cubic", begin, end)

    def sparsity(now: Any) -> Array:
        now = jnp.asarray(now, jnp.float32)
        remaining = 1.0 - jnp.clip((now - begin) / (end - begin), 0.0, 1.0)
        return jnp.where(now >= begin, final + (initial - final) * remaining**3, 0.0)

    return sparsity


def staircase(
    final: float, begin: int, end: int, initial: float = 0.05, rounds: int = 6
) -> Schedule:
    """Make a schedule of equal rounds from `initial` to `final`, with training between them.

    Args:
      final: sparsity of the last round.
      begin: step of the first round; before it there is none.
      end: step of the last round.
      initial: sparsity of the first round.
      rounds: number of them, at least 2.

    Returns:
      A function of the step.

    Raises:
      RecipeError: an argument has no meaning.
    """
    check_fraction("prune.staircase", final=final, initial=initial)
    _check_steps("staircase", begin, end)
    _check_rounds("staircase", rounds, initial, final)
    levels = jnp.asarray(np.linspace(initial, final, rounds), jnp.float32)

    def sparsity(now: Any) -> Array:
        now = jnp.asarray(now)
        index = jnp.clip((now - begin) * (rounds - 1) // (end - begin), 0, rounds - 1)
        return jnp.where(now >= begin, levels[index], 0.0)

    return sparsity


class MaskState(NamedTuple):
    """State of `scheduled`.

    Attributes:
      step: int32, updates so far.
      masks: bool, laid out like the parameters; None where nothing is masked.
      inner: state of the optimizer within.
    """

    step: Array
    masks: Any
    inner: Any


def scheduled(
    optimizer: optax.GradientTransformation,
    sparsity: Schedule,
    score: str = "magnitude",
    shape: str = "unstructured",
    where: str | None = None,
    every: int = 100,
    stacked: str | None = None,
    model: nn.Module | None = None,
) -> optax.GradientTransformation:
    """Wrap an optimizer so that a schedule masks weights, which then remain zero.

    Masks are computed from the current weights at every `every`-th update; masked weights remain
    masked. The inner optimizer sees a gradient of zero for a masked weight, and the update takes
    the weight to exactly zero. `boxed` attaches the masks after training:

        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            ge.prune.scheduled(optax.adamw(1e-3), ge.prune.cubic(0.5, begin=0, end=1000)),
        )
        ...
        params = ge.prune.boxed(params, opt_state)

    Put other transformations before it or within it. One after it in a chain, such as weight decay,
    would undo the masks: the next update and `boxed` then raise RecipeError.

    Args:
      optimizer: inner optimizer, from gradients to updates.
      sparsity: a function of the step, such as `cubic` makes, in 0..1 and below 1. It is checked at
        steps 0, 1, 2, 4 and so on; at any other step, one unit of each group remains.
      score: `magnitude`, an L_n norm `l<n>`, or `sensitivity`, `|g w|` of the current gradient.
      shape: `unstructured`, `N:M`, `block:RxC` or `channel`, see `mask`. `N:M` has its fixed
        sparsity as soon as the schedule is above zero.
      where: regular expression searched in each path; None is every matrix.
      every: updates between two new sets of masks.
      stacked: see `mask`.
      model: reads the parameters; it shows which axes of stock kernels without biases are inputs.

    Returns:
      The transformation; `update` needs `params`. It can be jitted.

    Raises:
      RecipeError: an option has no meaning, or the sparsity of a step is below 0 or not below 1;
        in `init`, the pattern matches nothing, or rows or columns are not whole groups; in
        `update`, masked weights are not zero (under `jit` inside an error of JAX).

    References:
      To prune, or not to prune, https://arxiv.org/abs/1710.01878.
    """
    name = "prune.scheduled"
    found_score, found_shape = weight_scores.parse(name, score), shapes.parse(name, shape)
    if found_score.kind not in ("norm", "sensitivity") or not found_shape.of_matrix:
        raise RecipeError(
            f"{name}: score must be magnitude, l<n> or sensitivity and shape lie within a matrix; "
            f"found {score!r} and {shape!r}"
        )
    check_whole(name, every=every)
    check_pattern(name, "where", where)
    _check_schedule(name, sparsity)
    by_gradient = found_score.kind == "sensitivity"

    @functools.lru_cache(maxsize=8)
    def layouts(sizes: tuple[tuple[str, tuple[int, ...], Any], ...]) -> Layouts:
        leaves = {path: jax.ShapeDtypeStruct(size, dtype) for path, size, dtype in sizes}
        return layouts_of(name, model, leaves, stacked)

    def pools_in(params: Params) -> Callable[[str], list[shapes.Pool]]:
        """Look up the units of a parameter by its path."""
        leaves = _by_name(params)
        known = layouts(tuple((path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()))
        return lambda path: model_scores.pools_of(name, found_shape, None, leaves, [path], known)

    def init(params: Params) -> MaskState:
        chosen = _selected(name, params, where)
        pools_of = pools_in(params)
        for path in chosen:
            pools_of(path)
        masks = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.ones(leaf.shape, bool) if _name(path) in chosen else None, params
        )
        return MaskState(jnp.zeros((), jnp.int32), masks, optimizer.init(params))

    def update(
        updates: Params, state: MaskState, params: Params | None = None
    ) -> tuple[Params, MaskState]:
        if params is None:
            raise RecipeError(f"{name}: update needs params=")

        def drawn(masks: Params) -> Params:
            level = sparsity(state.step)

            def of_pool(pool: shapes.Pool, values: Array, keep: Array) -> Array:
                (member,) = pool.members
                marks = {member.path: member.layout.matrices(keep.astype(jnp.float32))}
                matrices = {member.path: member.layout.matrices(values)}
                scores, unmasked = (
                    pool.reduced(matrices, found_score.order),
                    pool.reduced(marks, jnp.inf),
                )
                rank = jnp.argsort(jnp.argsort(jnp.where(unmasked > 0, scores, -jnp.inf), axis=1))
                count = jnp.round(jnp.nan_to_num(level) * pool.units)
                if found_shape.sparsity is not None:
                    count = jnp.where(level > 0, found_shape.sparsity * pool.units, 0)
                count = jnp.minimum(count, pool.units - max(1, pool.at_least))
                return (rank >= count) & (unmasked > 0)

            def draw(path: str, keep: Array, weight: Array, gradient: Array) -> Array:
                values = weight_scores.sensitivity(weight, gradient) if by_gradient else weight
                pools = pools_of(path)
                stay = [of_pool(pool, values, keep) for pool in pools]
                return shapes.spread_over(pools, stay, {path: weight.shape})[path]

            pools_of = pools_in(params)
            return _map(draw, masks, params, updates)

        undone = _any_undone(state.masks, params)
        if isinstance(undone, jax.core.Tracer):
            jax.lax.cond(undone, lambda: jax.debug.callback(_refuse_undone), lambda: None)
        elif undone:
            _refuse_undone()

        masks = jax.lax.cond(state.step % every == 0, drawn, lambda masks: masks, state.masks)
        live = _map(
            lambda _, keep, gradient_of_leaf: jnp.where(keep, gradient_of_leaf, 0),
            masks,
            updates,
            others_tree=updates,
        )
        steps, inner = optimizer.update(live, state.inner, params)
        steps = _map(
            lambda _, keep, gradient_of_leaf, weight: jnp.where(keep, gradient_of_leaf, -weight),
            masks,
            steps,
            params,
            others_tree=steps,
        )
        return steps, MaskState(state.step + 1, masks, inner)

    return optax.GradientTransformation(init, update)


def boxed(params: Params, state: optax.OptState) -> Params:
    """Attach the masks of `scheduled` to the parameters that it trained.

    Args:
      params: after the last update.
      state: state of `scheduled`, or of an optimizer that wraps it, such as `optax.chain`,
        `optax.MultiSteps` or `optax.inject_hyperparams`.

    Returns:
      The tree with `Masked` in place of the selected weights.

    Raises:
      RecipeError: the state has no masks of `scheduled`, or those of several; or masked weights are
        not zero.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MaskState))
    states = [node for node in nodes if isinstance(node, MaskState)]
    if len(states) != 1:
        raise RecipeError(
            f"prune.boxed: the state must hold the masks of one prune.scheduled, not of "
            f"{len(states)}; pass the optimizer's state after its last update"
        )
    if _any_undone(states[0].masks, params):
        _refuse_undone()
    masks = _by_name(states[0].masks)
    return boxes.map_with_path(
        lambda path, leaf: boxes.mask(leaf, masks[path]) if path in masks else leaf, params
    )


def iterative(
    sparsity: float = 0.3,
    initial: float = 0.05,
    rounds: int = 6,
    rise: str = "linear",
    train: TrainOptions = _HEALING,
    score: str = "magnitude",
    shape: str = "unstructured",
    allocation: str = "uniform",
    where: str | None = None,
    **distillation: Any,
) -> Transform:
    """Make a recipe that prunes and trains in rounds, from sparsity `initial` to `sparsity`.

    Each round masks (see `mask`) and then trains on the teacher and the labels (see `distill`). Its
    learning rate warms up and decays by a cosine.

    Args:
      sparsity: sparsity of the last round, in 0..1, below 1.
      initial: sparsity of the first round.
      rounds: number of rounds, at least 2.
      rise: `linear`, equal steps of sparsity; `cubic`, large steps first.
      train: training of each round, see `glm_edge.TrainOptions`; in its `state_dir` each round has
        a separate directory, `round_1` first.
      score: see `mask`.
      shape: see `mask`; not `N:M`, whose sparsity does not rise.
      allocation: see `mask`.
      where: pattern of the masked weights, see `mask`.
      **distillation: further options of `distill`, such as `alpha` (0 learns from labels alone)
        or `temperature`; `train_where` is its `where`, the pattern of what trains; None is all.

    Returns:
      The chain of all rounds, itself a recipe.

    Raises:
      RecipeError: an option has no meaning.

    References:
      To prune, or not to prune, https://arxiv.org/abs/1710.01878; SGDR: Stochastic Gradient Descent
      with Warm Restarts, https://arxiv.org/abs/1608.03983.
    """
    check_fraction("prune.iterative", sparsity=sparsity, initial=initial)
    _check_rounds("iterative", rounds, initial, sparsity)
    if rise not in _RISES:
        raise RecipeError(f"prune.iterative: rise must be {' or '.join(_RISES)}, not {rise!r}")
    done = np.linspace(0.0, 1.0, rounds)
    if rise == "cubic":
        done = 1.0 - (1.0 - done) ** 3
    train_where = distillation.pop("train_where", None)
    steps: list[Transform] = []
    for number, level in enumerate((initial + (sparsity - initial) * done).tolist(), start=1):
        # Each round is a separate training, and a directory stores the state of one.
        state_dir = train.state_dir and str(Path(train.state_dir) / f"round_{number}")
        healing = dataclasses.replace(train, state_dir=state_dir)
        masking: dict[str, Any] = {"score": score, "shape": shape, "allocation": allocation}
        masking["where"] = where
        steps.append(mask(round(level, 6), **masking))
        steps.append(distill(train=healing, where=train_where, **distillation))
    return chain(*steps)


def _name(path: tuple[Any, ...]) -> str:
    """Return the path of the parameter of an array, in a box or bare."""
    return path_string(path).removesuffix("/.value")


def _by_name(params: Params) -> dict[str, Array]:
    """Return arrays by the path of their parameter."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {_name(path): leaf for path, leaf in flat}


def _selected(name: str, params: Params, where: str | None) -> dict[str, Array]:
    """Return the trainable matrices by path, in boxes or bare."""
    leaves = _by_name(params)
    matrices = {path: leaf for path, leaf in leaves.items() if boxes.is_matrix(path, leaf)}
    selected = {path: leaf for path, leaf in matrices.items() if compiled(where).search(path)}
    if not selected:
        raise RecipeError(f"{name}: where={where!r} matches none of {len(matrices)} matrices")
    return selected


def _any_undone(masks: Params, params: Params) -> Array:
    """Return True where a masked weight is not zero."""
    weights = _by_name(params)
    undone = [
        jnp.any(jnp.where(keep, 0, weights[path]) != 0) for path, keep in _by_name(masks).items()
    ]
    return functools.reduce(jnp.logical_or, undone, jnp.zeros((), bool))


def _refuse_undone() -> None:
    raise RecipeError(
        "prune.scheduled: masked weights are not zero after its update; put transformations that "
        "follow it in the chain, such as weight decay, before it or into the optimizer it wraps"
    )


def _map(
    function: Callable[..., Any], masks: Params, *trees: Params, others_tree: Any = None
) -> Params:
    """Map `(path, mask, *leaves)` where a mask exists; elsewhere take `others_tree`, or None."""
    treedef: Any
    flat, treedef = jax.tree_util.tree_flatten_with_path(masks, is_leaf=lambda x: x is None)
    columns = [treedef.flatten_up_to(tree) for tree in trees]
    others = [None] * len(flat) if others_tree is None else treedef.flatten_up_to(others_tree)
    mapped = [
        other if keep is None else function(_name(path), keep, *leaves)
        for (path, keep), other, *leaves in zip(flat, others, *columns, strict=True)
    ]
    return treedef.unflatten(mapped)


def _check_schedule(name: str, sparsity: Schedule) -> None:
    """Check a schedule at steps of every size, since under `jit` it is too late to raise."""
    for step in (0, *_CHECKED_STEPS):
        with jax.ensure_compile_time_eval():
            level = float(sparsity(jnp.int32(step)))
        if not 0.0 <= level < 1.0:
            raise RecipeError(
                f"{name}: sparsity= gives {level:g} at step {step}; it must be at least 0 and "
                "below 1 at every step"
            )


def _check_steps(name: str, begin: int, end: int) -> None:
    if not 0 <= begin < end:
        raise RecipeError(f"prune.{name}: begin must be below end, found {begin} and {end}")


def _check_rounds(name: str, rounds: int, initial: float, final: float) -> None:
    check_whole(f"prune.{name}", rounds=rounds)
    if rounds < 2 or not initial < final:
        raise RecipeError(
            f"prune.{name}: sparsity must rise in 2 or more rounds, not from {initial} to {final} "
            f"in {rounds}"
        )
