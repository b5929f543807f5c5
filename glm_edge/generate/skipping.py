"""Neuron skipping at run time: each token computes only the neurons that its gate activates."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from glm_edge import params as boxes
from glm_edge.configs import GLMConfig
from glm_edge.errors import RecipeError
from glm_edge.kernels.sparse_mlp import SparseMLP
from glm_edge.models.layers import SKIPPING
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params

# With a threshold, programs are compiled for these fractions of the neurons.
FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1)


def skip_neurons(
    model: MultimodalGLM,
    params: Params,
    keep: float | None = None,
    threshold: float | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Lay the decoder's feed-forward weights out by neuron, so that decoding skips some.

    The result replaces the parameters wherever the model runs. It cannot be saved, compressed or
    exported. Decoding one row reads fewer weights. A prompt computes all neurons and drops the
    skipped ones.

    Args:
      model: a GLM.
      params: its parameters, dense or masked.
      keep: fraction of neurons that each token uses, those with the largest `|silu(gate)|`; above
        0, up to 1. Compute is the same for every token.
      threshold: instead of `keep`, in 0..1. A neuron is used when its `|silu(gate)|` is at least
        this fraction of the token's largest. Compute varies per token, in steps of an eighth, a
        quarter, half and all of the neurons.
      layers: indices of the layers that skip; None skips in all.

    Returns:
      Parameters for `model`.

    Raises:
      RecipeError: neither or both of `keep` and `threshold` are given, one is out of range, the
        decoder lacks a layer, or a weight is quantized.

    References:
      CATS: Contextually-Aware Thresholding for Sparsity, https://arxiv.org/abs/2404.08763.
    """
    if not isinstance(getattr(model, "config", None), GLMConfig):
        raise RecipeError(f"skip_neurons: {type(model).__name__} has no GLM decoder")
    if (keep is None) == (threshold is None):
        raise RecipeError("skip_neurons: pass keep= or threshold=, one of them")
    if keep is not None and not 0.0 < keep <= 1.0:
        raise RecipeError(f"skip_neurons: keep must be above 0 and up to 1, not {keep}")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise RecipeError(f"skip_neurons: threshold must be in 0..1, not {threshold}")
    config = model.config.decoder
    chosen = range(config.num_layers) if layers is None else layers
    unknown = sorted(set(chosen) - set(range(config.num_layers)))
    if unknown:
        raise RecipeError(f"skip_neurons: the decoder has no layer {unknown[0]}")
    changed = dict(params["decoder"]["layers"])
    for index in chosen:
        neurons = config.neurons(index)
        fractions = FRACTIONS if keep is None else (keep,)
        sizes = sorted({max(1, math.ceil(part * neurons - 1e-9)) for part in fractions})
        layer = changed[str(index)]
        if SKIPPING in layer["mlp"]:
            raise RecipeError(f"skip_neurons: layer {index} skips already; start from its weights")
        fused, down = (_dense(layer["mlp"], name, index) for name in ("gate_up_proj", "down_proj"))
        gate, up = jnp.split(fused, 2)
        laid_out = SparseMLP(
            gate=gate,
            rows=jnp.concatenate([up, down.T], axis=-1),
            threshold=jnp.float32(0.0 if threshold is None else threshold),
            sizes=tuple(sizes),
        )
        changed[str(index)] = {**layer, "mlp": {SKIPPING: laid_out}}
    return {**params, "decoder": {**params["decoder"], "layers": changed}}


def _dense(mlp: Any, name: str, index: int) -> Any:
    weight = mlp[name]["weight"]
    if isinstance(weight, boxes.Quantized | boxes.FakeQuantized):
        raise RecipeError(
            f"skip_neurons: decoder/layers/{index}/mlp/{name} is quantized; the layout by neuron "
            "needs dense weights"
        )
    return boxes.dense(weight)
