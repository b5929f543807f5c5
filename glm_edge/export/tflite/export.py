"""Export to a `.tflite` file that stores codes and scales bit for bit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.export.common.signatures import Signature, make_spec
from glm_edge.export.common.weights import Conversion
from glm_edge.export.tflite import file as tflite_file
from glm_edge.export.tflite.converter import shared_skeleton, tensorflow
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
      path: path of the file.
      file_bytes: size of the file.
      stored_bytes: bytes of its packed parameters, including scales.
      signatures: names of its signatures.
      conversions: parameters that are stored in a different form than in the model.
      model: model that was traced.
      params: parameters with the values that the file stores.
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
        """Run the file in LiteRT and compare it with the JAX model.

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
    forced_lengths: Iterable[int] | None = None,
) -> ExportedModel:
    """Write a model as a `.tflite` file with builtin operators only.

    The graph is converted without weights. The packed codes and scales are then attached unchanged,
    once for all signatures. A parameter that LiteRT cannot run raises ExportError. A parameter that
    LiteRT runs only in a different form is converted, and the result lists the conversion.

        exported = ge.export.tflite(model, params, "phone.tflite")
        print(exported.verify())

    Args:
      model: the model; see `common.signatures.signatures` for the functions of the file.
      params: its parameters; see `tflite.weights.to_tflite_weights`.
      path: path of the file.
      prefill_lengths: token counts of the prefill signatures.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.
      prefill_logits: whether prefill returns logits of every token. Generation does not need them,
        and they take time.
      attended_slots: slot counts, such as `(256, 512)`. The file gets additional signatures that
        attend to only that many slots, which is faster for short contexts.
      overwrite: whether to replace an existing file.
      forced_lengths: token counts of short prefill signatures that return logits of their last
        token only. The runner feeds a free token and the run that a grammar forces behind it
        through one of them. None takes 4 and 8, as far as they fit the cache; `()` saves their
        graphs, and the runner then feeds token by token. They share the weights on disk, but the
        runtime packs the weights anew for each signature that runs.

    Returns:
      The exported model.

    Raises:
      ExportError: a parameter or the model cannot be written; the message names a supported
        alternative.
      OutputError: the file already exists or cannot be written.
      MissingExtraError: TensorFlow or LiteRT is not installed.
    """
    path = Path(path)
    check_target(path, overwrite, None, boxes.stored_bytes(params))
    sizes = prefill_lengths, cache_slots, prefill_logits, attended_slots, forced_lengths
    spec = make_spec(model, params, *sizes)
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
    """Write functions of a model as one `.tflite` file.

    Args:
      signatures: signatures of the file.
      shapes: dense shapes of the parameters that they may read by path.
      weights: weights in the terms of TFLite.
      path: path of the file.
      overwrite: whether to replace an existing file.
      fields: fields of the description that `glm_edge.export.read_metadata` returns.

    Returns:
      The size of the file in bytes.

    Raises:
      ExportError: the graph cannot be converted, or reads a weight in a way that LiteRT does not
        support.
      OutputError: the file already exists or cannot be written.
    """
    tensorflow()  # A graph that is kept raises no error if the extra is missing.
    content, arguments = shared_skeleton(tuple(signatures), tuple(shapes.items()))
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
