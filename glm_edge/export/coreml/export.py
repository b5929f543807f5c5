"""Export to Core ML: our integers in an `.mlpackage`, by way of StableHLO."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from glm_edge import params as boxes
from glm_edge.errors import ExportError, GlmEdgeError, require
from glm_edge.export.common.directory import (
    Package,
    bytes_of,
    check_target,
    check_tree,
    written_whole,
)
from glm_edge.export.common.five_axes import within_five_axes
from glm_edge.export.common.offer import Offer, offer
from glm_edge.export.common.signatures import Signature, quiet
from glm_edge.export.common.weights import Weight, held_bytes, held_params, weight_of
from glm_edge.export.tflite.file import DAMAGE, scratch_beside
from glm_edge.files import parse_json
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params, nested
from glm_edge.process_wide import shared
from glm_edge.writers import require_space

MARK = "Manifest.json"
METADATA = "glm_edge"
CONTENT = Path("Data/com.apple.CoreML")
# A file of weights: a header of 64 bytes that counts the blobs, and before each a record of as many
# that holds a mark, a type, the bytes of data, and where they begin.
RECORD = 64
_ONE_AT_A_TIME = threading.Lock()


def coreml(
    model: MultimodalGLM,
    params: Params,
    path: str | Path,
    prefill_lengths: Iterable[int] = (128,),
    cache_slots: int | None = None,
    prefill_logits: bool = False,
    overwrite: bool = False,
) -> Package:
    """Writes a model as an `.mlpackage` for iOS 18 with a function for each signature.

    See `common.signatures.signatures` for the functions; outputs that carry the cache are named
    like the inputs with `_out` appended, and functions share their weights. Graphs are traced with
    weights as arguments, through StableHLO; each argument then becomes a constant of our codes and
    float32 scales (`constexpr_blockwise_shift_scale`), 8 or 4 bits, per row or in groups.

    Core ML runs on Apple's systems only. Elsewhere the package is written and its specification
    is checked, as `Package.verify` does, but nothing has run it: compare it with JAX on a Mac
    before relying on it. Computation is in float32; the Neural Engine takes float16.

    Args:
      model: the model.
      params: its parameters: arrays; `Masked` (written dense, with zeros); `Quantized`.
      path: of the package; must end in `.mlpackage`.
      prefill_lengths: lengths of the prefill functions.
      cache_slots: slots of the cache; None takes the model's context, at most 1024.
      prefill_logits: prefill scores every token, which takes time that generation does not need.
      overwrite: replace a package that exists.

    Returns:
      What was written.

    Raises:
      ExportError: a parameter or the model cannot be written; the message says what would be right.
      OutputError: the package exists already, cannot be written, or its disk is too full.
      MissingExtraError: coremltools or stablehlo-coreml is not installed.

    References:
      MIL operations, https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html.
    """
    path, tools = Path(path), core_ml_tools()
    require("stablehlo_coreml", extra="coreml")
    if path.suffix != ".mlpackage":
        raise ExportError(f"{path}: Core ML opens packages by their name: end it in .mlpackage")
    check_target(path, overwrite, MARK)
    offered = offer(model, params, prefill_lengths, cache_slots, prefill_logits)
    require_space(path, _needed(offered, params))
    weights, conversions = {}, []
    for name, leaf in boxes.path_items(params):
        weights[name], found = weight_of(name, leaf, "Core ML")
        conversions += found
    description = offered.description(sorted(weights), conversions)
    with (
        written_whole(path, overwrite, MARK) as directory,
        scratch_beside(path) as scratch,
        _temporary_in(scratch),
    ):
        merged = tools.utils.MultiFunctionDescriptor()
        for signature in offered.signatures:
            part = scratch / f"{signature.name}.mlpackage"
            _function(tools, signature, offered.shapes, weights, part)
            merged.add_function(str(part), "main", signature.name)
        merged.default_function_name = offered.names[0]
        whole = scratch / path.name
        with quiet():
            tools.utils.save_multifunction(merged, str(whole))
        _finish(tools, whole / CONTENT, description)
        directory.rmdir()
        whole.rename(directory)
    held = held_params(params, weights)
    return Package(path, bytes_of(path), offered.names, tuple(conversions), model, held)


def read_weights(path: str | Path) -> dict[str, Weight]:
    """Reads the quantized weights of a package back, as its functions read them.

    Args:
      path: the package.

    Returns:
      Parameter path to its codes, scales and zero points.

    Raises:
      ExportError: the package is missing, damaged, or no export.
      MissingExtraError: coremltools is not installed.
    """
    found = {}
    try:
        package = open_package(path)
        described = described_by(package, path)
        names = {name.replace("/", "_"): name for name in described["parameters"]}
        for function in _program(package).functions.values():
            for operation in function.operations:
                if operation.op_type == "constexpr_blockwise_shift_scale":
                    found[names[operation.outputs[0].name]] = _weight(operation)
    except GlmEdgeError:
        raise
    except (OSError, RuntimeError, *DAMAGE) as error:
        raise ExportError(f"{path}: no whole Core ML export of glm_edge: {error}") from error
    return found


def open_package(path: str | Path) -> Any:
    """Opens a package in coremltools without loading it into a runtime.

    Raises:
      ExportError: a file of it is a pipe, a device or a link, or coremltools cannot open it.
      MissingExtraError: coremltools is not installed.
    """
    check_tree(Path(path))
    tools, message = core_ml_tools(), require("google.protobuf.message", extra="coreml")
    try:
        return tools.models.MLModel(str(path), skip_model_load=True)
    # Some of its classes of errors derive from Exception alone.
    except (OSError, RuntimeError, message.DecodeError, *DAMAGE) as error:
        raise ExportError(f"{path}: no whole Core ML export of glm_edge: {error}") from error


def described_by(package: Any, path: str | Path) -> dict[str, Any]:
    """Reads the description of a package that `open_package` opened.

    Raises:
      ExportError: it is missing, or is not a JSON object within the usual limits.
    """
    metadata = package.get_spec().description.metadata.userDefined
    if METADATA not in metadata:
        raise ExportError(f"{path}: a Core ML package, but not one that glm_edge exported")
    where = f"{path}: no whole Core ML export of glm_edge: its description"
    described = parse_json(metadata[METADATA], where, ExportError)
    if not isinstance(described, dict):
        raise ExportError(f"{where}: is a {type(described).__name__}, not a JSON object")
    return described


def _program(package: Any) -> Any:
    loader = require("coremltools.converters.mil.frontend.milproto.load", extra="coreml")
    specification = package.get_spec()
    return loader.load(
        specification, specification.specificationVersion, file_weights_dir=package.weights_dir
    )


def _weight(operation: Any) -> Weight:
    types = require("coremltools.converters.mil.mil.types", extra="coreml")
    data, scale = operation.data.val, np.asarray(operation.scale.val)
    kind = types.builtin_to_string(operation.data.dtype)
    zero = None if operation.offset is None else np.asarray(operation.offset.val).astype(np.int8)
    groups = scale.shape[-1]
    size = data.shape[-1] // groups if groups > 1 else 0
    return Weight(np.asarray(data).astype(np.int8), kind, scale, zero, size)


def core_ml_tools() -> Any:
    """coremltools, told to keep quiet.

    Raises:
      MissingExtraError: it is not installed.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with quiet():
        return require("coremltools", extra="coreml")


def _function(
    tools: Any,
    signature: Signature,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Weight],
    path: Path,
) -> None:
    """Writes a package of one signature."""
    hlo = require("stablehlo_coreml", extra="coreml")
    paths = sorted(path for path in shapes if path.split("/")[0] in signature.subtrees)
    inputs = sorted(signature.inputs)
    target = tools.target.iOS18
    with quiet(), _progress_off():
        try:
            module, outputs = _stablehlo(signature, shapes, paths, inputs)
            program = hlo.convert(module, minimum_deployment_target=target)
            _name(program.functions["main"], paths, inputs, outputs, weights)
            tools.convert(
                program,
                source="milinternal",
                minimum_deployment_target=target,
                compute_precision=tools.precision.FLOAT32,
                pass_pipeline=hlo.DEFAULT_HLO_PIPELINE,
                skip_model_load=True,
                package_dir=str(path),
            )
        except (ValueError, TypeError, NotImplementedError, KeyError, AssertionError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(f"Core ML cannot hold {signature.name}: {reason[0]}") from error


def _needed(offered: Offer, params: Params) -> int:
    """Bytes on the disk at the most: functions each with its weights, and three merged copies."""
    sizes = {name: held_bytes(leaf) for name, leaf in boxes.path_items(params)}
    return sum(offered.read_bytes(sizes)) + 3 * sum(sizes.values())


def _finish(tools: Any, content: Path, description: Mapping[str, Any]) -> None:
    """Stores equal blobs of all functions once, which merging does for plain numbers only."""
    specification = tools.proto.Model_pb2.Model()
    specification.ParseFromString((content / "model.mlmodel").read_bytes())
    specification.description.metadata.userDefined[METADATA] = json.dumps(description)
    source, target = content / "weights" / "weight.bin", content / "weights" / "once.bin"
    held, places, moved = np.memmap(source, np.uint8, "r"), {}, {}
    with open(target, "xb") as file:
        file.write(held[:RECORD].tobytes())
        for block in _blocks(specification):
            for blob in _blobs(block):
                if blob.offset not in moved:
                    moved[blob.offset] = _copy_once(held, blob.offset, file, places)
                blob.offset = moved[blob.offset]
        file.seek(0)
        file.write(np.uint32(len(places)).tobytes())
    del held
    os.replace(target, source)
    (content / "model.mlmodel").write_bytes(specification.SerializeToString())


def _copy_once(held: np.ndarray, offset: int, file: BinaryIO, places: dict[bytes, int]) -> int:
    record = held[offset : offset + RECORD]
    size, start = (int(number) for number in record[8:24].view(np.uint64))
    data = held[start : start + size]
    key = hashlib.sha256(record[4:16].tobytes() + data.tobytes()).digest()
    if key not in places:
        file.write(bytes(-file.tell() % RECORD))
        places[key] = file.tell()
        record = np.array(record)
        record[16:24] = np.array([file.tell() + RECORD], np.uint64).view(np.uint8)
        file.write(record.tobytes())
        file.write(data.tobytes())
    return places[key]


def _blocks(specification: Any) -> Iterator[Any]:
    for function in specification.mlProgram.functions.values():
        yield from function.block_specializations.values()


def _blobs(block: Any) -> Iterator[Any]:
    """All references of a block to the file of weights."""
    for operation in block.operations:
        for inner in operation.blocks:
            yield from _blobs(inner)
        arguments = [a.value for given in operation.inputs.values() for a in given.arguments]
        for value in (*arguments, *operation.attributes.values()):
            if value.WhichOneof("value") == "blobFileValue":
                yield value.blobFileValue


def _stablehlo(
    signature: Signature, shapes: Mapping[str, tuple[int, ...]], paths: list[str], inputs: list[str]
) -> tuple[Any, list[str]]:
    """The traced signature, weights first among its arguments, and the names of its results."""
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir

    def function(values: list[Any], given: list[Any]) -> dict[str, Any]:
        params = nested(dict(zip(paths, values, strict=True)))
        return signature.function(params, dict(zip(inputs, given, strict=True)))

    structs = [jax.ShapeDtypeStruct(shapes[path], jnp.float32) for path in paths]
    given = [signature.inputs[name] for name in inputs]
    narrow = jax.jit(within_five_axes(function), keep_unused=True)
    exported = jax.export.export(narrow)(structs, given)
    results = sorted(jax.eval_shape(function, structs, given))
    with mlir.make_ir_context():
        return ir.Module.parse(exported.mlir_module()), results


def _name(
    function: Any,
    paths: list[str],
    inputs: list[str],
    outputs: list[str],
    weights: Mapping[str, Weight],
) -> None:
    """Turns the weight arguments of a MIL function into constants; names inputs and outputs."""
    builder = require("coremltools.converters.mil", extra="coreml").Builder
    placeholders = list(function.inputs.values())
    with function:
        first = function.operations[0]
        for variable, path in zip(placeholders, paths, strict=False):
            if variable.child_ops:
                constant = _constant(builder, path, weights[path], first)
                function.replace_uses_of_var_after_op(
                    anchor_op=constant.op, old_var=variable, new_var=constant
                )
        named = []
        for variable, name in zip(function.outputs, outputs, strict=True):
            name = f"{name}_out" if name in inputs else name
            named.append(builder.identity(x=variable, name=name))
        function.set_outputs(named)
    function._input_dict.clear()
    for variable, name in zip(placeholders[len(paths) :], inputs, strict=True):
        variable.name = name
        function._input_dict[name] = variable
    function._block_inputs = tuple(function._input_dict.values())


def _constant(builder: Any, path: str, weight: Weight, before: Any) -> Any:
    types = require("coremltools.converters.mil.mil.types", extra="coreml")

    def codes(array: np.ndarray) -> np.ndarray:
        return array.astype(types.np_int4_dtype) if weight.type == "int4" else array

    if weight.scale is None:
        return builder.const(val=weight.values.astype(np.float32), name=path, before_op=before)
    zero = {} if weight.zero is None else {"offset": codes(weight.zero)}
    return builder.constexpr_blockwise_shift_scale(
        data=codes(weight.values), scale=weight.scale, name=path, before_op=before, **zero
    )


@contextlib.contextmanager
def _temporary_in(directory: Path) -> Iterator[None]:
    """Keeps copies that coremltools makes, some until the process ends, on the target's disk.

    The folder is one of the whole process, so that a second export waits for the first.
    """
    with _ONE_AT_A_TIME:
        before, tempfile.tempdir = tempfile.tempdir, str(directory)
        try:
            yield
        except RuntimeError as error:
            if "FileWriter" not in str(error):
                raise
            # What its C++ part says of a full disk.
            raise OSError(str(error)) from error
        finally:
            tempfile.tempdir = before


@shared
@contextlib.contextmanager
def _progress_off() -> Iterator[None]:
    """Keeps progress bars of the converter's passes from the terminal."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
