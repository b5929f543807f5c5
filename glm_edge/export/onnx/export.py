"""Export to ONNX: quantized codes read through `DequantizeLinear`, weights beside the graphs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glm_edge import params as boxes
from glm_edge.errors import require
from glm_edge.export.common.directory import (
    DESCRIPTION,
    WEIGHTS,
    directory_bytes,
    write_description,
)
from glm_edge.export.common.signatures import make_spec
from glm_edge.export.common.weights import ONNX, stored_bytes, to_params, to_weight
from glm_edge.export.onnx.model import graph_of, model_of, store
from glm_edge.export.verify.package import Package
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params
from glm_edge.writers import check_target, new_directory, require_space


def onnx(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    prefill_logits: bool = False,
    attended_slots: Iterable[int] = (),
    overwrite: bool = False,
    forced_lengths: Iterable[int] = (),
) -> Package:
    """Write a model as ONNX graphs of opset 21 that read quantized codes unchanged.

    The directory contains one graph per signature (such as `decode.onnx`, see
    `common.signatures.signatures`), one file of weights for all graphs, and a description.
    Additional graphs therefore add few bytes, and the limit of 2 GB per graph does not apply to
    weights. A cache output has the name of its input with `_out` appended.

    Integers of 8 and 4 bits are stored unchanged, with float32 scales and integer zero points, one
    per matrix, row or group. Each product reads them through a `DequantizeLinear`. Narrower
    integers are written in the next wider type. Matrices are stored [in, out], the layout of
    `MatMul`, because onnxruntime fuses both operators into one kernel only then. An 8-bit embedding
    with one scale per row is dequantized after the lookup. Others are dequantized before it, as
    `Gather` does not take int4.

    Args:
      model: the model.
      params: its parameters: arrays, `Masked` (written dense, with zeros) or `Quantized`.
      path: path of the directory.
      prefill_lengths: token counts of the prefill graphs.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.
      prefill_logits: whether prefill returns logits of every token. Generation does not need them,
        and they take time.
      attended_slots: slot counts, such as `(256, 512)`. The directory gets additional graphs that
        attend to only that many slots, which is faster for short contexts.
      overwrite: whether to replace an existing exported directory.
      forced_lengths: token counts, such as `(4, 8)`, of graphs with logits of their last token, for
        runs of tokens that a grammar forces; see `ge.export.tflite`.

    Returns:
      The written directory.

    Raises:
      ExportError: a parameter or the model cannot be written; the message names a supported
        alternative.
      OutputError: the directory already exists or cannot be written, or its disk is too full.
      MissingExtraError: onnx is not installed.

    References:
      DequantizeLinear, https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html.
    """
    path, library = Path(path), require("onnx", extra="onnx")
    check_target(path, overwrite, DESCRIPTION, strict=True)
    sizes = prefill_lengths, cache_slots, prefill_logits, attended_slots, forced_lengths
    spec = make_spec(model, params, *sizes)
    require_space(path, sum(stored_bytes(leaf, ONNX) for _, leaf in boxes.path_items(params)))
    with new_directory(path, overwrite, mark=DESCRIPTION) as directory:
        weights, stored, parameters, conversions = {}, {}, {}, []
        with open(directory / WEIGHTS, "xb") as file:
            for name, leaf in boxes.path_items(params):
                weight, changes = to_weight(name, leaf, ONNX)
                turned = is_product(name, leaf, params)
                stored[name] = store(library, file, name, weight, turned)
                weights[name] = weight
                parameters[name] = (turned, weight.group_size)
                conversions += changes
        for signature in spec.signatures:
            graph = graph_of(signature, spec.shapes, stored)
            target = directory / f"{signature.name}.onnx"
            target.write_bytes(model_of(library, graph).SerializeToString())
            library.checker.check_model(str(target))
        description = spec.description(parameters, conversions)
        write_description(directory, description)
    stored_params = to_params(params, weights)
    return Package(
        path, directory_bytes(path), spec.names, tuple(conversions), model, stored_params
    )


def is_product(path: str, leaf: Any, params: Params) -> bool:
    """Return True for a matrix that is used in a product, not only in a lookup or a sum.

    Args:
      path: path of the parameter.
      leaf: an array or a box.
      params: parameters of the model.

    Returns:
      False for embeddings without a tied head, norms and biases.
    """
    return boxes.is_matrix(path, leaf) and not (path == "embed/weight" and "head" in params)
