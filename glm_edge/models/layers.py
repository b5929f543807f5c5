"""Linear, Embed, norms and feed-forward networks of all architectures, with weights `[out, in]`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from glm_edge import params
from glm_edge.errors import CheckpointError
from glm_edge.kernels import norm, sparse_mlp
from glm_edge.params.sharding import constrain

Initializer = Callable[..., Array]
normal = nn.initializers.normal
# Parameter with weights laid out by neuron, which replaces a gated network's matrices; see
# `kernels.sparse_mlp`.
SKIPPING = "skipping"


class Linear(nn.Module):
    """A linear layer with an optionally boxed weight `[features, in]`.

    Attributes:
      features: width of the output.
      use_bias: adds a learned bias.
      compute: arithmetic of the product, see `glm_edge.params.linear`.
      kernel_init: initializer of the weight.
    """

    features: int
    use_bias: bool = False
    compute: str = "float32"
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal", -1, -2)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = boxed_param(self, "weight", self.kernel_init, (self.features, x.shape[-1]))
        self.sow_input(x)
        y = params.linear(x, weight, self.compute)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        return y

    def sow_input(self, x: Array) -> None:
        """Sow the input, as rows [N, in], into the collection `inputs` during calibration."""
        if self.is_mutable_collection("inputs") and not self.is_initializing():
            self.sow("inputs", "rows", x.reshape(-1, x.shape[-1]))


class Embed(nn.Module):
    """An embedding `[num_embeddings, features]`, also the output head of a tied model."""

    num_embeddings: int
    features: int
    compute: str = "float32"

    def setup(self) -> None:
        self.weight = boxed_param(
            self, "weight", normal(self.features**-0.5), (self.num_embeddings, self.features)
        )

    def __call__(self, tokens: Array) -> Array:
        return params.lookup(self.weight, tokens)

    def attend(self, x: Array) -> Array:
        """Compute logits `[..., num_embeddings]` from `[..., features]`."""
        return params.linear(x, self.weight, self.compute)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return norm.rms_norm(x, self.param("weight", nn.initializers.ones, x.shape[-1:]), self.eps)


class LayerNorm(nn.Module):
    """Layer norm with a learned scale and shift."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return norm.layer_norm(x, weight, bias, self.eps)


class GatedMLP(nn.Module):
    """`down(up * silu(gate))`, with gate and up fused in one matrix, gate first.

    References:
      GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
    """

    neurons: int
    features: int
    use_bias: bool = False
    compute: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.has_variable("params", SKIPPING):
            return sparse_mlp.sparse_mlp(x, self.get_variable("params", SKIPPING))
        fused = Linear(2 * self.neurons, self.use_bias, self.compute, name="gate_up_proj")(x)
        gate, up = jnp.split(fused, 2, axis=-1)
        hidden = gated(self, "neurons", up * nn.silu(gate))
        hidden = constrain(hidden, "batch", "length", "neurons")
        return Linear(self.features, self.use_bias, self.compute, name="down_proj")(hidden)


class MLP(nn.Module):
    """`fc2(gelu(fc1))`, with exact GELU or its tanh approximation (`approximate`)."""

    neurons: int
    features: int
    use_bias: bool = True
    compute: str = "float32"
    approximate: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = Linear(self.neurons, self.use_bias, self.compute, name="fc1")(x)
        hidden = gated(self, "neurons", nn.gelu(hidden, approximate=self.approximate))
        hidden = constrain(hidden, "batch", "length", "neurons")
        return Linear(self.features, self.use_bias, self.compute, name="fc2")(hidden)


class Stack(nn.Module):
    """Layers named `0`, `1`, …, so that their parameters are stored at `layers/<i>`."""

    layers: tuple[nn.Module, ...]

    def setup(self) -> None:
        for index, layer in enumerate(self.layers):
            setattr(self, str(index), layer.copy(parent=None))

    def __getitem__(self, index: int) -> nn.Module:
        return getattr(self, str(index))


def gated(module: nn.Module, name: str, x: Array) -> Array:
    """Multiply heads or neurons by a gate, if present, for importance scores.

    Args:
      module: module whose collection `gates` may contain the gate.
      name: `neurons`, a gate that broadcasts against `x`; or `heads`, a gate [..., N, 1] without
        the token axis.
      x: [B, T, F] neurons, or [B, T, N, H] heads.

    Returns:
      Array in the shape of `x`.
    """
    if not module.has_variable("gates", name):
        return x
    gate: Array = module.get_variable("gates", name)
    return x * (gate[:, None] if name == "heads" else gate)


def boxed_param(module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...]) -> Any:
    """Declare a parameter that may be stored as a box, and return the array or box.

    Args:
      module: module that owns the parameter.
      name: name of the parameter.
      init: initializer of a dense array.
      shape: required dense shape.

    Returns:
      The stored array or box.

    Raises:
      CheckpointError: the stored parameter has another dense shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    stored: Any = module.get_variable("params", name)
    if tuple(stored.shape) != tuple(shape):
        where = "/".join((*module.path, name))
        raise CheckpointError(f"{where}: shape is {tuple(stored.shape)}, the model needs {shape}")
    return stored
