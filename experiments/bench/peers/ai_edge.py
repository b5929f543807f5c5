"""ai-edge-quantizer: quantizes each matrix as a FULLY_CONNECTED of a .tflite file.

Weights are dynamic-range quantized (such as "dynamic_wi4_afp32"): activations stay float32 in the
file.

Options: `bits` 8, 4 or 2; `granularity` CHANNELWISE or BLOCKWISE_32; `algorithm`, its key.
"""

import numpy as np

from experiments.bench.peers.exchange import Stored, Task, serve

ROWS = 512
WEIGHT, INPUT, OUTPUT, SIGNATURE = "weight", "x", "y", "serve"


def quantize(task: Task) -> dict[str, Stored]:
    return {path: _matrix(task, path, weight) for path, weight in task.weights.items()}


def _matrix(task: Task, path: str, weight: np.ndarray) -> Stored:
    from ai_edge_quantizer import calibrator, qtyping, quantizer

    options, model = task.options, _fully_connected(weight)
    tool = quantizer.Quantizer(model)
    tool.add_dynamic_config(
        regex=".*",
        operation_name=qtyping.TFLOperationName.FULLY_CONNECTED,
        num_bits=options["bits"],
        granularity=qtyping.QuantGranularity[options["granularity"]],
        algorithm_key=options["algorithm"],
    )
    statistics = {}
    if task.inputs is not None:
        rows = task.rows(path)
        rows = rows[: len(rows) // ROWS * ROWS].reshape(-1, ROWS, weight.shape[1])
        # Not `tool.calibrate`, which assumes that OSCAR needs no calibration.
        observer = calibrator.Calibrator(model, num_threads=2)
        observer.calibrate({SIGNATURE: [{INPUT: part} for part in rows]}, tool._recipe_manager)
        statistics = observer.get_model_qsvs()
    result = tool.quantize(statistics, enable_progress_report=False)
    return _read(result.quantized_model, weight.shape)


def _fully_connected(weight: np.ndarray) -> bytearray:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    features, width = weight.shape
    buffers = [schema.BufferT(), schema.BufferT()]
    buffers[1].data = np.frombuffer(weight.astype(np.float32).tobytes(), np.uint8)
    tensors = []
    for name, shape, buffer in (
        (INPUT, (ROWS, width), 0),
        (WEIGHT, (features, width), 1),
        (OUTPUT, (ROWS, features), 0),
    ):
        tensor = schema.TensorT(shape=list(shape), type=schema.TensorType.FLOAT32, buffer=buffer)
        tensor.name = name.encode()
        tensors.append(tensor)
    operator = schema.OperatorT(opcodeIndex=0, inputs=[0, 1, -1], outputs=[2])
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    graph = schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[2], operators=[operator])
    graph.name = b"main"
    code = schema.BuiltinOperator.FULLY_CONNECTED
    signature = schema.SignatureDefT(signatureKey=SIGNATURE.encode(), subgraphIndex=0)
    signature.inputs = [schema.TensorMapT(name=INPUT.encode(), tensorIndex=0)]
    signature.outputs = [schema.TensorMapT(name=OUTPUT.encode(), tensorIndex=2)]
    model = schema.ModelT(version=3, subgraphs=[graph], buffers=buffers)
    model.operatorCodes = [
        schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=1)
    ]
    model.signatureDefs = [signature]
    return flatbuffer_utils.convert_object_to_bytearray(model)


def _read(model: bytes, shape: tuple[int, int]) -> Stored:
    """Read the weights of a quantized file, and their bits including scales and zero points."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    read = flatbuffer_utils.read_model_from_bytearray(bytearray(model))
    tensors, buffers = read.subgraphs[0].tensors, read.buffers
    constants = [t for t in tensors if t.buffer and buffers[t.buffer].data is not None]
    weight = next(t for t in constants if tuple(t.shape) == shape)
    data = np.asarray(buffers[weight.buffer].data, np.uint8)
    bits = {schema.TensorType.INT8: 8, schema.TensorType.INT4: 4, schema.TensorType.INT2: 2}
    codes = _unpack(data, bits[weight.type]).reshape(shape).astype(np.float32)
    grid = weight.quantization
    if grid.detailsType == schema.QuantizationDetails.BlockwiseQuantization:
        scale_tensor = tensors[grid.details.scales]
        scale_data = np.asarray(buffers[scale_tensor.buffer].data, np.uint8)
        narrow = scale_tensor.type == schema.TensorType.FLOAT16
        scale = scale_data.view(np.float16 if narrow else np.float32).astype(np.float32)
        zero, scale_bits, zero_bits = 0.0, 8 * scale_data.size, 0
        if grid.details.zeroPoints > 0:
            zeros = np.asarray(buffers[tensors[grid.details.zeroPoints].buffer].data, np.uint8)
            zero_bits = 8 * zeros.size
    else:
        scale, zero = np.asarray(grid.scale, np.float32), np.asarray(grid.zeroPoint, np.float32)
        scale_bits, zero_bits = 32 * scale.size, 64 * zero.size
        zero = zero.reshape(shape[0], -1, 1)
        if np.any(zero):
            raise ValueError("expected symmetric weights")
    scale = scale.reshape(shape[0], -1, 1)
    dense = (codes.reshape(shape[0], scale.shape[1], -1) * scale).reshape(shape)
    # OSCAR first multiplies the input by a vector.
    for other in constants:
        if other is not weight and list(other.shape)[-1:] == [shape[1]] and other.type == 0:
            vector = np.asarray(buffers[other.buffer].data, np.uint8).view(np.float32)
            if vector.size == shape[1]:
                dense, scale_bits = dense * vector, scale_bits + 32 * vector.size
    fixed = 8 * data.size + scale_bits
    return Stored(dense, fixed + zero_bits, fixed)


def _unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """Unpack signed integers, lowest bits of a byte first."""
    fields = (data[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & ((1 << bits) - 1)
    return ((fields.astype(np.int16) ^ (1 << bits - 1)) - (1 << bits - 1)).reshape(-1)


if __name__ == "__main__":
    serve(quantize, {"ai-edge-quantizer": "ai_edge_quantizer.quantizer"})
