"""What every format writes: a checked model, and the functions that the file offers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import GLMConfig, to_dict
from glm_edge.errors import ExportError
from glm_edge.export.common.signatures import Signature, signatures
from glm_edge.export.tflite.weights import Conversion
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

    def read_bytes(self, sizes: Mapping[str, int]) -> list[int]:
        """Of each signature, the bytes of all parameters that it may read, given those of each."""
        return [
            sum(size for path, size in sizes.items() if path.split("/")[0] in signature.subtrees)
            for signature in self.signatures
        ]

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
    """Checks a model and lists what its file offers; see `common.signatures.signatures`.

    Raises:
      ExportError: it is no `MultimodalGLM`, the parameters are those of another model, or a length
        is not fixed or does not fit its context.
    """
    shapes = check_model(model, params)
    lengths, slots = check_lengths(model.config, prefill_lengths, cache_slots)
    attended = check_attended(attended_slots, slots)
    float32 = model.clone(compute="float32")
    offered = signatures(float32, lengths, slots, prefill_logits, attended)
    return Offer(model.config, shapes, lengths, slots, prefill_logits, attended, offered)


def check_model(model: Any, params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by path.

    Raises:
      ExportError: it is no `MultimodalGLM`, or the parameters are those of another model.
    """
    if not isinstance(getattr(model, "config", None), GLMConfig):
        raise ExportError(
            f"{type(model).__name__}: only a MultimodalGLM can be exported in this format; right "
            "would be ge.export.function, which writes any traceable function as a .tflite file"
        )
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
      ExportError: one is not fixed, or does not fit the model's context.
    """
    lengths = fixed_lengths("prefill_lengths", prefill_lengths)
    context = config.decoder.max_position_embeddings
    slots = min(context, DEFAULT_SLOTS)
    if cache_slots is not None:
        (slots,) = check_fixed("cache_slots", [cache_slots])
    if not 1 <= slots <= context:
        raise ExportError(f"cache_slots={slots}: must be 1 to {context}, the model's context")
    for length in lengths:
        if not 2 <= length <= slots:
            raise ExportError(f"prefill_lengths: {length} must be 2 to {slots}, the cache's slots")
    return lengths, slots


def check_attended(attended_slots: Iterable[int], cache_slots: int) -> list[int]:
    """Numbers of slots that signatures look at, in rising order.

    Raises:
      ExportError: one is not fixed, or is not below the cache's slots.
    """
    attended = fixed_lengths("attended_slots", attended_slots)
    if attended and not 2 <= attended[0] <= attended[-1] < cache_slots:
        shown = f"{attended[:8]}"
        raise ExportError(f"attended_slots: {shown} must be 2 to {cache_slots - 1}, fewer than all")
    return attended


@dataclass(frozen=True)
class Sizes:
    """The sizes that a file says its signatures have.

    Attributes:
      prefill_lengths: lengths of the prefill signatures, rising.
      cache_slots: slots of the cache.
      prefill_logits: prefill scores every token.
      attended_slots: numbers of slots for which there are faster signatures, rising.
    """

    prefill_lengths: list[int]
    cache_slots: int
    prefill_logits: bool
    attended_slots: list[int]


def described_sizes(description: Mapping[str, Any], config: GLMConfig) -> Sizes:
    """Reads the sizes from a description, which a stranger may have written.

    Args:
      description: of a file or directory.
      config: of the model, as the description says.

    Returns:
      The sizes, which an export of that model could have.

    Raises:
      ExportError: a size is missing, of another type, or could not be one of an export.
    """
    names = ("prefill_lengths", "cache_slots", "prefill_logits", "attended_slots")
    # Core ML packages have no faster signatures, and older ones do not say so.
    given = {"attended_slots": [], **description}
    missing = [name for name in names if name not in given]
    if missing:
        raise ExportError(f"{missing[0]} is missing")
    for name in ("prefill_lengths", "attended_slots"):
        if not isinstance(given[name], list):
            raise ExportError(f"{name}: must be a list, found {type(given[name]).__name__}")
    if not isinstance(given["prefill_logits"], bool):
        raise ExportError(f"prefill_logits: must be true or false: {given['prefill_logits']!r}")
    if given["cache_slots"] is None:
        raise ExportError("cache_slots: None is no fixed length")
    lengths, slots = check_lengths(config, given["prefill_lengths"], given["cache_slots"])
    attended = check_attended(given["attended_slots"], slots)
    for name, sizes in (("prefill_lengths", lengths), ("attended_slots", attended)):
        if sizes != given[name]:
            raise ExportError(f"{name}: {given[name][:8]} must rise, each number once")
    return Sizes(lengths, slots, given["prefill_logits"], attended)


def fixed_lengths(name: str, lengths: Iterable[int]) -> list[int]:
    """Lengths in rising order, each once.

    Raises:
      ExportError: one is not fixed.
    """
    return sorted(set(check_fixed(name, lengths)))


def check_fixed(name: str, lengths: Iterable[int]) -> list[int]:
    """Lengths as they are, of which a graph has one each.

    Raises:
      ExportError: one is no whole number of at least 1, but None, a symbol or -1.
    """
    given = list(lengths) if isinstance(lengths, Iterable) else [lengths]
    for length in given:
        if not isinstance(length, Integral) or isinstance(length, bool) or length < 1:
            raise ExportError(
                f"{name}: {length!r} is no fixed length; right would be a whole number of at least "
                "1, as every graph has one shape"
            )
    return [int(length) for length in given]
