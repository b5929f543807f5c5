"""Export to a `.tflite` file that holds our own integers and scales, bit for bit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.export.common.signatures import Signature, make_spec
from glm_edge.export.common.weights import Conversion
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.converter import skeleton
from glm_edge.export.tflite.flatbuffer import FlatModel
from glm_edge.export.tflite.weights import TFLiteWeights, to_tflite_weights
from glm_edge.export.verify.results import Verification
from glm_edge.export.verify.verify import Window, verify
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.writers import check_target


@dataclass(frozen=True)
class ExportedModel:
    """A written file, with its model and parameters.

    Attributes:
      path: the file.
      file_bytes: its size.
      stored_bytes: bytes of its parameters, packed, with their scales.
      signatures: names of its entry points.
      conversions: parameters that are stored in another form than in the model.
      model: the model it was traced from.
      params: the parameters as the file stores them.
    """

    path: Path
    file_bytes: int
    stored_bytes: int
    signatures: tuple[str, ...]
    conversions: tuple[Conversion, ...]
    model: MultimodalGLM = field(repr=False)
    params: Params = field(repr=False)

    def verify(
        self,
        windows: Iterable[Window] | None = None,
        threshold: float | None = None,
        compute: str | None = None,
        free_running: int = 8,
        seed: int = 0,
        check: bool = True,
        isolated: bool = True,
    ) -> Verification:
        """Compares the file, run in LiteRT, with the JAX model.

        See `glm_edge.export.verify` for the arguments.
        """
        return verify(
            self.path,
            self.model,
            self.params,
            windows,
            threshold=threshold,
            compute=compute,
            free_running=free_running,
            seed=seed,
            check=check,
            isolated=isolated,
        )


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
    as they are, once for all signatures. A parameter that LiteRT cannot run is
    refused; one that it runs only in another form is converted by a rule that the result lists.

        exported = ge.export.tflite(model, params, "phone.tflite")
        print(exported.verify())

    Args:
      model: the model; see `common.signatures.signatures` for the functions of the file.
      params: its parameters, see `tflite.weights.to_tflite_weights`.
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
    check_target(path, overwrite, None, boxes.stored_bytes(params))
    spec = make_spec(model, params, prefill_lengths, cache_slots, prefill_logits, attended_slots)
    weights = to_tflite_weights(params)
    fields = spec.description(sorted(spec.shapes), weights.conversions)
    return ExportedModel(
        path=path,
        file_bytes=write_signatures(spec.signatures, spec.shapes, weights, path, overwrite, fields),
        stored_bytes=weights.stored_bytes,
        signatures=spec.names,
        conversions=weights.conversions,
        model=model,
        params=weights.params,
    )


def write_signatures(
    signatures: Sequence[Signature],
    shapes: Mapping[str, tuple[int, ...]],
    weights: TFLiteWeights,
    path: Path,
    overwrite: bool = False,
    fields: Mapping[str, Any] | None = None,
) -> int:
    """Writes functions of a model as one `.tflite` file.

    Args:
      signatures: the functions.
      shapes: dense shapes of the parameters that they may read, by path.
      weights: the parameters.
      path: of the file.
      overwrite: replace a file that exists.
      fields: of the description that `glm_edge.export.read_metadata` finds.

    Returns:
      Bytes of the file.

    Raises:
      ExportError: the graph cannot be converted, or reads a weight in a way that LiteRT cannot.
      OutputError: the file exists already, or cannot be written.
    """
    content, arguments = skeleton(signatures, shapes)
    graph = FlatModel(content)
    graph.attach({name: (where, weights.constants[where]) for name, where in arguments.items()})
    graph.add_metadata(
        {
            "version": __version__,
            "signatures": [signature.name for signature in signatures],
            "parameters": sorted(shapes),
            "conversions": [str(conversion) for conversion in weights.conversions],
            "verified": False,
            **(fields or {}),
        }
    )
    graph.compact()
    return tflite_file.write(graph.model, path, overwrite)
