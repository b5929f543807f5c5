"""What every format writes: a checked model, and the functions that the file offers."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import GLMConfig, to_dict
from glm_edge.errors import ExportError
from glm_edge.export.constants import Conversion
from glm_edge.export.trace import Signature, signatures
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params

DEFAULT_SLOTS = 1024


@dataclass(frozen=True)
class Offer:
    """The functions of a model that a file holds.

    Attributes:
      config: of the model.
      shapes: dense shapes of its parameters, by path.
      prefill_lengths: lengths of the prefill signatures, rising.
      cache_slots: slots of the cache.
      prefill_logits: prefill scores every token.
      attended_slots: numbers of slots for which there are faster signatures, rising.
      signatures: the functions.
    """

    config: GLMConfig
    shapes: dict[str, tuple[int, ...]]
    prefill_lengths: list[int]
    cache_slots: int
    prefill_logits: bool
    attended_slots: list[int]
    signatures: list[Signature]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the signatures."""
        return tuple(signature.name for signature in self.signatures)

    def description(self, parameters: Any, conversions: Iterable[Conversion]) -> dict[str, Any]:
        """What a file says about itself, JSON-ready; nothing has verified it yet."""
        return {
            "version": __version__,
            "config": to_dict(self.config),
            "signatures": list(self.names),
            "prefill_lengths": self.prefill_lengths,
            "prefill_logits": self.prefill_logits,
            "cache_slots": self.cache_slots,
            "attended_slots": self.attended_slots,
            "parameters": parameters,
            "conversions": [str(conversion) for conversion in conversions],
            "verified": False,
        }


def offer(
    model: MultimodalGLM,
    params: Params,
    prefill_lengths: Iterable[int],
    cache_slots: int | None,
    prefill_logits: bool,
    attended_slots: Iterable[int] = (),
) -> Offer:
    """Checks a model and lists what its file offers; see `glm_edge.export.trace.signatures`.

    Raises:
      ExportError: it is no `MultimodalGLM`, the parameters are those of another model, or a length
        does not fit its context.
    """
    shapes = check_model(model, params)
    lengths, slots = check_lengths(model.config, prefill_lengths, cache_slots)
    attended = sorted(set(attended_slots))
    if attended and not 2 <= attended[0] <= attended[-1] < slots:
        raise ExportError(f"attended_slots: {attended} must be 2 to {slots - 1}, fewer than all")
    float32 = model.clone(compute="float32")
    offered = signatures(float32, lengths, slots, prefill_logits, attended)
    return Offer(model.config, shapes, lengths, slots, prefill_logits, attended, offered)


def check_model(model: Any, params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by path.

    Raises:
      ExportError: it is no `MultimodalGLM`, or the parameters are those of another model.
    """
    if not isinstance(getattr(model, "config", None), GLMConfig):
        raise ExportError(f"{type(model).__name__}: only a MultimodalGLM can be exported")
    expected = expected_shapes(model)
    found = {name: tuple(leaf.shape) for name, leaf in boxes.path_items(params)}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ExportError(
                f"{name}: shape {found.get(name, 'missing')} in the parameters, "
                f"{expected.get(name, 'no place')} in the model"
            )
    return expected


def check_lengths(
    config: GLMConfig, prefill_lengths: Iterable[int], cache_slots: int | None
) -> tuple[list[int], int]:
    """Lengths of prefill in rising order, and slots of the cache.

    Raises:
      ExportError: one does not fit the model's context.
    """
    lengths = sorted(set(prefill_lengths))
    context = config.decoder.max_position_embeddings
    slots = min(context, DEFAULT_SLOTS) if cache_slots is None else cache_slots
    if not 1 <= slots <= context:
        raise ExportError(f"cache_slots={slots}: must be 1 to {context}, the model's context")
    for length in lengths:
        if not 2 <= length <= slots:
            raise ExportError(f"prefill_lengths: {length} must be 2 to {slots}, the cache's slots")
    return lengths, slots
