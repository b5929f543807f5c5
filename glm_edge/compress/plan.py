"""Choosing a format for each group of parameters so that the model fits a number of bytes.

References:
  Pushing the Limits of LLM Quantization via the Linearity Theorem (loss adds up over layers, and
  formats are chosen by dynamic programming), https://arxiv.org/abs/2411.17525.
"""

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.batches import Batch
from glm_edge.compress.calibration import Calibration, Called, called, with_batches
from glm_edge.compress.plan_table import (
    KEEP,
    GroupRow,
    Option,
    Plan,
    best_within,
    bytes_with,
    format_everything,
    frontier,
)
from glm_edge.compress.stagewise import layouts_in, stagewise
from glm_edge.compress.transform import Progress, Transform, chain, check_pattern, entry
from glm_edge.errors import BoxError, DataError, RecipeError
from glm_edge.params import Format, Quantized
from glm_edge.params.layouts import Layout
from glm_edge.params.patterns import compiled, shared_steps
from glm_edge.params.tree import Params, nested

FORMATS = ("bfloat16", "int8", "int4-g32", "int3-g32", "int2-g32")
GROUPS = (
    r"^decoder/layers/\d+/(?:attention|mlp)",
    r"^(?:vision|speech)/[^/]+",
    r"^[^/]+",
)
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
    """Finds the recipe of least loss whose parameters fit a number of bytes, and measures it.

    Each group is compressed alone in each format, and the divergence of the logits from the
    uncompressed model's is measured on held-out batches, for each kind of batch (text, images,
    audio) apart. Losses are taken to add up; dynamic programming finds the formats whose sum, the
    mean over kinds, is least. Then the recipe is carried out and measured.

    Every second batch of a kind is held out: the transform never sees it.

        plan = ge.plan(model, params, budget_bytes=2_500_000, calibration=batches)
        model, params, report = plan.recipe(model, params)

    Args:
      model: Linen module.
      params: its parameters.
      budget_bytes: that all stored parameters may take.
      formats: names such as `int4-g32` (see `glm_edge.params.Format.parse`), or `keep` for as it
        is. A matrix whose columns are not whole groups takes int8 per channel.
      calibration: batches; at least one of each kind of input, and two where the transform reads
        some.
      groups: regular expressions; a matrix belongs to the first that matches its path, and all
        paths with the same matched text are one group. None is each decoder layer's attention and
        feed-forward network, each part of an encoder, the embedding and the head.
      transform: name of a rounding transform, such as `rtn` or `gptq`, or one whose further
        options are kept.
      progress: True, or called as `progress(stage, done, total)`.
      rng: jax key for transforms that draw.
      without: inputs that the model takes and calibration is known to lack.

    Returns:
      The plan; `plan.recipe(model, params, calibration)` carries it out.

    Raises:
      RecipeError: the budget is below the smallest size, which the message names, or an option has
        no meaning.
      DataError: calibration is missing, or lacks an input that the model takes.
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
    seen, held_out = split(calibration, maker.reads)
    reader = called(model, calibration)
    measure = Divergence(reader, params, held_out)
    inside = {path for paths in members.values() for path in paths}
    fixed = boxes.stored_bytes([leaf for path, leaf in leaves.items() if path not in inside])

    def compress(recipe: Transform) -> tuple[nn.Module, Params]:
        return recipe(model, params, calibration=seen, rng=rng, without=_lacking(model, seen))[:2]

    options: dict[str, list[Option]] = {name: [] for name in members}
    total = len(members) * len(assigned) + 1
    for number, (name, chosen) in enumerate(assigned.items()):
        whole = None
        if chosen:
            recipe = maker.recipe(chosen, sorted(inside), leaves)
            whole = dict(boxes.path_items(compress(recipe)[1]))
            # What changes norms and neighbours too must be run on each group by itself.
            if any(whole[path] is not leaf for path, leaf in leaves.items() if path not in inside):
                whole = None
        for place, (group, paths) in enumerate(members.items()):
            if not chosen:
                changed = {}
            elif whole is None:
                own = maker.recipe(chosen, paths, leaves)
                changed = dict(boxes.path_items(compress(own)[1]))
            else:
                changed = {path: whole[path] for path in paths}
            loss = measure({**leaves, **changed}) if changed else dict.fromkeys(measure.kinds, 0.0)
            own_formats = {path: chosen[path] for path in paths if path in chosen}
            own_bytes = bytes_with({path: leaves[path] for path in paths}, own_formats, layouts)
            options[group].append(Option(name, own_bytes, loss))
            if progress is not None:
                progress(f"plan: {group} {name}", number * len(members) + place + 1, total)
    points = frontier(list(options.values()), fixed)
    point = best_within(points, budget_bytes)
    chosen = {g: options[g][place] for g, place in zip(options, point.choice, strict=True)}
    recipe = maker.chosen_recipe(chosen, members, assigned, leaves)
    made_model, made = compress(recipe)
    if boxes.stored_bytes(made) != point.bytes:
        raise RecipeError(
            f"plan: {maker.name} stored {boxes.stored_bytes(made):,} bytes where its formats take "
            f"{point.bytes:,}; it stores more than codes and scales and cannot be planned with"
        )
    made_reader = called(made_model, calibration)
    measured = measure(dict(boxes.path_items(made)), made_reader)
    if progress is not None:
        progress("plan: measured", total, total)
    return Plan(
        recipe=recipe,
        rows=tuple(
            GroupRow(
                group,
                chosen[group].format,
                boxes.count([leaves[path] for path in paths]),
                chosen[group].bytes,
                chosen[group].loss,
            )
            for group, paths in members.items()
        ),
        budget_bytes=budget_bytes,
        predicted_bytes=point.bytes,
        measured_bytes=boxes.stored_bytes(made),
        fixed_bytes=fixed,
        predicted={k: sum(option.loss[k] for option in chosen.values()) for k in measure.kinds},
        measured=measured,
        points=tuple((point.bytes, point.cost) for point in points),
        held_out={kind: len(found) for kind, found in held_out.items()},
    )


@shared_steps()
def group_paths(params: Params, patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups of the matrices that are not quantized yet, in the tree's order.

    Raises:
      RecipeError: a pattern is malformed, or none matches.
    """
    for pattern in patterns:
        check_pattern("plan", "groups", pattern)
    groups: dict[str, list[str]] = {}
    for path, leaf in boxes.path_items(params):
        if not boxes.is_matrix(path, leaf) or isinstance(leaf, Quantized):
            continue
        found = next(filter(None, (compiled(pattern).match(path) for pattern in patterns)), None)
        if found:
            groups.setdefault(found, []).append(path)
    if not groups:
        raise RecipeError(f"plan: groups={list(patterns)} match no matrix that is not quantized")
    return {name: tuple(paths) for name, paths in groups.items()}


def kind_of(batch: Any, calibration: Any = None) -> str:
    """What a batch holds: `text`, `images`, `audio` or `images+audio`.

    Args:
      batch: of `calibration`.
      calibration: where it brings functions, all its batches are of one kind, `batches`.
    """
    if isinstance(calibration, Calibration) and (calibration.apply or calibration.loss):
        return "batches"
    names = batches.keys_of(batch)
    return "+".join(name for name in ("images", "audio") if name in names) or "text"


def split(calibration: Any, reads: bool) -> tuple[Any, dict[str, list[Any]]]:
    """Batches for the transform, and those held out by kind.

    Args:
      calibration: all of them, or a `Calibration`, which what the transform gets then is too.
      reads: whether the transform reads any; if not, none is set aside for it.

    Returns:
      `(seen, held out)`.

    Raises:
      DataError: a kind has a single batch and the transform needs one of it too.
    """
    kinds: dict[str, list[Batch]] = {}
    for batch in calibration:
        kinds.setdefault(kind_of(batch, calibration), []).append(batch)
    if not reads:
        return None, kinds
    lone = [kind for kind, found in kinds.items() if len(found) < 2]
    if lone:
        raise DataError(
            f"plan: calibration holds one batch of {lone[0]}; give two or more, since every "
            "second is held out from the transform to measure on"
        )
    seen = [batch for found in kinds.values() for batch in found[::2]]
    return with_batches(calibration, seen), {kind: found[1::2] for kind, found in kinds.items()}


class Divergence:
    """Mean divergence of the logits of changed parameters from those of the first ones.

    Attributes:
      kinds: of batches, the keys of the results.
    """

    def __init__(
        self, model: nn.Module | Called, params: Params, held_out: Mapping[str, Sequence[Batch]]
    ):
        """Runs the uncompressed model on every batch."""
        self.kinds = tuple(held_out)
        self._model, self._cases = model, []
        dense = _dense(dict(boxes.path_items(params)))
        for kind, found in held_out.items():
            for batch in found:
                batch = batches.to_device(model, batch, "plan")
                reference = _logits(model, dense, batch)
                weights = (
                    jnp.ones(reference.shape[:-1])
                    if isinstance(model, Called)
                    else batches.loss_weights(model, batch)
                )
                self._cases.append((kind, batch, weights, reference))

    def __call__(
        self, leaves: Mapping[str, Any], model: nn.Module | Called | None = None
    ) -> dict[str, float]:
        """Divergence in nats a token by kind of batch."""
        dense = _dense(leaves)
        sums = {kind: [0.0, 0.0] for kind in self.kinds}
        for kind, batch, weights, reference in self._cases:
            found = _divergence(model or self._model, dense, batch, weights, reference)
            for place in (0, 1):
                sums[kind][place] += float(found[place])
        return {kind: lost / max(count, 1.0) for kind, (lost, count) in sums.items()}


def _dense(leaves: Mapping[str, Any]) -> Params:
    """The tree in float32, whatever it is stored in: one compiled program serves all formats."""

    def widen(leaf: Any) -> Array:
        leaf = leaf.replace(dtype="float32") if isinstance(leaf, Quantized) else leaf
        return boxes.dense(leaf).astype(jnp.float32)

    return nested({path: widen(leaf) for path, leaf in leaves.items()})


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: nn.Module, params: Params, batch: Batch) -> Array:
    logits = batches.apply_batch(model, params, batch)
    return logits if isinstance(model, Called) else logits[:, :-1]


@functools.partial(jax.jit, static_argnames="model")
def _divergence(
    model: nn.Module, params: Params, batch: Batch, weights: Array, reference: Array
) -> tuple[Array, Array]:
    expected = jax.nn.log_softmax(reference)
    found = jax.nn.log_softmax(_logits(model, params, batch))
    lost = jnp.sum(jnp.exp(expected) * (expected - found), axis=-1)
    return jnp.sum(lost * weights), jnp.sum(weights)


class _Maker:
    """Builds the transforms that store parameters in chosen formats."""

    def __init__(self, transform: str | Transform) -> None:
        if isinstance(transform, Transform):
            self.name, self._extra = transform.name, dict(transform.options)
            if transform.objects:
                raise RecipeError("plan: transform= holds arrays; give one of options alone")
        else:
            self.name = f"quantize.{transform}"
            self._extra = {"scale": "mse"} if transform == "rtn" else {}
        self._factory = entry(self.name).factory
        known = set(inspect.signature(self._factory).parameters)
        missing = {"group_size", "qtype", "where"} - known
        if missing:
            raise RecipeError(
                f"plan: {self.name} takes no {min(missing)}=, so it cannot be planned with; rtn can"
            )
        by_stage = stagewise(self.name)
        self.reads = by_stage is not None and by_stage.needs != "nothing"

    def check(self, formats: Mapping[str, Format]) -> None:
        """Builds a transform of each format, which raises where there is none."""
        for format in set(formats.values()):
            self._transform(format, None)

    def recipe(
        self, formats: Mapping[str, Format], paths: Any, leaves: Mapping[str, Any]
    ) -> Transform:
        """Stores these paths in these formats."""
        by_format: dict[Format, list[str]] = {}
        for path in paths:
            by_format.setdefault(formats[path], []).append(path)
        return chain(
            *(self._transform(format, pattern_of(own, leaves)) for format, own in by_format.items())
        )

    def chosen_recipe(
        self,
        chosen: Mapping[str, Option],
        members: Mapping[str, Sequence[str]],
        assigned: Mapping[str, Mapping[str, Format]],
        leaves: Mapping[str, Any],
    ) -> Transform:
        """Stores every group in its chosen format."""
        formats = {
            path: assigned[option.format][path]
            for group, option in chosen.items()
            for path in members[group]
            if path in assigned[option.format]
        }
        return self.recipe(formats, list(formats), leaves)

    def _transform(self, format: Format, where: str | None) -> Transform:
        if format.plain:
            return entry("quantize.rtn").factory(qtype=format.qtype, where=where)
        integers = format.qtype.startswith("int")
        options = {
            **self._extra,
            "group_size": format.group_size,
            "qtype": None if integers else format.qtype,
            "where": where,
            "scale_dtype": format.scale_dtype,
        }
        options |= {"bits": int(format.bits)} if integers else {}
        known = inspect.signature(self._factory).parameters
        if "symmetric" in known:
            options["symmetric"] = format.symmetric
        return self._factory(**options)


def pattern_of(paths: Sequence[str], leaves: Mapping[str, Any]) -> str:
    """A regular expression that matches these paths of a tree's matrices and no other."""
    matrices = [path for path, leaf in leaves.items() if boxes.is_matrix(path, leaf)]
    wanted, parts = set(paths), []
    left = list(paths)
    while left:
        names = left[0].split("/")
        # The shortest prefix under which everything is wanted.
        for depth in range(1, len(names) + 1):
            prefix = "/".join(names[:depth])
            below = [p for p in matrices if p == prefix or p.startswith(f"{prefix}/")]
            if wanted.issuperset(below):
                break
        parts.append(prefix)
        left = [path for path in left if path not in below]
    return f"^(?:{'|'.join(map(re.escape, parts))})(?:/|$)"


def _assign(params: Params, name: str, layouts: Mapping[str, Layout]) -> dict[str, Format]:
    if name == KEEP:
        return {}
    try:
        format = Format.parse(name)
    except (BoxError, TypeError) as error:
        raise RecipeError(f"plan: {error}; or {KEEP!r}") from error
    return format_everything(params, format, Format(f"int{_FALLBACK_BITS}"), layouts)


def _lacking(model: nn.Module, seen: Sequence[Batch] | None) -> tuple[str, ...]:
    kinds = set().union(*map(batches.keys_of, () if seen is None else seen))
    return tuple(name for name in ("images", "audio") if name not in kinds)
