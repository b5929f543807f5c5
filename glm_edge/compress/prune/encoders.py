"""Removing heads and neurons of vision, speech and text encoders."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.prune.shrink.arrays import (
    check_kept,
    columns_of,
    highest,
    one_or_each,
    rows_of,
    shrunk_report,
)
from glm_edge.compress.prune.structured import (
    KeepUnits,
    Structured,
    channels,
    check_groups,
    heads_to_keep,
    neurons_to_keep,
    some,
)
from glm_edge.compress.transform import (
    Context,
    Result,
    register,
)
from glm_edge.configs import GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.errors import DataError, RecipeError
from glm_edge.params.tree import Params

NAME = "prune.encoders"
SCORES = ("taylor", "magnitude")
_READS = {"vision": "images", "speech": "audio"}
Encoder = VisionConfig | SpeechConfig | TextConfig


class _Layout(NamedTuple):
    """Where a layer of an encoder keeps its parts, as keys from the layer down."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    first: str
    second: str
    halves: int


@register(NAME)
class Encoders(Structured):
    """Removes heads and neurons of the encoders and shrinks their arrays and configurations.

    A head that has its own keys and values goes with them; where query heads share them, as many go
    from each group and the shared ones stay. A pooling head stays whole, and
    so does the projector. At least the asked fraction goes.

    Attributes:
      heads: fraction of heads to remove, in 0..1, below 1.
      neurons: fraction of neurons to remove, in 0..1, below 1.
      score: `taylor`, from gradients of a GLM's calibration loss, or `magnitude`, from weights
        alone.
      where: regular expression searched in the encoders' paths, such as `^speech/`; layers whose
        attention (or feed-forward) weights it matches lose heads (or neurons). None is all layers
        of all encoders.
      neuron_multiple: the number of neurons kept is rounded down to a multiple of this in layers at
        least four times as wide.
      max_batches: calibration batches that are scored, taken evenly from those given.

    Raises:
      RecipeError: an option has no meaning; on call, the model has no encoder, nothing would
        remain, a pattern matches none of its layers, or a weight is quantized.
      DataError: `taylor` without calibration that the encoder reads.

    References:
      Are Sixteen Heads Really Better than One?, https://arxiv.org/abs/1905.10650.
    """

    def apply(self, model: nn.Module, params: Params, context: Context) -> Result:
        configs = parts(model)
        chosen = boxes.select(params, self.where)
        wanted = {part: _layers(config, part, chosen) for part, config in configs.items()}
        wanted = {part: layers for part, layers in wanted.items() if layers}
        if not wanted:
            raise RecipeError(
                f"{NAME}: where={self.where!r} matches no layer of an encoder; their weights lie "
                "at vision/layers/<i> and speech/layers/<i>"
            )
        if self.score == "taylor":
            importance = taylor(
                model, params, some(context.calibration, self.max_batches), tuple(wanted), context
            )
        else:
            importance = {part: magnitude(configs[part], _tree(params, part)) for part in wanted}
        smaller, shrunk = model, params
        for part, layers in wanted.items():
            config, keep = configs[part], {}
            for index, kinds in layers.items():
                scores, keep_units = importance[part][index], {}
                if self.heads and "heads" in kinds:
                    groups = config.kv_heads(index)
                    keep_units["heads"] = heads_to_keep(scores["heads"], groups, self.heads, NAME)
                if self.neurons and "neurons" in kinds:
                    count = neurons_to_keep(
                        config.neurons(index), self.neurons, self.neuron_multiple, NAME
                    )
                    keep_units["neurons"] = highest(scores["neurons"], count)
                keep[index] = keep_units
            smaller, shrunk = shrink_encoder(smaller, shrunk, keep, part)
        return smaller, shrunk, shrunk_report(NAME, (model, params), (smaller, shrunk))


encoders = Encoders


def parts(model: nn.Module) -> dict[str, Encoder]:
    """Configurations of a model's encoders: `vision` and `speech`, or `""` for one on its own.

    Raises:
      RecipeError: it has none.
    """
    config = getattr(model, "config", None)
    if isinstance(config, Encoder):
        return {"": config}
    configs = {name: getattr(config, name, None) for name in ("vision", "speech")}
    configs = {name: part for name, part in configs.items() if part is not None}
    if not isinstance(config, GLMConfig) or not configs:
        raise RecipeError(f"{NAME}: {type(model).__name__} has no encoder to shrink")
    return configs


def shrink_encoder(
    model: nn.Module, params: Params, keep: dict[int, KeepUnits], part: str = ""
) -> tuple[nn.Module, Params]:
    """Drops heads and neurons of an encoder from arrays and configuration.

    Args:
      model: a GLM, or an encoder on its own.
      params: its parameters.
      keep: for each layer, ascending indices under `heads` and `neurons`; what is absent stays
        whole.
      part: `vision` or `speech` of a GLM; empty for an encoder on its own.

    Returns:
      `(model, params)`, equal to the model with the dropped ones' gates at zero.

    Raises:
      RecipeError: the model has no such encoder, a layer or an index does not exist, nothing of a
        layer would remain, or a weight that must shrink is quantized.
    """
    configs = parts(model)
    if part not in configs:
        raise RecipeError(f"{NAME}: the model has no encoder {part!r}; it has {list(configs)}")
    config, tree = configs[part], _tree(params, part)
    unknown = sorted(set(keep) - set(range(config.num_layers)))
    if unknown:
        raise RecipeError(f"{NAME}: the encoder has no layer {unknown[0]!r} of {config.num_layers}")
    layers = dict(tree["layers"])
    # A pooling head comes after the layers and stays whole.
    places = range(config.num_layers + getattr(config, "pooling_head", False))
    heads, neurons = [config.heads(i) for i in places], [config.neurons(i) for i in places]
    for index, keep_units in keep.items():
        layer, where = layers[str(index)], f"{part}/layers/{index}".lstrip("/")
        if "heads" in keep_units:
            index_of = check_kept(keep_units["heads"], heads[index], f"{NAME}: {where}: heads")
            check_groups(index_of, heads[index], config.kv_heads(index), f"{NAME}: {where}")
            alone = heads[index] == config.kv_heads(index)
            layer = _without_heads(config, layer, index_of, where, alone)
            heads[index] = len(index_of)
        if "neurons" in keep_units:
            index_of = check_kept(
                keep_units["neurons"], neurons[index], f"{NAME}: {where}: neurons"
            )
            layer, neurons[index] = _without_neurons(config, layer, index_of, where), len(index_of)
        layers[str(index)] = layer
    fields = {"num_heads": one_or_each(heads), "intermediate_size": one_or_each(neurons)}
    if fields["num_heads"] != config.num_heads:
        fields["head_dim"] = config.head_size
    smaller, tree = dataclasses.replace(config, **fields), {**tree, "layers": layers}
    if not part:
        return model.clone(config=smaller), tree
    changed = dataclasses.replace(model.config, **{part: smaller})
    return model.clone(config=changed), {**params, part: tree}


def _without_heads(
    config: Encoder, layer: Params, keep: np.ndarray, where: str, alone: bool
) -> Params:
    at, columns = _layout(config).attention, channels(keep, config.head_size)
    attention = dict(_inside(layer, at))
    for name in ("q_proj", "k_proj", "v_proj") if alone else ("q_proj",):
        attention[name] = rows_of(attention[name], columns, f"{where}/attention/{name}", NAME)
    path = f"{where}/attention/o_proj"
    attention["o_proj"] = columns_of(attention["o_proj"], columns, path, NAME)
    return _replaced(layer, at, attention)


def _without_neurons(config: Encoder, layer: Params, keep: np.ndarray, where: str) -> Params:
    layout = _layout(config)
    mlp = dict(_inside(layer, layout.mlp))
    width = boxes.dense(mlp[layout.second]["weight"]).shape[-1]
    rows = np.concatenate([keep + half * width for half in range(layout.halves)])
    first, second = layout.first, layout.second
    mlp[first] = rows_of(mlp[first], rows, f"{where}/{first}", NAME)
    mlp[second] = columns_of(mlp[second], keep, f"{where}/{second}", NAME)
    return _replaced(layer, layout.mlp, mlp)


def taylor(
    model: nn.Module,
    params: Params,
    calibration: Sequence[batches.Batch],
    wanted: Sequence[str],
    context: Context,
) -> dict[str, list[dict[str, np.ndarray]]]:
    """First-order estimate of how much the loss changes when a head or neuron is removed.

    A row's score is `|gate * dL/dgate|` of that row's own loss with the gate at one; scores are
    averaged over the rows of batches that the encoder reads.

    Args:
      model: a GLM with encoders.
      params: its parameters.
      calibration: batches to score on.
      wanted: encoders to score.
      context: for progress.

    Returns:
      For each encoder and layer, `heads` [N] and `neurons` [F], float64.

    Raises:
      RecipeError: an encoder on its own has no loss.
      DataError: no batch holds what an encoder reads, or a loss is not finite.

    References:
      Are Sixteen Heads Really Better than One?, https://arxiv.org/abs/1905.10650.
    """
    if not isinstance(model.config, GLMConfig):
        raise RecipeError(
            f"{NAME}: score='taylor' is of a GLM's loss on the next token, which "
            f"{type(model).__name__} does not have; score by magnitude"
        )
    totals: dict[str, Any] = {}
    rows = dict.fromkeys(wanted, 0)
    for index, batch in enumerate(calibration):
        batch = batches.to_device(model, batch, f"{NAME}: calibration batch {index}")
        read = tuple(part for part in wanted if _READS[part] in batch)
        terms = jax.device_get(_terms(model, params, batch, read)) if read else {}
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(terms)):
            raise DataError(
                f"{NAME}: calibration batch {index}: the loss or its gradient is not finite"
            )
        for part, term in jax.tree.map(np.float64, terms).items():
            known = part in totals
            totals[part] = jax.tree.map(np.add, totals[part], term) if known else term
            rows[part] += batch["tokens"].shape[0]
        context.advance("score", index + 1, len(calibration))
    for part in wanted:
        if not rows[part]:
            raise DataError(
                f"{NAME}: score='taylor' needs calibration= batches with {_READS[part]}, and there "
                "are none; add some, restrict where=, or score by magnitude"
            )
    return {part: _by_layer(model, part, totals[part], rows[part]) for part in wanted}


def _terms(model: nn.Module, params: Params, batch: batches.Batch, wanted: tuple[str, ...]):
    """As `_row_terms`; rows with images of their own sizes are taken one after the other."""
    apart = batches.single_rows(model, batch)
    if apart is None:
        return _row_terms(model, params, batch, wanted)
    # A row that lacks an input leaves its encoder's gates without effect.
    slopes = [_one_row_terms(model, params, row, wanted) for row in apart]
    return jax.tree.map(lambda *terms: sum(terms), *slopes)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _one_row_terms(model: nn.Module, params: Params, row: batches.Batch, wanted: tuple[str, ...]):
    def loss(gates: Params) -> Array:
        return batches.row_losses(model, params, row, {"gates": gates})[0]

    slopes = jax.grad(loss)(unit_gates(model, wanted))
    return jax.tree.map(lambda slope: jnp.abs(slope).reshape(-1), slopes)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _row_terms(model: nn.Module, params: Params, batch: batches.Batch, wanted: tuple[str, ...]):
    """Sum over rows of `|gate * dL/dgate|`, laid out like the gates."""
    rows = batch["tokens"].shape[0]
    axes: dict[str, int | None] = dict.fromkeys(batch, 0)
    if "positions" in batch:
        axes["positions"] = batch["positions"].ndim - 2
    if "mask" in batch and batch["mask"].shape[0] != rows:
        axes["mask"] = None

    def loss(gates: Params, row: batches.Batch) -> Array:
        alone = {
            name: value if axes[name] is None else jnp.expand_dims(value, axes[name])
            for name, value in row.items()
        }
        return batches.row_losses(model, params, alone, {"gates": gates})[0]

    # Windows of an image make batches of their own, so a gate cannot have an axis of rows.
    slopes = jax.vmap(jax.grad(loss), in_axes=(None, axes))(unit_gates(model, wanted), batch)
    return jax.tree.map(lambda slope: jnp.sum(jnp.abs(slope), axis=0).reshape(-1), slopes)


def unit_gates(model: nn.Module, wanted: Sequence[str]) -> Params:
    """The collection `gates` of encoders, all at one."""
    configs, gates = parts(model), {}
    for part in wanted:
        config, layers = configs[part], {}
        layout = _layout(config)
        for index in range(config.num_layers):
            layer = _replaced(
                {}, layout.attention, {"heads": jnp.ones((1, config.heads(index), 1))}
            )
            gated = {**_inside(layer, layout.mlp), "neurons": jnp.ones(config.neurons(index))}
            layers[str(index)] = _replaced(layer, layout.mlp, gated)
        gates = gates | ({part: {"layers": layers}} if part else {"layers": layers})
    return gates


def magnitude(config: Encoder, tree: Params) -> list[dict[str, np.ndarray]]:
    """Euclidean norm of all weights that a head or neuron owns.

    Args:
      config: of the encoder.
      tree: its parameters.

    Returns:
      For each layer, `heads` [N] and `neurons` [F], float64.

    References:
      Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710.
    """
    layout, scores = _layout(config), []
    for index in range(config.num_layers):
        layer = tree["layers"][str(index)]
        attention, mlp = _inside(layer, layout.attention), _inside(layer, layout.mlp)
        heads, neurons = config.heads(index), config.neurons(index)
        names = "qkv" if heads == config.kv_heads(index) else "q"
        owned = sum(_square(attention[f"{n}_proj"]).reshape(heads, -1).sum(1) for n in names)
        owned = owned + _square(attention["o_proj"]).sum(0).reshape(heads, -1).sum(1)
        first = _square(mlp[layout.first]).reshape(layout.halves, neurons, -1).sum((0, 2))
        neuron = first + _square(mlp[layout.second]).sum(0)
        scores.append({"heads": np.sqrt(owned), "neurons": np.sqrt(neuron)})
    return scores


def _square(linear: Params) -> np.ndarray:
    return np.square(np.asarray(boxes.dense(linear["weight"]), np.float64))


def _layout(config: Encoder) -> _Layout:
    if isinstance(config, VisionConfig):
        names = ("gate_up_proj", "down_proj", 2) if config.gated_mlp else ("fc1", "fc2", 1)
        return _Layout(("attention",), ("mlp",), *names)
    attention = ("attention",) if isinstance(config, SpeechConfig) else ()
    return _Layout(attention, (), "fc1", "fc2", 1)


def _layers(config: Encoder, part: str, chosen: Sequence[str]) -> dict[int, set[str]]:
    """Lists the parts that a pattern selects of each layer: `heads`, `neurons` or both."""
    layout, kinds_by_layer = _layout(config), {}
    for index in range(config.num_layers):
        at = f"{part}/layers/{index}/".lstrip("/")
        path_parts = [path.removeprefix(at).split("/") for path in chosen if path.startswith(at)]
        kinds = {
            "neurons" if layout.first in names or layout.second in names else "heads"
            for names in path_parts
        }
        if kinds:
            kinds_by_layer[index] = kinds
    return kinds_by_layer


def _by_layer(model: nn.Module, part: str, term: Params, rows: int) -> list[dict[str, np.ndarray]]:
    config = parts(model)[part]
    layout, scores = _layout(config), []
    for index in range(config.num_layers):
        layer = term["layers"][str(index)]
        scores.append(
            {
                "heads": _inside(layer, layout.attention)["heads"] / rows,
                "neurons": _inside(layer, layout.mlp)["neurons"] / rows,
            }
        )
    return scores


def _tree(params: Params, part: str) -> Params:
    return params[part] if part else params


def _inside(layer: Params, at: tuple[str, ...]) -> Params:
    return functools.reduce(lambda tree, key: tree.get(key, {}), at, layer)


def _replaced(layer: Params, at: tuple[str, ...], inner: Params) -> Params:
    if not at:
        return {**layer, **inner}
    return {**layer, at[0]: inner}
