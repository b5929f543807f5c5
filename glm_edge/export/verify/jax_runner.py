"""Runner of the functions that an exported file was traced from."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from glm_edge.export.common.signatures import signatures
from glm_edge.export.verify.runner import SignatureRunner, check_signature
from glm_edge.models.multimodal import MultimodalGLM


class JaxRunner(SignatureRunner):
    """The functions that an exported file was traced from, run in JAX on boxed parameters.

    Args:
      model: the model; its `compute` selects how products with quantized weights round activations.
      params: parameters with the values that the file stores.
      prefill_lengths: token counts of the file's prefill signatures.
      cache_slots: number of cache slots of the file.
      prefill_logits: whether prefill returns logits of every token, as in the file.
      forced_lengths: token counts of the file's signatures with logits of their last token.
    """

    def __init__(
        self,
        model: MultimodalGLM,
        params: Any,
        prefill_lengths: Iterable[int],
        cache_slots: int,
        prefill_logits: bool = True,
        forced_lengths: Iterable[int] = (),
    ):
        super().__init__(
            model.config,
            prefill_lengths,
            cache_slots,
            prefill_logits,
            forced_lengths=forced_lengths,
        )
        self._params = params
        lengths = tuple(self.prefill_lengths), tuple(self.forced_lengths)
        self._functions = _compiled(model, *lengths, cache_slots, prefill_logits)

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run one signature on arrays that match its shapes exactly."""
        check_signature(self.config.name, signature, self._functions)
        outputs = self._functions[signature](self._params, inputs)
        return {name: np.array(value) for name, value in outputs.items()}


@functools.lru_cache(maxsize=4)
def _compiled(
    model: MultimodalGLM,
    prefill_lengths: tuple[int, ...],
    forced_lengths: tuple[int, ...],
    cache_slots: int,
    prefill_logits: bool,
) -> dict[str, Any]:
    """Compile the functions of a model once for comparisons with any number of its files."""
    entries = signatures(
        model, prefill_lengths, cache_slots, prefill_logits, forced_lengths=forced_lengths
    )
    return {entry.name: jax.jit(entry.function) for entry in entries}
