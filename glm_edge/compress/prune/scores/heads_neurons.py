"""Scores of the attention heads and neurons of a decoder."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge import params as boxes
from glm_edge.compress import batches
from glm_edge.compress.prune.scores import from_weights as weight_scores
from glm_edge.compress.transform import Context
from glm_edge.configs import DecoderConfig
from glm_edge.errors import DataError
from glm_edge.params.tree import Params

LayerScores = dict[str, np.ndarray]


def taylor(
    model: nn.Module, params: Params, calibration: Sequence[batches.Batch], context: Context
) -> list[LayerScores]:
    """First-order estimate of how much the loss changes when a head or neuron is removed.

    Each is scaled by a gate at one; a row's score is `|gate * dL/dgate|` of that row's own loss,
    and scores are averaged over rows, so that rows that pull in opposite directions do not cancel.

    Args:
      model: with a decoder.
      params: its parameters.
      calibration: batches to score on.
      context: for progress.

    Returns:
      For each layer, `heads` [N] and `neurons` [F], float64.

    Raises:
      DataError: there is no calibration, or its loss is not finite.

    References:
      Are Sixteen Heads Really Better than One?, https://arxiv.org/abs/1905.10650;
      Importance Estimation for Neural Network Pruning, https://arxiv.org/abs/1906.10771.
    """
    total, rows = None, 0
    for index, batch in enumerate(calibration):
        batch = batches.to_device(model, batch, f"calibration batch {index}")
        terms = jax.device_get(_row_terms(model, params, batch))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(terms)):
            raise DataError(f"calibration batch {index}: the loss or its gradient is not finite")
        terms = jax.tree.map(np.float64, terms)
        total = terms if total is None else jax.tree.map(np.add, total, terms)
        rows += batch["tokens"].shape[0]
        context.advance("score", index + 1, len(calibration))
    if total is None:
        raise DataError("prune.structured: score='taylor' needs calibration= batches")
    return [
        {
            "heads": weight_scores.taylor(layer["attention"]["heads"], rows),
            "neurons": weight_scores.taylor(layer["mlp"]["neurons"], rows),
        }
        for layer in (total[str(i)] for i in range(len(total)))
    ]


@functools.partial(jax.jit, static_argnames="model")
def _row_terms(model: nn.Module, params: Params, batch: batches.Batch) -> dict[str, Any]:
    """Sum over rows of `|gate * dL/dgate|`, laid out like the layers."""
    rows = batch["tokens"].shape[0]

    def loss(layers: dict[str, Any]) -> Array:
        variables = {"gates": {"decoder": {"layers": layers}}}
        return jnp.sum(batches.row_losses(model, params, batch, variables))

    gates = unit_gates(model.config.decoder, rows)
    terms = jax.grad(loss)(gates)
    return jax.tree.map(lambda term: jnp.sum(jnp.abs(term), axis=0).reshape(-1), terms)


def unit_gates(config: DecoderConfig, rows: int) -> dict[str, Any]:
    """Gates of one for each row of a batch, in the shapes that broadcast over its tokens."""
    return {
        str(i): {
            "attention": {"heads": jnp.ones((rows, config.heads(i), 1))},
            "mlp": {"neurons": jnp.ones((rows, 1, config.neurons(i)))},
        }
        for i in range(config.num_layers)
    }


def magnitude(config: DecoderConfig, params: Params) -> list[LayerScores]:
    """Euclidean norm of all weights that a head or neuron owns.

    Args:
      config: of the decoder.
      params: of the whole model.

    Returns:
      As `taylor`.

    References:
      Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710.
    """
    scores = []
    for index in range(config.num_layers):
        layer = params["decoder"]["layers"][str(index)]
        query, output = _square(layer, "attention/q_proj"), _square(layer, "attention/o_proj")
        fused, down = _square(layer, "mlp/gate_up_proj"), _square(layer, "mlp/down_proj")
        heads, neurons = config.heads(index), config.neurons(index)
        head = query.reshape(heads, -1).sum(1) + output.sum(0).reshape(heads, -1).sum(1)
        neuron = fused.reshape(2, neurons, -1).sum((0, 2)) + down.sum(0)
        scores.append({"heads": np.sqrt(head), "neurons": np.sqrt(neuron)})
    return scores


def _square(layer: dict[str, Any], path: str) -> np.ndarray:
    branch, name = path.split("/")
    weight = boxes.dense(layer[branch][name]["weight"])
    return np.square(np.asarray(weight, np.float64))
