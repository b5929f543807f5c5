"""llama.cpp: rounds matrices to a GGUF type by `ggml_quantize_chunk`; `gguf` reads them.

Without `library`, only the types that `gguf` itself rounds are available (Q8_0, Q4_0, Q4_1, TQ1_0,
TQ2_0). The importance matrix is that of llama-imatrix: the mean square of each input column.

Options: `type`, such as Q4_K; `imatrix`; `library`, path of libggml-base.
"""

import ctypes

import numpy as np

from experiments.bench.peers.exchange import Stored, Task, serve


def quantize(task: Task) -> dict[str, Stored]:
    import gguf

    kind = gguf.GGMLQuantizationType[task.options["type"]]
    library = _load(task.options["library"]) if task.options.get("library") else None
    stored = {}
    for path, weight in task.weights.items():
        importance = None
        if task.options.get("imatrix"):
            importance = np.mean(task.rows(path) ** 2, axis=0, dtype=np.float32)
        if library is None:
            if importance is not None:
                raise ValueError("an importance matrix needs the library; pass --ggml_library")
            packed = gguf.quants.quantize(weight, kind)
        else:
            row_bytes = library.ggml_row_size(kind, weight.shape[1])
            packed = _quantize(library, int(kind), row_bytes, weight, importance)
        dense = gguf.quants.dequantize(packed, kind)
        stored[path] = Stored(dense, 8 * packed.nbytes)
    return stored


def _load(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def _quantize(
    library: ctypes.CDLL,
    kind: int,
    row_bytes: int,
    weight: np.ndarray,
    importance: np.ndarray | None,
) -> np.ndarray:
    source = np.ascontiguousarray(weight, np.float32)
    packed = np.zeros((source.shape[0], row_bytes), np.uint8)
    where = None if importance is None else importance.ctypes.data
    size = library.ggml_quantize_chunk(
        kind, source.ctypes.data, packed.ctypes.data, 0, *source.shape, where
    )
    if size != packed.nbytes:
        raise ValueError(f"type {kind}: wrote {size} bytes, expected {packed.nbytes}")
    return packed


if __name__ == "__main__":
    serve(quantize, {"gguf": "gguf"})
