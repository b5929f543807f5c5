"""qwix: round-to-nearest, GPTQ and AWQ, by the functions that its providers call per matrix.

Its interception of JAX models is not used: the weights, the Hessian of the inputs and the rounding
are the same without it.

Options: `algorithm` rtn, gptq or awq; `qtype` int8, int4, int3, int2 or nf4; `tile`, None for
channelwise; `scale_dtype`, None for float32.
"""

import dataclasses

import numpy as np

from experiments.bench.peers.exchange import Stored, Task, serve


def quantize(task: Task) -> dict[str, Stored]:
    return {path: _matrix(task, path, weight) for path, weight in task.weights.items()}


def _matrix(task: Task, path: str, weight: np.ndarray) -> Stored:
    import jax.numpy as jnp
    from qwix._src.core import qarray
    from qwix.contrib import awq_core, gptq_core

    options, equalization = task.options, 0
    qtype, tile = options["qtype"], options.get("tile")
    how = qarray.HowToQuantize(
        # qwix uses a name for types that JAX lacks.
        qtype=jnp.dtype(qtype) if qtype in ("int8", "int4") else qtype,
        channelwise_axes=(0,),
        tiled_axes={1: tile} if tile else {},
    )
    weight = jnp.asarray(weight)
    if options["algorithm"] == "gptq":
        rows = task.rows(path)
        quantized, _ = gptq_core.quantize_weight(weight, jnp.asarray(rows.T @ rows), how)
    elif options["algorithm"] == "awq":
        magnitude = awq_core.compute_act_scale(jnp.asarray(task.rows(path)))
        quantized, scales = awq_core.quantize_weight(weight, magnitude, how)
        equalization = 8 * scales.nbytes
    else:
        quantized = qarray.quantize(weight, how)
    if "scale_dtype" in options:
        scale = quantized.scale.astype(options["scale_dtype"])
        quantized = dataclasses.replace(quantized, scale=scale)
    dense = qarray.dequantize(quantized).astype(jnp.float32)
    if equalization:
        dense = dense / scales
    scale_bits = 8 * quantized.scale.nbytes + equalization
    code_bits = jnp.iinfo(quantized.qvalue.dtype).bits
    packed_bits = int(qtype.removeprefix("int")) if qtype.startswith("int") else 4
    return Stored(
        np.asarray(dense),
        code_bits * weight.size + scale_bits,
        packed_bits * weight.size + scale_bits,
    )


if __name__ == "__main__":
    serve(quantize, {"qwix": "qwix", "jax": "jax.numpy"})
