"""Stacks of layers of a GLM or of an encoder on its own, and the names of their weights."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn

from glm_edge.configs import DecoderConfig, GLMConfig, SpeechConfig, TextConfig, VisionConfig
from glm_edge.errors import RecipeError

DECODER = "decoder"
ENCODERS = ("vision", "speech")
# Input of a batch that a stack reads.
READS = {DECODER: "tokens", "vision": "images", "speech": "audio"}


class Stack(NamedTuple):
    """Layers of a decoder or an encoder.

    Attributes:
      name: `decoder`, `vision` or `speech` of a GLM; empty for an encoder on its own.
      config: configuration of the stack.
      attention: folder of the attention's weights within a layer, empty for the layer itself.
      mlp: folder of the feed-forward network's weights.
      first: name of the weight whose rows are neurons; gate and up projection may be fused in it.
      second: name of the weight whose columns are neurons.
    """

    name: str
    config: Any
    attention: str
    mlp: str
    first: str
    second: str

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        is_decoder = isinstance(self.config, DecoderConfig)
        return self.config.head_dim if is_decoder else self.config.head_size

    def layer(self, index: int | str) -> str:
        """Return the path of a layer."""
        return _joined(self.name, f"layers/{index}")

    def attention_paths(self, index: int) -> list[str]:
        """Return the paths of a layer's query, key, value and output projection."""
        folder = _joined(self.layer(index), self.attention)
        return [f"{folder}/{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]

    def head_paths(self, index: int) -> tuple[list[str], str]:
        """Return the paths of the projections whose rows, and of that whose columns, are heads.

        Keys and values are among the former where each query head has its own.
        """
        *inputs, output = self.attention_paths(index)
        owns_keys = self.config.heads(index) == self.config.kv_heads(index)
        return inputs if owns_keys else inputs[:1], output

    def mlp_paths(self, index: int) -> tuple[str, str]:
        """Return the paths of the first and the second matrix of a feed-forward network."""
        folder = _joined(self.layer(index), self.mlp)
        return f"{folder}/{self.first}", f"{folder}/{self.second}"

    def replaced(self, model: nn.Module, smaller: Any) -> nn.Module:
        """Return the model with another configuration of the stack."""
        if self.name:
            smaller = dataclasses.replace(model.config, **{self.name: smaller})
        return model.clone(config=smaller)


def stacks_of(model: nn.Module) -> dict[str, Stack]:
    """Return the stacks of a model by name; none where it is not a GLM or one of our encoders."""
    config = getattr(model, "config", None)
    if isinstance(config, GLMConfig):
        configs = {name: getattr(config, name) for name in (DECODER, *ENCODERS)}
    elif isinstance(config, VisionConfig | SpeechConfig | TextConfig):
        configs = {"": config}
    else:
        configs = {}
    return {name: _stack(name, part) for name, part in configs.items() if part is not None}


def stack_of(transform: str, model: nn.Module, part: str) -> Stack:
    """Return one stack of a model; an encoder on its own has a single one, whatever `part` says.

    Raises:
      RecipeError: the model has no such stack.
    """
    stacks = stacks_of(model)
    stack = stacks.get("", stacks.get(part))
    if stack is None:
        raise RecipeError(
            f"{transform}: {type(model).__name__} has no {part} to shrink; it has "
            f"{', '.join(stacks) or 'no decoder and no encoder of glm_edge'}"
        )
    return stack


def _stack(name: str, config: Any) -> Stack:
    if isinstance(config, DecoderConfig) or getattr(config, "gated_mlp", False):
        return Stack(name, config, "attention", "mlp", "gate_up_proj", "down_proj")
    if isinstance(config, VisionConfig):
        return Stack(name, config, "attention", "mlp", "fc1", "fc2")
    folder = "attention" if isinstance(config, SpeechConfig) else ""
    return Stack(name, config, folder, "", "fc1", "fc2")


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)
