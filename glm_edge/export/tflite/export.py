"""Export to a `.tflite` file that holds our own integers and scales, bit for bit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.export.common.offer import offer
from glm_edge.export.common.signatures import Signature, skeleton
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.flatbuffer import FlatModel
from glm_edge.export.tflite.weights import Conversion, Held, constants_of
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params


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
        from glm_edge.export.verify.verify import verify

        return verify(self.path, self.model, self.params, windows, **options)


def tflite(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    prefill_logits: bool = False,
    attended_slots: Iterable[int] = (),
    overwrite: bool = False,
) -> ExportedModel:
    """Writes a model as a `.tflite` file with builtin operators only.

    The graph is converted without weights; the packed integers and scales are then attached to it
    as they are, once for all signatures. What LiteRT cannot run is refused; what it can only run in
    another form is converted by a rule that the result lists.

        exported = ge.export.tflite(model, params, "phone.tflite")
        print(exported.verify())

    Args:
      model: the model; see `common.signatures.signatures` for what the file offers.
      params: its parameters, see `tflite.weights.constants_of`.
      path: of the file.
      prefill_lengths: lengths of the prefill signatures.
      cache_slots: slots of the cache; None takes the model's context, at most 1024.
      prefill_logits: prefill scores every token, which takes time that generation does not need.
      attended_slots: numbers of slots, such as `(256, 512)`. For each the file gets signatures that
        look at no more slots than that, which is faster while few are filled.
      overwrite: replace a file that exists.

    Returns:
      The exported model.

    Raises:
      ExportError: a parameter or the model cannot be written; the message says what would be right.
      OutputError: the file exists already, or cannot be written.
      MissingExtraError: TensorFlow or LiteRT is not installed.
    """
    path = Path(path)
    tflite_file.check_target(path, overwrite, boxes.stored_bytes(params))
    offered = offer(model, params, prefill_lengths, cache_slots, prefill_logits, attended_slots)
    held = constants_of(params)
    fields = offered.description(sorted(offered.shapes), held.conversions)
    return ExportedModel(
        path=path,
        file_bytes=write_signatures(
            offered.signatures, offered.shapes, held, path, overwrite, fields
        ),
        stored_bytes=held.stored_bytes,
        signatures=offered.names,
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
            "version": __version__,
            "signatures": [signature.name for signature in offered],
            "parameters": sorted(shapes),
            "conversions": [str(conversion) for conversion in held.conversions],
            "verified": False,
            **(fields or {}),
        }
    )
    graph.compact()
    return tflite_file.write(graph.model, path, overwrite)
