"""Export to a `.tflite` file that holds our own integers and scales, bit for bit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import GLMConfig, to_dict
from glm_edge.errors import ExportError
from glm_edge.export import container
from glm_edge.export.constants import Conversion, Held, constants_of
from glm_edge.export.flatbuffer import FlatModel
from glm_edge.export.trace import Signature, signatures, skeleton
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params

DEFAULT_SLOTS = 1024


@dataclass(frozen=True)
class ExportedModel:
    """A written file and what it was made of.

    Attributes:
      path: the file.
      file_bytes: its size.
      stored_bytes: bytes of the parameters that it holds, packed, with their scales.
      signatures: names of its entry points.
      conversions: parameters held in another form than they were given.
      model: the model it was traced from.
      params: the parameters as the file holds them.
    """

    path: Path
    file_bytes: int
    stored_bytes: int
    signatures: tuple[str, ...]
    conversions: tuple[Conversion, ...]
    model: MultimodalGLM = field(repr=False)
    params: Params = field(repr=False)

    def verify(self, windows: Any = None, **options: Any) -> Any:
        """Runs the file against the JAX model of the same integers; see `verify.verify`."""
        from glm_edge.export.verify import verify

        return verify(self.path, self.model, self.params, windows, **options)


def tflite(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    prefill_logits: bool = False,
    overwrite: bool = False,
) -> ExportedModel:
    """Writes a model as a `.tflite` file with builtin operators only.

    The graph is converted without weights; the packed integers and scales are then attached to it
    as they are, once for all signatures. What LiteRT cannot run is refused; what it can only run in
    another form is converted by a rule that the result lists.

    Args:
      model: the model; see `glm_edge.export.trace.signatures` for what the file offers.
      params: its parameters, see `glm_edge.export.constants.constants_of`.
      path: of the file.
      prefill_lengths: lengths of the prefill signatures.
      cache_slots: slots of the cache; None takes the model's context, at most 1024.
      prefill_logits: prefill scores every token, which takes time that generation does not need.
      overwrite: replace a file that exists.

    Returns:
      The exported model.

    Raises:
      ExportError: a parameter or the model cannot be written; the message says what would be right.
      OutputError: the file exists already, or cannot be written.
      MissingExtraError: TensorFlow or LiteRT is not installed.
    """
    path = Path(path)
    container.check_target(path, overwrite, boxes.stored_bytes(params))
    shapes = check_model(model, params)
    lengths, cache_slots = check_lengths(model.config, prefill_lengths, cache_slots)

    held = constants_of(params)
    offered = signatures(model.clone(compute="float32"), lengths, cache_slots, prefill_logits)
    fields = {
        "config": to_dict(model.config),
        "prefill_lengths": lengths,
        "prefill_logits": prefill_logits,
        "cache_slots": cache_slots,
    }
    return ExportedModel(
        path=path,
        file_bytes=write_signatures(offered, shapes, held, path, overwrite, fields),
        stored_bytes=held.stored_bytes,
        signatures=tuple(signature.name for signature in offered),
        conversions=held.conversions,
        model=model,
        params=held.params,
    )


def write_signatures(
    offered: Sequence[Signature],
    shapes: Mapping[str, tuple[int, ...]],
    held: Held,
    path: Path,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> int:
    """Writes functions of a model as one `.tflite` file.

    Args:
      offered: the functions.
      shapes: dense shapes of the parameters that they may read, by path.
      held: the parameters.
      path: of the file.
      overwrite: replace a file that exists.
      fields: of the description that `glm_edge.export.read_metadata` finds.

    Returns:
      Bytes of the file.

    Raises:
      ExportError: the graph cannot be converted, or reads a weight in a way that LiteRT cannot.
      OutputError: the file exists already, or cannot be written.
    """
    content, arguments = skeleton(offered, shapes)
    graph = FlatModel(content)
    graph.attach({name: (where, held.constants[where]) for name, where in arguments.items()})
    graph.add_metadata(
        {
            **(fields or {}),
            "version": __version__,
            "signatures": [signature.name for signature in offered],
            "parameters": sorted(shapes),
            "conversions": [str(conversion) for conversion in held.conversions],
            "verified": False,
        }
    )
    graph.compact()
    return container.write(graph.model, path, overwrite)


def check_model(model: Any, params: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a model by path.

    Raises:
      ExportError: it is no `MultimodalGLM`, or the parameters are those of another model.
    """
    if not isinstance(getattr(model, "config", None), GLMConfig):
        raise ExportError(f"{type(model).__name__}: only a MultimodalGLM can be exported to TFLite")
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
