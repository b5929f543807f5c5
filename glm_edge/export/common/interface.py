"""Inputs and outputs of the signatures of an exported model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm_edge.configs import GLMConfig
from glm_edge.export.common.signatures import signatures
from glm_edge.export.common.sizes import logit_rows
from glm_edge.models.multimodal import MultimodalGLM

CACHE = "kv_cache_"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph.

    Attributes:
      name: name in the file; glm_edge names weights by their parameter path.
      type: type, such as `float32` or `int4`.
      shape: extents; -1 for an extent that is known only at run time.
      constant: True when the file stores its values.
      quantization: granularity of the scales: `""` (none), `tensor`, `channel`, or `blocks of 32`.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    constant: bool = False
    quantization: str = ""

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements; 0 if an extent is unknown."""
        return 0 if -1 in self.shape else math.prod(self.shape)

    def fits(self, array: Any) -> bool:
        """Return True if an array, or a struct of shape and dtype, match this tensor.

        Args:
          array: array, or struct of shape and dtype.

        Returns:
          True if shape and type match; an unknown extent matches any.
        """
        return (
            np.dtype(array.dtype).name == self.type
            and len(array.shape) == self.rank
            and all(e in (-1, n) for e, n in zip(self.shape, array.shape, strict=True))
        )

    def __str__(self) -> str:
        suffix = {"": "", "tensor": "", "channel": "/channel"}
        return self.type + suffix.get(self.quantization, f"/{self.quantization}")


def expected_tensors(
    config: GLMConfig,
    prefill_lengths: Iterable[int],
    cache_slots: int,
    prefill_logits: bool,
    attended_slots: Iterable[int] = (),
    forced_lengths: Iterable[int] = (),
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """List the inputs and outputs of an exported model's signatures; see `signatures`.

    Args:
      config: configuration of the model.
      prefill_lengths: token counts of the prefill signatures.
      cache_slots: number of cache slots.
      prefill_logits: whether prefill returns logits of every token.
      attended_slots: slot counts of the signatures that attend to fewer slots.
      forced_lengths: token counts of the signatures with logits of their last token.

    Returns:
      Name of a signature to `(inputs, outputs)`, by name.
    """
    tensors, lengths, forced = {}, list(prefill_lengths), list(forced_lengths)
    model = MultimodalGLM(config)
    for signature in signatures(
        model, lengths, cache_slots, prefill_logits, attended_slots, forced
    ):
        inputs = {
            name: Tensor("", struct.dtype.name, tuple(struct.shape))
            for name, struct in signature.inputs.items()
        }
        rows = 0
        if "input_pos" in inputs:
            (length,) = inputs["input_pos"].shape
            rows = logit_rows(length, lengths, prefill_logits, forced)
        tensors[signature.name] = inputs, _outputs(signature.name, inputs, config, rows)
    return tensors


def _outputs(
    name: str, inputs: dict[str, Tensor], config: GLMConfig, rows: int
) -> dict[str, Tensor]:
    width = config.decoder.hidden_size
    if name == "vision":
        return {"features": Tensor("", "float32", (1, config.vision_tower.num_tokens, width))}
    if name == "speech":
        return {"features": Tensor("", "float32", (1, config.speech_encoder.num_tokens, width))}
    if "tokens" in inputs:
        return {"embeddings": Tensor("", "float32", (*inputs["tokens"].shape, width))}
    outputs = {name: tensor for name, tensor in inputs.items() if name.startswith(CACHE)}
    if rows:
        outputs["logits"] = Tensor("", "float32", (1, rows, config.decoder.vocab_size))
    return outputs
