"""Export to a `.tflite` file that holds our own integers and scales, bit for bit."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from glm_edge import __version__
from glm_edge import params as boxes
from glm_edge.checkpoint.shapes import expected_shapes
from glm_edge.configs import GLMConfig, to_dict
from glm_edge.errors import ExportError
from glm_edge.export import container
from glm_edge.export.flatbuffer import Constant, FlatModel
from glm_edge.export.trace import signatures, skeleton
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Masked, Quantized
from glm_edge.params.tree import Params, nested

BLOCK_MULTIPLE = 32
DEFAULT_SLOTS = 1024


@dataclass(frozen=True)
class Conversion:
    """A parameter that the file holds in another form than the tree.

    Attributes:
      path: of the parameter.
      rule: what was done.
      changes_values: False when the dense weight is the same.
    """

    path: str
    rule: str
    changes_values: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}"


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
    overwrite: bool = False,
) -> ExportedModel:
    """Writes a model as a `.tflite` file with builtin operators only.

    The graph is converted without weights; the packed integers and scales are then attached to it
    as they are, once for all signatures. What LiteRT cannot run is refused; what it can only run in
    another form is converted by a rule that the result lists.

    Args:
      model: the model; see `glm_edge.export.trace.signatures` for what the file offers.
      params: its parameters: arrays; `Masked` (written dense, with zeros); `Quantized` symmetric,
        at 8 or 4 bits per channel, or at 4 bits in groups of a multiple of 32.
      path: of the file.
      prefill_lengths: lengths of the prefill signatures.
      cache_slots: slots of the cache; None takes the model's context, at most 1024.
      overwrite: replace a file that exists.

    Returns:
      The exported model.

    Raises:
      ExportError: a parameter or the model cannot be written; the message says what would be right.
      OutputError: the file exists already, or cannot be written.
      MissingExtraError: TensorFlow or LiteRT is not installed.
    """
    path = Path(path)
    container.check_target(path, overwrite)
    shapes = _check_model(model, params)
    lengths, cache_slots = _check_lengths(model.config, prefill_lengths, cache_slots)

    constants, written, conversions = {}, {}, []
    for name, leaf in boxes.path_items(params):
        constants[name], written[name], conversion = _constant(name, leaf)
        conversions += [] if conversion is None else [conversion]

    offered = signatures(model.clone(compute="float32"), lengths, cache_slots)
    content, arguments = skeleton(offered, shapes)
    graph = FlatModel(content)
    graph.attach({name: (where, constants[where]) for name, where in arguments.items()})
    graph.add_metadata(
        {
            "version": __version__,
            "config": to_dict(model.config),
            "signatures": [signature.name for signature in offered],
            "prefill_lengths": lengths,
            "cache_slots": cache_slots,
            "parameters": sorted(constants),
            "conversions": [str(conversion) for conversion in conversions],
            "verified": False,
        }
    )
    graph.compact()
    file_bytes = container.write(graph.model, path, overwrite)
    return ExportedModel(
        path=path,
        file_bytes=file_bytes,
        stored_bytes=sum(_stored_bytes(constant) for constant in constants.values()),
        signatures=tuple(signature.name for signature in offered),
        conversions=tuple(conversions),
        model=model,
        params=nested(written),
    )


def _check_model(model: Any, params: Params) -> dict[str, tuple[int, ...]]:
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


def _check_lengths(
    config: GLMConfig, prefill_lengths: Iterable[int], cache_slots: int | None
) -> tuple[list[int], int]:
    lengths = sorted(set(prefill_lengths))
    context = config.decoder.max_position_embeddings
    slots = min(context, DEFAULT_SLOTS) if cache_slots is None else cache_slots
    if not 1 <= slots <= context:
        raise ExportError(f"cache_slots={slots}: must be 1 to {context}, the model's context")
    for length in lengths:
        if not 2 <= length <= slots:
            raise ExportError(f"prefill_lengths: {length} must be 2 to {slots}, the cache's slots")
    return lengths, slots


def _constant(path: str, leaf: Any) -> tuple[Constant, Any, Conversion | None]:
    """What the file holds of a parameter, the same as a leaf, and the rule where they differ."""
    if isinstance(leaf, Quantized):
        return _quantized_constant(path, leaf)
    conversion = None
    if isinstance(leaf, Masked):
        leaf = boxes.dense(leaf)
        conversion = Conversion(path, "mask written as zeros of a dense float32 weight", False)
    elif boxes.is_box(leaf):
        raise ExportError(f"{path}: a {type(leaf).__name__} is for training; finalize it first")
    values = np.ascontiguousarray(np.asarray(leaf, np.float32))
    _check_finite(path, values)
    if jnp.dtype(leaf.dtype) != jnp.float32:
        exact = jnp.dtype(leaf.dtype).itemsize < 4
        conversion = Conversion(path, f"{leaf.dtype} written as float32", not exact)
    constant = Constant("float32", values.shape, values.reshape(-1).view(np.uint8))
    return constant, jnp.asarray(values), conversion


def _quantized_constant(path: str, box: Quantized) -> tuple[Constant, Quantized, Conversion | None]:
    _refuse_unfit(path, box)
    data = np.ascontiguousarray(np.asarray(box.data)).reshape(-1).view(np.uint8)
    scale, conversion = np.asarray(box.scale), None
    _check_finite(path, scale)
    kind = box.format.qtype
    if scale.shape[-1] == 1:
        written = scale.astype(np.float32)
        return Constant(kind, box.shape, data, written.reshape(-1)), box, None
    held = scale.astype(ml_dtypes.bfloat16).astype(np.float16)
    if not np.array_equal(held.astype(np.float32), scale.astype(np.float32)):
        rule = f"scales rounded from {scale.dtype} to bfloat16, which XNNPACK multiplies with"
        conversion = Conversion(path, rule, True)
        # Through float16 too, whose subnormals are coarser than bfloat16.
        rounded = held.astype(np.float32).astype(ml_dtypes.bfloat16)
        box = box.replace(scale=jnp.asarray(rounded.astype(scale.dtype)))
    return Constant(kind, box.shape, data, held, box.format.group_size), box, conversion


def _refuse_unfit(path: str, box: Quantized) -> None:
    form, right = box.format, "int8 or int4 per channel, or int4 in groups of 32"
    reason = None
    if box.kernel_shape or box.data.ndim != 2:
        reason, right = "it is stored [in, out] or stacked", "a matrix [out, in] of one layer"
    elif not form.symmetric:
        reason, right = "LiteRT multiplies with weights that have no zero point", "symmetric=True"
    elif form.qtype not in ("int8", "int4"):
        reason = "LiteRT's converter here writes int8 and int4"
    elif form.group_size == "tensor":
        reason = "a scale for the whole matrix is none for each row"
    elif form.qtype == "int4" and box.columns % 2:
        reason = f"XNNPACK needs an even number of columns at 4 bits, here {box.columns}"
        right = "int8 per channel"
    elif box.scale.shape[-1] > 1 and form.qtype != "int4":
        reason = f"XNNPACK has no kernel for {form.qtype} in groups"
    elif box.scale.shape[-1] > 1 and form.group_size % BLOCK_MULTIPLE:
        reason = f"XNNPACK needs groups of a multiple of {BLOCK_MULTIPLE}"
    if reason is not None:
        raise ExportError(f"{path}: {form} cannot be written: {reason}; right would be {right}")


def _check_finite(path: str, values: np.ndarray) -> None:
    if not np.isfinite(values.astype(np.float32)).all():
        raise ExportError(f"{path}: holds NaN or infinity; export finite weights")


def _stored_bytes(constant: Constant) -> int:
    return constant.data.nbytes + (0 if constant.scale is None else constant.scale.nbytes)
