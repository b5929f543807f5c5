"""Normalization over the last axis, with statistics in float32."""

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Divide by the root mean square over the last axis, then multiply by `weight`.

    Args:
      x: [..., D] activations of any float type.
      weight: [D] scale per dimension.
      eps: added to the mean square before the root.

    Returns:
      [..., D] in the type of `x` times `weight`.

    References:
      Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * x32.astype(x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Center, divide by the standard deviation over the last axis, then scales and shifts.

    Args:
      x: [..., D] activations of any float type.
      weight: [D] scale per dimension.
      bias: [D] shift per dimension.
      eps: added to the variance before the root.

    Returns:
      [..., D] in the type of `x` times `weight`.

    References:
      Layer Normalization, https://arxiv.org/abs/1607.06450.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * x32.astype(x.dtype) + bias
