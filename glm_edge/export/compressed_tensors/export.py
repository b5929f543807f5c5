"""Export to Hugging Face directories of compressed-tensors, which vLLM and SGLang serve."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.checkpoint import load
from glm_edge.checkpoint.companions import read_companions
from glm_edge.checkpoint.hugging_face.member import FamilyMember, TensorMapping
from glm_edge.checkpoint.hugging_face.quantized.compressed_tensors import (
    ACTIVATIONS_PER_TOKEN,
    METHOD,
    PACKED,
    UNPACKED,
    Scheme,
    tensors_of,
)
from glm_edge.checkpoint.hugging_face.quantized.config import FIELD, WEIGHT
from glm_edge.checkpoint.hugging_face.quantized.matrix import Codes
from glm_edge.checkpoint.hugging_face.tying import HEAD, untie
from glm_edge.checkpoint.hugging_face.writing import SHARD_BYTES, describe, write_tensors
from glm_edge.errors import ExportError
from glm_edge.export.common.directory import directory_bytes
from glm_edge.export.common.signatures import check_model
from glm_edge.export.common.weights import (
    COMPRESSED_TENSORS,
    NO_STATIC_RANGES,
    Conversion,
    box_conversions,
    check_box,
    check_finite,
    to_array,
)
from glm_edge.files import CONFIG
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Quantized
from glm_edge.params.formats import PER_TENSOR, Format
from glm_edge.params.tree import Params, map_with_path
from glm_edge.writers import check_target, new_directory

Activations = Literal["float", "int8_dynamic"]
BITS = {"int8": 8, "int4": 4}
# Modules of one layer that engines load as one matrix.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class WeightInspection:
    """Counts of a directory's parameters that equal the model's; no engine ran the directory.

    Attributes:
      quantized: parameters with the model's codes, scales and zero points.
      dense: parameters with the model's values.
    """

    quantized: int
    dense: int

    def __str__(self) -> str:
        return (
            f"{self.quantized} quantized and {self.dense} dense weights equal the model's, bit for "
            "bit; no engine ran the directory"
        )


@dataclass(frozen=True)
class CompressedTensorsDirectory:
    """A written directory.

    Attributes:
      path: path of the directory.
      file_bytes: total bytes of its files.
      conversions: parameters that are stored in a different form than in the model.
      model: the model.
      params: parameters with the values that the directory stores.
    """

    path: Path
    file_bytes: int
    conversions: tuple[Conversion, ...]
    model: MultimodalGLM = field(repr=False)
    params: Params = field(repr=False)

    def verify(self, **options: Any) -> WeightInspection:
        """Read the directory with `ge.load`, and compare all parameters with the model's.

        Returns:
          Counts of the parameters.

        Raises:
          ExportError: a parameter differs; or an option is set, although no engine runs.
          CheckpointError: the directory is damaged.
        """
        if options:
            raise ExportError(f"{self.path}: is not run, so verify takes no options; call verify()")
        stored = dict(boxes.path_items(load(self.path)[1]))
        expected = dict(boxes.path_items(self.params))
        if stored.keys() != expected.keys():
            raise ExportError(f"{self.path}: its parameters are not those of the model")
        for name, leaf in expected.items():
            if not _equal(stored[name], leaf):
                raise ExportError(f"{self.path}: damaged: {name} differs from the model's")
        quantized = sum(isinstance(leaf, Quantized) for leaf in expected.values())
        return WeightInspection(quantized, len(expected) - quantized)


def _equal(stored: Any, expected: Any) -> bool:
    if isinstance(stored, Quantized) and isinstance(expected, Quantized):
        parts = [
            (getattr(stored, name), getattr(expected, name)) for name in ("data", "scale", "zero")
        ]
        return stored.format == expected.format and all(_same_bytes(*pair) for pair in parts)
    if isinstance(stored, Quantized) or isinstance(expected, Quantized):
        return False
    return _same_bytes(stored, expected)


def _same_bytes(stored: Any, expected: Any) -> bool:
    if stored is None or expected is None:
        return stored is expected
    one, other = np.asarray(stored), np.asarray(expected)
    return one.dtype == other.dtype and np.array_equal(one, other)


def compressed_tensors(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    source: str | Path | None = None,
    activations: Activations = "float",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> CompressedTensorsDirectory:
    """Write a model as a Hugging Face directory that vLLM, SGLang and transformers open.

    Codes, scales and zero points are stored unchanged, as `pack-quantized`: int8 and int4, per
    channel or in groups, symmetric or affine; also several formats in one model. Narrower integers
    are written as int4 or int8 with the same values. `ge.load` reads the directory into the same
    boxes.

    Engines compute in one floating type and round scales to it. Scales that bfloat16 represents
    exactly (the default per group; per channel, `int8-channel-scale=bfloat16`) keep the values.

        small, small_params, _ = ge.quantize.rtn("int4-g128", where="^decoder/")(model, params)
        ge.export.compressed_tensors(small, small_params, "served", source="path/to/checkpoint")

    Args:
      model: the model; its configuration must have one width for all layers.
      params: its parameters: arrays, `Masked` (written dense, with zeros) or `Quantized`. The
        embedding and the head must be dense.
      path: directory to create.
      source: directory or GGUF file of the original model, whose tokenizer, chat template,
        processor and generation files are copied.
      activations: `float` stores weights only. `int8_dynamic` declares `int-quantized` (W8A8):
        engines round the inputs of products to int8 with one symmetric scale per token. (JAX's
        `compute="int8_dynamic"` adds a zero point per token, so logits differ.) Each quantized
        weight must then be int8, per channel and symmetric.
      shard_bytes: maximum bytes per file of weights.
      overwrite: whether to replace an existing checkpoint.

    Returns:
      The written directory.

    Raises:
      ExportError: a parameter or the model cannot be written; the message names a supported
        alternative.
      CheckpointError: a file of `source` is missing or damaged.
      OutputError: the directory already exists or cannot be written, or its disk is too full.

    References:
      https://github.com/vllm-project/compressed-tensors
    """
    path = Path(path)
    if activations not in ("float", "int8_dynamic"):
        raise ExportError(
            f"activations {activations!r:.60} is unknown; known: 'float' and 'int8_dynamic'"
        )
    check_target(path, overwrite, CONFIG, boxes.stored_bytes(params))
    check_model(model, params)
    stored, conversions = _stored_params(params, activations)
    leaves = dict(boxes.path_items(stored))
    described = describe(model.config, {str(leaf.dtype) for leaf in leaves.values()})
    if described is None:
        raise ExportError(
            f"{path}: a Hugging Face config.json cannot express this model (widths that differ per "
            "layer, or unknown encoders); save it with ge.save"
        )
    member, fields = described
    packed = activations == "float"
    tensors: dict[str, np.ndarray] = {}
    schemes: dict[str, Scheme | None] = {}
    for entry in member.entries(model.config):
        tensors |= _tensors(entry, [leaves[name] for name in entry.paths], packed, schemes)
    _check_fused(schemes)
    if not any(schemes.values()):
        raise ExportError(f"{path}: no weight is quantized; save the model with ge.save")
    untied = untie(model.config)
    if untied is not None:
        # transformers has a head also where it is tied, and vLLM looks for its scheme.
        head = next(e for e in member.entries(untied) if e.paths == HEAD)
        schemes[_module(head.names[0])] = None
    fields[FIELD] = _quantization_config(_by_every_name(schemes, member), packed)
    contents = {} if source is None else read_companions(source)
    with new_directory(path, overwrite) as directory:
        for name, content in contents.items():
            (directory / name).write_bytes(content)
        write_tensors(directory, tensors, fields, shard_bytes)
    if source is None:
        warnings.warn(
            f"{path}: written without a tokenizer, which engines need; pass the original directory "
            "as source=",
            stacklevel=2,
        )
    return CompressedTensorsDirectory(
        path, directory_bytes(path), tuple(conversions), model, stored
    )


def _stored_params(params: Params, activations: str) -> tuple[Params, list[Conversion]]:
    """Convert parameters to the arrays and boxes that the directory stores."""
    conversions: list[Conversion] = []

    def convert(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            array, changes = to_array(path, leaf)
            check_finite(path, np.asarray(array))
            conversions.extend(changes)
            return array
        box, changes = _stored_box(path, leaf, activations)
        conversions.extend(changes)
        return box

    return map_with_path(convert, params), conversions


def _stored_box(path: str, box: Quantized, activations: str) -> tuple[Quantized, list[Conversion]]:
    _check_home(path, box)
    qtype = check_box(path, box, COMPRESSED_TENSORS)
    scale = np.asarray(box.scale)
    check_finite(path, scale)
    form = box.format
    conversions = box_conversions(path, box, qtype)
    if activations == "int8_dynamic":
        if form.qtype != "int8" or form.columns_per_scale or not form.symmetric:
            raise ExportError(
                f"{path}: {form} cannot be written with activations='int8_dynamic'; use int8 per "
                "channel, or activations='float'"
            )
        if box.input_scale is not None:
            rule = "static range of its input is not written: products round each token"
            conversions[-1] = Conversion(path, rule, False)
    if form.group_size == PER_TENSOR:
        conversions.append(
            Conversion(path, "one scale per matrix written as one per row, of equal values", False)
        )
    rows = box.data.shape[0]
    zero = None
    if box.zero is not None:
        zero = jnp.asarray(np.broadcast_to(np.asarray(box.zero), (rows, scale.shape[1])), jnp.int8)
    stored = Format(qtype, form.columns_per_scale or None, form.symmetric, form.scale_dtype, "int8")
    if stored == form:
        return box.replace(**NO_STATIC_RANGES), conversions
    scales = jnp.asarray(np.broadcast_to(scale, (rows, scale.shape[1])))
    return boxes.quantized(box.codes(), scales, zero, stored, dtype=box.dtype), conversions


def _check_home(path: str, box: Quantized) -> None:
    """Reject a box that is not the weight of a product inside the model.

    vLLM reads quantized heads since pull request 37291, of 2026. Releases of SGLang load them
    without an error and compute wrong logits (issue 35358). An embedding is not a product.
    """
    if path.split("/")[0] in ("embed", "head"):
        raise ExportError(
            f"{path}: {box.format} cannot be written as compressed-tensors: engines read embedding "
            "and head dense only; quantize with where='^decoder/'"
        )


def _tensors(
    entry: TensorMapping,
    leaves: Sequence[Any],
    packed: bool,
    schemes: dict[str, Scheme | None],
) -> dict[str, np.ndarray]:
    """Convert the parameters of one entry to tensors, and record the schemes of its modules."""
    modules = [_module(name) for name in entry.names]
    linear = entry.by_rows and all(name.endswith(WEIGHT) for name in entry.names)
    if not any(isinstance(leaf, Quantized) for leaf in leaves):
        arrays = [np.asarray(leaf) for leaf in leaves]
        matrices = linear and all(map(boxes.is_matrix, entry.paths, arrays))
        if matrices and not entry.paths[0].startswith("embed/"):
            schemes.update(dict.fromkeys(modules))
        return dict(zip(entry.names, entry.write(*arrays), strict=True))
    if not linear:
        raise ExportError(
            f"{entry.paths[0]}: cannot be quantized as compressed-tensors: {entry.names[0]} is not "
            "the weight of a Linear; keep it dense"
        )
    formats = {str(getattr(leaf, "format", "dense")) for leaf in leaves}
    if len(formats) > 1:
        raise ExportError(
            f"{', '.join(entry.paths)}: are one tensor of the checkpoint, {entry.names[0]}, and "
            f"must have one format, not {' and '.join(sorted(formats))}"
        )
    form = leaves[0].format
    scheme = Scheme(BITS[form.qtype], form.columns_per_scale or None, form.symmetric)
    schemes.update(dict.fromkeys(modules, scheme))
    # Codes, scales and zero points have the rows of the weight, which the entry rearranges.
    codes = entry.write(*(np.asarray(leaf.codes()) for leaf in leaves))
    scales = entry.write(*(np.asarray(leaf.scale) for leaf in leaves))
    zeros: Sequence[np.ndarray | None] = [None] * len(modules)
    if not form.symmetric:
        zeros = entry.write(*(np.asarray(leaf.zero) for leaf in leaves))
    tensors: dict[str, np.ndarray] = {}
    for module, parts in zip(modules, map(Codes, codes, scales, zeros), strict=True):
        stored = tensors_of(parts, scheme.bits, packed)
        tensors |= {f"{module}.{suffix}": array for suffix, array in stored.items()}
    return tensors


def _module(name: str) -> str:
    return name.removesuffix(WEIGHT)


def _check_fused(schemes: Mapping[str, Scheme | None]) -> None:
    """Reject formats that differ between modules that engines load as one matrix."""
    for module, scheme in schemes.items():
        parent, _, name = module.rpartition(".")
        for group in FUSED:
            if name not in group:
                continue
            for other in (f"{parent}.{part}" for part in group):
                if schemes.get(other, scheme) != scheme:
                    raise ExportError(
                        f"{module} and {other} have different formats, but engines load them as "
                        "one matrix; use one format for both"
                    )


def _by_every_name(
    schemes: Mapping[str, Scheme | None], member: FamilyMember
) -> dict[str, Scheme | None]:
    """Name modules as in the checkpoint, for vLLM, and also as in transformers."""
    named = dict(schemes)
    for module, scheme in schemes.items():
        renamed = module
        for pattern, replacement in member.module_renames:
            renamed = re.sub(pattern, replacement, renamed)
        named[renamed] = scheme
    return named


def _quantization_config(schemes: Mapping[str, Scheme | None], packed: bool) -> dict[str, Any]:
    """Describe the schemes: by the class of modules if there is one, else by their names."""
    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    inputs = None if packed else dict(ACTIVATIONS_PER_TOKEN)
    groups = {}
    for number, scheme in enumerate(used):
        targets = ["Linear"]
        if len(used) > 1:
            targets = [module for module, its in schemes.items() if its == scheme]
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": scheme.write(),
            "input_activations": inputs,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": PACKED if packed else UNPACKED,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": [module for module, scheme in schemes.items() if scheme is None],
        "config_groups": groups,
    }
