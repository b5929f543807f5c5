"""Removing whole attention heads and neurons, so that arrays and configuration shrink."""

import dataclasses
import itertools
from dataclasses import field
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.calibration import has_length
from glm_edge.compress.prune.scores import heads_neurons as scores
from glm_edge.compress.prune.shrink.arrays import (
    check_kept,
    columns_of,
    highest,
    one_or_each,
    removed,
    rows_of,
    shrunk_report,
)
from glm_edge.compress.transform import (
    Context,
    Result,
    Transform,
    check_fraction,
    check_pattern,
    check_whole,
    register,
)
from glm_edge.configs import DecoderConfig
from glm_edge.errors import RecipeError
from glm_edge.params.tree import Params

NAME = "prune.structured"
SCORES = ("taylor", "magnitude")
# A layer this many multiples wide can lose the rest of a multiple without losing much more.
_WIDE = 4
KeepUnits = dict[str, np.ndarray]


@register(NAME)
class Structured(Transform):
    """Removes attention heads and neurons of the decoder and shrinks its arrays and configuration.

    Query heads go evenly from every group that shares a key/value head, the lowest scores of each
    group, so that groups stay alike; where each query head has its own key/value head, both go.
    The vision and speech encoders are left as they are. At least the asked fraction goes.

        recipe = ge.prune.structured(heads=0.25, neurons=0.3)
        model, params, report = recipe(model, params, calibration=batches)

    Attributes:
      heads: fraction of query heads to remove, in 0..1, below 1.
      neurons: fraction of neurons to remove, in 0..1, below 1.
      score: `taylor`, from gradients of the calibration loss, or `magnitude`, from weights alone.
      where: regular expression searched in the decoder's paths; layers whose attention (or
        feed-forward) weights it matches lose heads (or neurons). None is all layers.
      neuron_multiple: the number of neurons kept is rounded down to a multiple of this in layers at
        least four times as wide, for kernels and quantization groups.
      max_batches: calibration batches that are scored, taken evenly from those given.

    Raises:
      RecipeError: an option has no meaning; on call, the model has no GLM decoder, nothing would
        remain, a pattern matches none of its layers, or a weight is quantized.
      DataError: `taylor` without calibration.

    References:
      LLM-Pruner, https://arxiv.org/abs/2305.11627; Compact Language Models via Pruning and
      Knowledge Distillation, https://arxiv.org/abs/2407.14679.
    """

    needs_model: ClassVar[bool] = True

    heads: float = field(default=0.0, kw_only=False)
    neurons: float = 0.0
    score: str = "taylor"
    where: str | None = None
    neuron_multiple: int = 32
    max_batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, heads=self.heads, neurons=self.neurons)
        if self.score not in SCORES:
            raise RecipeError(f"{self.name}: score must be taylor or magnitude, not {self.score!r}")
        check_pattern(self.name, "where", self.where)
        check_whole(self.name, neuron_multiple=self.neuron_multiple, max_batches=self.max_batches)

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        config = getattr(getattr(model, "config", None), "decoder", None)
        if not isinstance(config, DecoderConfig):
            raise RecipeError(
                f"prune.structured: {type(model).__name__} has no GLM decoder to shrink; "
                "prune.magnitude masks the weights of any module"
            )
        pruned_layers = _layers(config, params, self.where)
        calibration = some(context.calibration, self.max_batches)
        notes = ()
        if self.score == "taylor":
            importance = scores.taylor(model, params, calibration, context)
            notes = batches.missing_modalities(
                model, set().union(*map(batches.keys_of, calibration))
            )
        else:
            importance = scores.magnitude(config, params)
        keep = {}
        for index in range(config.num_layers):
            keep_units = {}
            if self.heads and index in pruned_layers["attention"]:
                groups = config.kv_heads(index)
                keep_units["heads"] = heads_to_keep(importance[index]["heads"], groups, self.heads)
            if self.neurons and index in pruned_layers["mlp"]:
                count = neurons_to_keep(config.neurons(index), self.neurons, self.neuron_multiple)
                keep_units["neurons"] = highest(importance[index]["neurons"], count)
            keep[index] = keep_units
        smaller, shrunk = shrink(model, params, keep)
        report = shrunk_report(NAME, (model, params), (smaller, shrunk), notes)
        return smaller, shrunk, report


structured = Structured


def heads_to_keep(
    scores: np.ndarray, groups: int, fraction: float, transform: str = NAME
) -> np.ndarray:
    """Indices of the query heads that stay, ascending.

    Args:
      scores: [N] importance.
      groups: `K`, key/value heads; equal to `N` where each head has its own.
      fraction: of heads to remove, rounded up in each group.
      transform: name, for the message.

    Returns:
      The same number of heads in every group.

    Raises:
      RecipeError: no head would remain.
    """
    groups = 1 if groups == len(scores) else groups
    size = len(scores) // groups
    count = size - removed(size, fraction)
    if count < 1:
        raise RecipeError(f"{transform}: heads={fraction} leaves no query head in groups of {size}")
    grouped = scores.reshape(groups, size)
    return np.concatenate([highest(row, count) + i * size for i, row in enumerate(grouped)])


def neurons_to_keep(width: int, fraction: float, multiple: int, transform: str = NAME) -> int:
    """Number of neurons that stay, see `structured`.

    Raises:
      RecipeError: none would remain.
    """
    count = width - removed(width, fraction)
    if width >= _WIDE * multiple:
        count -= count % multiple
    if count < 1:
        raise RecipeError(f"{transform}: neurons={fraction} leaves none of {width}")
    return count


def some(calibration: Any, count: int) -> list[batches.Batch]:
    """At most `count` batches: evenly from a list, the first where there is no length."""
    if not has_length(calibration):
        return list(itertools.islice(calibration or (), count))
    places = np.linspace(0, len(calibration) - 1, min(count, len(calibration)))
    return [calibration[index] for index in places.round().astype(int).tolist()]


def shrink(
    model: nn.Module, params: Params, keep: dict[int, KeepUnits]
) -> tuple[nn.Module, Params]:
    """Drops heads and neurons of a decoder from arrays and configuration.

    Args:
      model: with `config.decoder`.
      params: its parameters.
      keep: for each layer, ascending indices under `heads` and `neurons`; what is absent stays
        whole. Every group that shares a key/value head keeps as many query heads.

    Returns:
      `(model, params)`, equal to the model with the dropped ones' gates at zero.

    Raises:
      RecipeError: a layer or an index does not exist, nothing would remain of a layer or a group,
        groups keep different numbers of heads, or a weight that must shrink is quantized.
    """
    config = model.config.decoder
    unknown = sorted(set(keep) - set(range(config.num_layers)))
    if unknown:
        raise RecipeError(f"{NAME}: the decoder has no layer {unknown[0]!r} of {config.num_layers}")
    layers = dict(params["decoder"]["layers"])
    widths = {"num_heads": [], "num_kv_heads": [], "intermediate_size": []}
    for index in range(config.num_layers):
        keep_units = _checked(config, index, keep.get(index, {}))
        layers[str(index)] = _shrink_layer(config, index, layers[str(index)], keep_units)
        own_kv = config.heads(index) == config.kv_heads(index)
        heads = len(keep_units.get("heads", range(config.heads(index))))
        widths["num_heads"].append(heads)
        widths["num_kv_heads"].append(heads if own_kv else config.kv_heads(index))
        widths["intermediate_size"].append(
            len(keep_units.get("neurons", range(config.neurons(index))))
        )
    smaller = dataclasses.replace(
        config, **{name: one_or_each(values) for name, values in widths.items()}
    )
    params = {**params, "decoder": {**params["decoder"], "layers": layers}}
    return model.clone(config=dataclasses.replace(model.config, decoder=smaller)), params


def _checked(config: DecoderConfig, index: int, keep_units: KeepUnits) -> KeepUnits:
    """Indices that make a layer, as arrays."""
    where = f"{NAME}: decoder layer {index}"
    sizes = {"heads": config.heads(index), "neurons": config.neurons(index)}
    unknown = sorted(set(keep_units) - set(sizes))
    if unknown:
        raise RecipeError(f"{where}: {unknown[0]!r} is unknown; heads and neurons are kept")
    keep_units = {
        name: check_kept(keep_units[name], sizes[name], f"{where}: {name}") for name in keep_units
    }
    if "heads" in keep_units:
        check_groups(keep_units["heads"], sizes["heads"], config.kv_heads(index), where)
    return keep_units


def check_groups(keep: np.ndarray, heads: int, groups: int, where: str) -> None:
    """Refuses query heads of which the groups that share a key/value head keep different numbers.

    Args:
      keep: indices of the query heads that stay.
      heads: `N`, query heads.
      groups: `K`, key/value heads; `N` where each query head has its own.
      where: layer, for the message.

    Raises:
      RecipeError: a group would lose all its heads, or groups would keep different numbers.
    """
    if groups == heads:
        return
    size = heads // groups
    counts = np.bincount(keep // size, minlength=groups)
    if not counts.all():
        raise RecipeError(
            f"{where}: group {int(np.argmin(counts))} would lose all {size} query heads that "
            "share its key/value head; keep at least one of each group"
        )
    if len(set(counts.tolist())) > 1:
        raise RecipeError(
            f"{where}: groups would keep {counts.tolist()} query heads; each must keep as many"
        )


def _shrink_layer(
    config: DecoderConfig, index: int, layer: Params, keep_units: KeepUnits
) -> Params:
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    where = f"decoder/layers/{index}"
    if "heads" in keep_units:
        columns = channels(keep_units["heads"], config.head_dim)
        own_kv = config.heads(index) == config.kv_heads(index)
        for name in ("q_proj", "k_proj", "v_proj") if own_kv else ("q_proj",):
            attention[name] = rows_of(attention[name], columns, f"{where}/attention/{name}", NAME)
        path = f"{where}/attention/o_proj"
        attention["o_proj"] = columns_of(attention["o_proj"], columns, path, NAME)
    if "neurons" in keep_units:
        both = np.concatenate(
            [keep_units["neurons"], keep_units["neurons"] + config.neurons(index)]
        )
        path = f"{where}/mlp/gate_up_proj"
        mlp["gate_up_proj"] = rows_of(mlp["gate_up_proj"], both, path, NAME)
        path = f"{where}/mlp/down_proj"
        mlp["down_proj"] = columns_of(mlp["down_proj"], keep_units["neurons"], path, NAME)
    return {**layer, "attention": attention, "mlp": mlp}


def channels(heads: np.ndarray, head_dim: int) -> np.ndarray:
    """Indices of the dimensions of heads, ascending."""
    return (heads[:, None] * head_dim + np.arange(head_dim)).ravel()


def _layers(config: DecoderConfig, params: Params, where: str | None) -> dict[str, set[int]]:
    """Layers whose attention, and whose feed-forward network, a pattern selects."""
    chosen = boxes.select(params, where)
    layers = {
        branch: {
            index
            for index in range(config.num_layers)
            if any(path.startswith(f"decoder/layers/{index}/{branch}/") for path in chosen)
        }
        for branch in ("attention", "mlp")
    }
    if not any(layers.values()):
        raise RecipeError(
            f"prune.structured: where={where!r} matches no decoder layer; "
            "their weights lie at decoder/layers/<i>/attention and decoder/layers/<i>/mlp"
        )
    return layers
