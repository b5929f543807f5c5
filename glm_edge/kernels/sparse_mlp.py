"""A gated feed-forward network in which each token activates only some neurons.

Letters of shapes: `R` rows, `D` hidden size, `F` neurons. The gate selects neurons without a
predictor: a neuron with a small `silu(gate)` contributes little, whatever its other weights. So the
gate is computed in full, and the kernel reads `up` and `down` for the selected neurons only.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from glm_edge.kernels import matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseMLP:
    """Weights of a gated feed-forward network, laid out by neuron.

    Attributes:
      gate: [F, D].
      rows: [F, 2 D], the weights of each neuron: its row of `up`, then its column of `down`.
      threshold: scalar; a neuron is active if its `|silu(gate)|` is at least this fraction of the
        largest value of its token.
      sizes: ascending neuron counts, one compiled branch each. The smallest count that fits all
        active neurons runs. The last count limits the active neurons to the largest gates.
    """

    gate: Array
    rows: Array
    threshold: Array
    sizes: tuple[int, ...] = field(metadata={"static": True})


def sparse_mlp(x: Array, weights: SparseMLP) -> Array:
    """Compute `down(up * silu(gate))` over the active neurons.

    A single row reads only the weights of its active neurons. Several rows are computed in full and
    masked, which returns the same values without a gain in speed.

    Args:
      x: [..., D] activations.
      weights: weights laid out by neuron.

    Returns:
      [..., D] in the type of `x`.

    References:
      CATS: Contextually-Aware Thresholding for Sparsity, https://arxiv.org/abs/2404.08763.
    """
    rows = x.reshape(-1, x.shape[-1])
    gate = jax.nn.silu(matmul.dense(rows, weights.gate.astype(rows.dtype)))
    # CATS thresholds the activation |silu(gate)|, here relative to the largest of the token.
    size = jnp.abs(gate)
    active = size >= weights.threshold * jnp.max(size, axis=-1, keepdims=True)
    if rows.shape[0] == 1:
        mixed = _one_row(rows, gate[0], size[0], active[0], weights)
    else:
        mixed = _all_neurons(rows, gate * _limited(active, size, weights.sizes[-1]), weights.rows)
    return mixed.reshape(x.shape)


def _limited(active: Array, size: Array, count: int) -> Array:
    """Limit the active neurons of each row to the `count` largest; ties keep the first."""
    if count == size.shape[-1]:
        return active
    _, index = jax.lax.top_k(size, count)
    largest = jnp.zeros_like(active).at[jnp.arange(len(size))[:, None], index].set(True)
    return active & largest


def _one_row(x: Array, gate: Array, size: Array, active: Array, weights: SparseMLP) -> Array:
    def with_count(count: int) -> Callable[[], Array]:
        if count == len(gate):
            return lambda: _all_neurons(x, (gate * active)[None], weights.rows)

        def gathered() -> Array:
            _, index = jax.lax.top_k(size, count)
            return _all_neurons(x, (gate * active)[index][None], weights.rows[index])

        return gathered

    branches = [with_count(count) for count in weights.sizes]
    if len(branches) == 1:
        return branches[0]()
    # The index of the smallest size that fits all active neurons.
    limits = jnp.asarray(weights.sizes[:-1])
    return jax.lax.switch(jnp.sum(jnp.sum(active) > limits), branches)


def _all_neurons(x: Array, gate: Array, rows: Array) -> Array:
    """Run `x` [R, D] through neurons [F', 2 D] whose activated gates are [R, F']."""
    up, down = jnp.split(rows.astype(x.dtype), 2, axis=-1)
    hidden = gate * matmul.dense(x, up)
    return jax.lax.dot(hidden, down, precision=jax.lax.Precision.HIGHEST)
