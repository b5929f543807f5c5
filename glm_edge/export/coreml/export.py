"""Export to Core ML: quantized codes in an `.mlpackage`, converted through StableHLO."""

import contextlib
import hashlib
import json
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
from glm_edge.errors import ExportError, require
from glm_edge.export.common.directory import directory_bytes
from glm_edge.export.common.jaxpr import limit_rank
from glm_edge.export.common.quiet import quiet
from glm_edge.export.common.signatures import ExportSpec, Signature, make_spec
from glm_edge.export.common.weights import COREML, Weight, stored_bytes, to_params, to_weight
from glm_edge.export.coreml.reader import MANIFEST, METADATA, core_ml_tools
from glm_edge.export.coreml.verify import CoreMLPackage
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params.tree import Params, nested
from glm_edge.process_wide import shared
from glm_edge.writers import check_target, new_directory, require_space, scratch_beside

CONTENT = Path("Data/com.apple.CoreML")
# Layout of the file of weights: a header of 64 bytes with the number of blobs. A record of 64 bytes
# precedes each blob, with a mark, a type, the size of the data and its offset.
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
) -> CoreMLPackage:
    """Write a model as an `.mlpackage` for iOS 18 with one function per signature.

    `common.signatures.signatures` describes the functions, which share their weights. A cache
    output has the name of its input with `_out` appended. Graphs are traced through StableHLO with
    weights as arguments. Each argument then becomes a constant of 8-bit or 4-bit codes with float32
    scales, one per row or per group (`constexpr_blockwise_shift_scale`).

    Core ML runs on Apple's systems only. On other systems, `CoreMLPackage.verify` checks the
    package's specification without running it: compare it with JAX on a Mac before relying on it.
    Computation is in float32; the Neural Engine uses float16.

    Args:
      model: the model.
      params: its parameters: arrays, `Masked` (written dense, with zeros) or `Quantized`.
      path: path of the package; must end in `.mlpackage`.
      prefill_lengths: token counts of the prefill functions.
      cache_slots: number of cache slots; None uses the model's context length, at most 1024.
      prefill_logits: whether prefill returns logits of every token. Generation does not need them,
        and they take time.
      overwrite: whether to replace an existing package.

    Returns:
      The written package.

    Raises:
      ExportError: a parameter or the model cannot be written; the message names a supported
        alternative.
      OutputError: the package already exists or cannot be written, or its disk is too full.
      MissingExtraError: coremltools or stablehlo-coreml is not installed.

    References:
      MIL operations, https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html.
    """
    path, tools = Path(path), core_ml_tools()
    require("stablehlo_coreml", extra="coreml")
    if path.suffix != ".mlpackage":
        raise ExportError(f"{path}: the name of a Core ML package must end in .mlpackage")
    check_target(path, overwrite, MANIFEST, strict=True)
    spec = make_spec(model, params, prefill_lengths, cache_slots, prefill_logits)
    require_space(path, _needed(spec, params))
    weights, conversions = {}, []
    for name, leaf in boxes.path_items(params):
        weights[name], changes = to_weight(name, leaf, COREML)
        conversions += changes
    description = spec.description(sorted(weights), conversions)
    with (
        new_directory(path, overwrite, mark=MANIFEST) as directory,
        scratch_beside(path) as scratch,
        _temporary_in(scratch),
    ):
        merged = tools.utils.MultiFunctionDescriptor()
        for signature in spec.signatures:
            part = scratch / f"{signature.name}.mlpackage"
            _function(tools, signature, spec.shapes, weights, part)
            merged.add_function(str(part), "main", signature.name)
        merged.default_function_name = spec.names[0]
        package = scratch / path.name
        with quiet():
            tools.utils.save_multifunction(merged, str(package))
        _finish(tools, package / CONTENT, description)
        directory.rmdir()
        package.rename(directory)
    stored_params = to_params(params, weights)
    return CoreMLPackage(
        path, directory_bytes(path), spec.names, tuple(conversions), model, stored_params
    )


def _function(
    tools: Any,
    signature: Signature,
    shapes: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Weight],
    path: Path,
) -> None:
    """Write a package of one signature."""
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
            raise ExportError(f"Core ML cannot represent {signature.name}: {reason[0]}") from error


def _needed(spec: ExportSpec, params: Params) -> int:
    """Estimate the peak bytes on disk: each function's weights, and three merged copies."""
    sizes = {name: stored_bytes(leaf, COREML) for name, leaf in boxes.path_items(params)}
    return sum(spec.read_bytes(sizes)) + 3 * sum(sizes.values())


def _finish(tools: Any, content: Path, description: Mapping[str, Any]) -> None:
    """Store equal blobs of all functions once; merging does so for plain values only."""
    specification = tools.proto.Model_pb2.Model()
    specification.ParseFromString((content / "model.mlmodel").read_bytes())
    specification.description.metadata.userDefined[METADATA] = json.dumps(description)
    source, target = content / "weights" / "weight.bin", content / "weights" / "once.bin"
    content_bytes = np.memmap(source, np.uint8, "r")
    positions: dict[Any, int] = {}
    moved: dict[int, int] = {}
    with open(target, "xb") as file:
        file.write(content_bytes[:RECORD].tobytes())
        for block in _blocks(specification):
            for blob in _blobs(block):
                if blob.offset not in moved:
                    moved[blob.offset] = _copy_once(content_bytes, blob.offset, file, positions)
                blob.offset = moved[blob.offset]
        file.seek(0)
        file.write(np.uint32(len(positions)).tobytes())
    del content_bytes
    os.replace(target, source)
    (content / "model.mlmodel").write_bytes(specification.SerializeToString())


def _copy_once(
    content: np.ndarray, offset: int, file: BinaryIO, positions: dict[bytes, int]
) -> int:
    record = content[offset : offset + RECORD]
    size, start = (int(number) for number in record[8:24].view(np.uint64))
    data = content[start : start + size]
    key = hashlib.sha256(record[4:16].tobytes() + data.tobytes()).digest()
    if key not in positions:
        file.write(bytes(-file.tell() % RECORD))
        positions[key] = file.tell()
        record = np.array(record)
        record[16:24] = np.array([file.tell() + RECORD], np.uint64).view(np.uint8)
        file.write(record.tobytes())
        file.write(data.tobytes())
    return positions[key]


def _blocks(specification: Any) -> Iterator[Any]:
    for function in specification.mlProgram.functions.values():
        yield from function.block_specializations.values()


def _blobs(block: Any) -> Iterator[Any]:
    """Yield a block's references to the file of weights."""
    for operation in block.operations:
        for inner in operation.blocks:
            yield from _blobs(inner)
        arguments = [a.value for value in operation.inputs.values() for a in value.arguments]
        for value in (*arguments, *operation.attributes.values()):
            if value.WhichOneof("value") == "blobFileValue":
                yield value.blobFileValue


def _stablehlo(
    signature: Signature, shapes: Mapping[str, tuple[int, ...]], paths: list[str], inputs: list[str]
) -> tuple[Any, list[str]]:
    """Trace a signature with weights as its first arguments; list the names of its results."""
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir

    def function(values: list[Any], arguments: list[Any]) -> dict[str, Any]:
        params = nested(dict(zip(paths, values, strict=True)))
        return signature.function(params, dict(zip(inputs, arguments, strict=True)))

    structs = [jax.ShapeDtypeStruct(shapes[path], jnp.float32) for path in paths]
    arguments = [signature.inputs[name] for name in inputs]
    narrow = jax.jit(limit_rank(function), keep_unused=True)
    exported = jax.export.export(narrow)(structs, arguments)
    results = sorted(jax.eval_shape(function, structs, arguments))
    with mlir.make_ir_context():
        return ir.Module.parse(exported.mlir_module()), results


def _name(
    function: Any,
    paths: list[str],
    inputs: list[str],
    outputs: list[str],
    weights: Mapping[str, Weight],
) -> None:
    """Turn the weight arguments of a MIL function into constants; name inputs and outputs."""
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
    """Make coremltools store its temporary copies on the target's disk.

    Some copies remain until the process ends. A process has one such folder, so a second export
    waits for the first.
    """
    with _ONE_AT_A_TIME:
        before, tempfile.tempdir = tempfile.tempdir, str(directory)
        try:
            yield
        except RuntimeError as error:
            if "FileWriter" not in str(error):
                raise
            # Message of coremltools' C++ code for a full disk.
            raise OSError(str(error)) from error
        finally:
            tempfile.tempdir = before


@shared
@contextlib.contextmanager
def _progress_off() -> Iterator[None]:
    """Hide the progress bars of the converter's passes."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
