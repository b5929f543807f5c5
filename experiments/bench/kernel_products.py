"""Products of `experiments.bench.kernels`: glm_edge's, simple ones in XLA, other libraries'."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from glm_edge.kernels import matmul, packing, quantization
from glm_edge.params import Format, boxes
from glm_edge.params.linear import linear

Wanted = Callable[[str], bool]
FORMATS = (
    "int8-channel",
    "int8-g32",
    "int4-channel",
    "int4-g32",
    "int3-channel",
    "int2-channel",
    "ternary-channel",
    "ternary34-channel",
    "nf4-g64",
)
ON_INT8 = ("int8-channel", "int4-channel", "int4-g32")
# Threads of torch spin for a while after their work, and would slow the next measurement.
PAUSE_S = 0.1


@dataclasses.dataclass
class Product:
    """A chain of products to time.

    Attributes:
      name: name of the product; `experiments.bench.kernels` explains it.
      run: function that runs the chain once and waits for the result.
      stored: bytes of all weights.
      error: largest error of one product, relative to its largest value; None if not measured.
      temporary: bytes of XLA's temporary memory, or None.
    """

    name: str
    run: Callable[[], Any]
    stored: int
    error: float | None = None
    temporary: int | None = None


@functools.partial(jax.jit, static_argnums=1)
def boxed(weight: Array, format: Format) -> boxes.Quantized:
    """Return a weight in a format, with scales from its largest values."""
    groups = format.num_groups(weight.shape[1])
    high = 1 if format.qtype == "nf4" else quantization.code_range(format.qtype)[1]
    scale = jnp.abs(weight).reshape(weight.shape[0], groups, -1).max(axis=-1) / high
    scale = scale.astype(format.scale_dtype)
    codes = quantization.quantize(weight, scale, None, format.qtype)
    return boxes.quantized(codes, scale, None, format)


def ours(x: Array, weights: list[Array], wanted: Wanted) -> Iterator[Product]:
    """Return the products of the library; the first is float32."""
    bfloat16 = [weight.astype(jnp.bfloat16) for weight in weights]
    yield chained("fp32", x, matmul.dense, weights)
    if len(x) <= matmul.SPLIT_ROWS:
        yield chained("bf16", x, linear, bfloat16)
    yield chained("bf16+bf16", x, matmul.dense_bf16, bfloat16)
    for text in FORMATS:
        computes = {"": "float32", "+bf16": "bfloat16"}
        if text in ON_INT8:
            computes |= {"+int8": "int8_dynamic", "+static": "int8_static"}
        if not wanted(text):
            continue
        quantized = [boxed(weight, Format.parse(text)) for weight in weights]
        grids = {"input_scale": jnp.float32(4 / 127), "input_zero": jnp.int8(0)}
        quantized = [box.replace(**grids) for box in quantized]
        for suffix, compute in computes.items():
            product = functools.partial(linear, compute=compute)
            yield chained(text + suffix, x, product, quantized)


def tried(x: Array, weights: list[Array], wanted: Wanted) -> Iterator[Product]:
    """List simple products of one row that `glm_edge.kernels.matmul` does not use."""
    int8 = [boxed(w, Format.parse("int8-channel")) for w in weights]
    int4 = [boxed(w, Format.parse("int4-channel")) for w in weights]

    def scaled(product: Callable) -> Callable:
        return lambda x, box: product(x, box.codes()) * box.scale[:, 0]

    def integer_dot(x: Array, box: boxes.Quantized) -> Array:
        integers, zero, step = matmul.rows_to_int8(x)
        total = matmul.dot(integers.astype(jnp.int8), box.codes(), jnp.int32)
        offset = zero.astype(jnp.int32) * jnp.sum(box.codes(), axis=1, dtype=jnp.int32)
        return (total - offset).astype(jnp.float32) * step * box.scale[:, 0]

    def padded(x: Array, codes: Array) -> Array:
        wide = jnp.pad(x, ((0, 7), (0, 0))).astype(jnp.bfloat16)
        return matmul.dot(wide, codes.astype(jnp.bfloat16), jnp.float32)[:1]

    def interleaved(x: Array, box: boxes.Quantized) -> Array:
        blocks = box.data.reshape(-1, matmul.BLOCK // x.shape[1], box.data.shape[1])

        def block(data: Array) -> Array:
            codes = packing.unpack(data, x.shape[1], "int4")
            return matmul.dense(x, codes.astype(jnp.float32))

        return jnp.moveaxis(jax.lax.map(block, blocks), 0, 1).reshape(1, -1) * box.scale[:, 0]

    variants = {
        "int8 multiply and reduce": (int8, scaled(lambda x, q: jnp.sum(x[:, None] * q, axis=-1))),
        "int8 multiply and reduce, 64 lanes": (int8, scaled(_lanes)),
        "int8 to a dense float32 copy": (int8, lambda x, box: matmul.dense(x, box.unbox())),
        "int8 rows, one int8 dot": (int8, integer_dot),
        "int8 padded to 8 bf16 rows": (int8, scaled(padded)),
        "int4 to a dense float32 copy": (int4, lambda x, box: matmul.dense(x, box.unbox())),
        "int4 multiply and reduce": (int4, scaled(lambda x, q: jnp.sum(x[:, None] * q, axis=-1))),
        "int4 in blocks, nibbles interleaved": (int4, interleaved),
    }
    for name, (quantized, product) in variants.items():
        if wanted(f"tried: {name}"):
            yield chained(f"tried: {name}", x, product, quantized)


def _lanes(x: Array, codes: Array) -> Array:
    lanes = codes.reshape(codes.shape[0], -1, 64)
    return jnp.sum(jnp.sum(x.reshape(1, 1, -1, 64) * lanes[None], axis=2), axis=-1)


def qwix(x: Array, weights: list[Array], wanted: Wanted) -> Iterator[Product]:
    """Return the products of qwix's quantized arrays."""
    import qwix as library

    contract = (((1,), (1,)), ((), ()))

    def product(x: Array, weight: Any) -> Array:
        return library.dot_general(x, weight, contract, preferred_element_type=jnp.float32)

    for qtype, tile in ((jnp.int8, None), (jnp.int4, None), (jnp.int4, 32)):
        tiles = {} if tile is None else {"tiled_axes": {1: tile}}
        quantize = functools.partial(library.quantize, qtype=qtype, channelwise_axes=(0,), **tiles)
        name = f"qwix {jnp.dtype(qtype).name}-{'channel' if tile is None else f'g{tile}'}"
        if wanted(name):
            yield chained(name, x, product, [quantize(weight) for weight in weights])


def torchao(
    x: Array, weights: list[Array], wanted: Wanted, threads: int, compiling: bool
) -> Iterator[Product]:
    """Return the products of layers quantized by torchao, and of torch's layers."""
    import torch
    import torchao.quantization as ao

    torch.set_num_threads(threads)
    group = ao.granularity.PerGroup(32)
    configs = {
        "torch fp32": None,
        "torch bf16": torch.bfloat16,
        "torchao int8 weight-only": ao.Int8WeightOnlyConfig(),
        "torchao int8 dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
        "torchao int4-g32 weight-only": ao.IntxWeightOnlyConfig(torch.int4, group),
    }

    class Chain(torch.nn.Module):
        def __init__(self, weights: list[Any]):
            super().__init__()
            self.layers = torch.nn.ModuleList()
            for weight in weights:
                layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                self.layers.append(layer)

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
                x = x * torch.rsqrt(torch.mean(x * x, -1, keepdim=True) + 1e-6)
            return x

    rows = torch.from_numpy(np.array(x))
    for name, config in configs.items():
        for compiled in (False, True) if compiling else (False,):
            if not wanted(name):
                continue
            chain = Chain([torch.from_numpy(np.array(weight)) for weight in weights]).eval()
            operand = rows
            if isinstance(config, torch.dtype):
                chain, operand = chain.to(config), rows.to(config)
            elif config is not None:
                ao.quantize_(chain, config)
            run = torch.compile(chain) if compiled else chain
            bits = 4.5 if "int4" in name else 8 if "int8" in name else 16 if config else 32
            stored = int(sum(weight.size for weight in weights) * bits / 8)

            def once(run: Any = run, operand: Any = operand) -> None:
                time.sleep(PAUSE_S)
                with torch.inference_mode():
                    start = time.perf_counter()
                    run(operand)
                    return time.perf_counter() - start

            yield Product(name + (" compiled" if compiled else ""), once, stored)


def chained(name: str, x: Array, product: Callable, weights: list[Any]) -> Product:
    """Compile the chain of one product, and compare one layer with float64."""

    def chain(x: Array, weights: list[Any]) -> Array:
        for weight in weights:
            x = product(x, weight)
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x

    compiled = jax.jit(chain).lower(x, weights).compile()
    first = weights[0]
    dense = first.rows() if isinstance(first, boxes.Quantized) else first
    error = None
    if isinstance(dense, Array):
        expected = np.asarray(x, np.float64) @ np.asarray(dense, np.float64).T
        output = np.asarray(jax.jit(product)(x, first), np.float64)
        error = float(np.abs(output - expected).max() / np.abs(expected).max())
    memory = compiled.memory_analysis()
    return Product(
        name,
        lambda: compiled(x, weights).block_until_ready(),
        sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        error,
        memory.temp_size_in_bytes if memory else None,
    )
