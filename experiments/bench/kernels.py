"""Times packing and products of low-bit weights: glm_edge's, simple ones in XLA, and peers'.

    python -m experiments.bench.kernels --out=kernels.json
    python -m experiments.bench.kernels --rows=1 --only='int4|fp32' --rounds=21 --nopacking

Products are measured in a chain of --layers square layers with norms between them. The float32
weights exceed every CPU cache, so each layer reads its weights from memory, as in decoding. All
products alternate within a round, and a ratio compares times of one round: `x fp32` below 1 is
faster than float32 of the same shape. `of limit` is the time of reading the stored bytes at the
bandwidth measured in this run, as a fraction of the measured time.

In the names, `int4-g32` is glm_edge's format of the weight; `+bf16`, `+int8` and `+static` name the
type to which rows of activations are rounded; `tried:` marks methods that glm_edge does not use.
`qwix` and `torchao` are skipped if they are not installed. On a GPU, one-row decoding of a complete
model is also measured.
"""

import functools
import importlib.util
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from experiments.bench.decode import text_only
from experiments.bench.kernel_products import Product, boxed, ours, qwix, torchao, tried
from experiments.common.provenance import provenance_of
from experiments.common.stage_eval import decode_latency_ms
from glm_edge.cli.console import launch, print_table
from glm_edge.cli.corpora import write_text
from glm_edge.configs import preset
from glm_edge.kernels import packing, quantization
from glm_edge.models.multimodal import MultimodalGLM
from glm_edge.params import Format

PACKED_WEIGHTS = 1 << 26
# A product that is slower than float32 by this factor is measured less often.
SLOW, SLOW_ROUNDS = 8, 3

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define this script's flags."""
    flags.DEFINE_list(
        "rows", ["1", "8", "128"], "Numbers of activation rows; each is measured separately."
    )
    flags.DEFINE_integer("width", 2048, "Rows and columns of each layer's weight.", 128)
    flags.DEFINE_integer("layers", 24, "Number of layers of the chain.", 1)
    flags.DEFINE_integer("rounds", 11, "Number of rounds; all products alternate in each.", 3)
    flags.DEFINE_string("only", "", "Regular expression; measures the products whose names match.")
    flags.DEFINE_bool("packing", True, "Measure packing and unpacking.")
    flags.DEFINE_bool("tried", True, "Measure methods that glm_edge does not use, for one row.")
    flags.DEFINE_bool("peers", True, "Measure qwix and torchao.")
    flags.DEFINE_bool(
        "compile_peers", False, "Compile torchao's layers with torch.compile, which takes minutes."
    )
    flags.DEFINE_integer("threads", 2, "Number of torch threads; JAX uses all available cores.", 1)
    flags.DEFINE_string("decode_shape", "large", "Preset to decode on a GPU; empty for none.")
    flags.DEFINE_integer("seed", 0, "Seed of weights and rows.")
    flags.DEFINE_string("out", None, "JSON file for the results.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --out file.")


def main(argv: Sequence[str]) -> None:
    del argv
    bandwidth = measure_bandwidth()
    print(f"reading memory: {bandwidth / 1e9:.1f} GB/s on {jax.default_backend()}")
    log = provenance() | {"bytes_per_second": bandwidth, "skipped": {}}
    if FLAGS.packing:
        log["packing"] = measure_packing()
        print_table(*_table(log["packing"]))
    weights = random_weights()
    options = {"threads": FLAGS.threads, "compiling": FLAGS.compile_peers}
    peers = {"qwix": qwix, "torchao": functools.partial(torchao, **options)} if FLAGS.peers else {}
    for rows in map(int, FLAGS.rows):
        x = random_rows(rows)
        products = list(ours(x, weights, _wanted))
        if FLAGS.tried and rows == 1:
            products += tried(x, weights, _wanted)
        for name, peer in peers.items():
            if importlib.util.find_spec(name) is None:
                log["skipped"][name] = f"{name} is not installed"
                print(f"{name}: skipped, since it is not installed")
            else:
                products += peer(x, weights, _wanted)
        log[f"rows_{rows}"] = summarize(products, measure(products), bandwidth)
        print(f"\n{rows} rows, {FLAGS.layers} layers of {FLAGS.width} x {FLAGS.width}")
        print_table(*_table(log[f"rows_{rows}"]))
    if jax.default_backend() == "gpu" and FLAGS.decode_shape:
        log["decode_ms"] = measure_decoding(FLAGS.decode_shape)
        print_table(["weights", "ms per token"], list(log["decode_ms"].items()))
    log["load_average_after"] = os.getloadavg()[0]
    if FLAGS.out:
        write_text(FLAGS.out, json.dumps(log, indent=1) + "\n", FLAGS.overwrite)


def provenance() -> dict[str, Any]:
    """Describe the run and its device."""
    names = ("rows", "width", "layers", "rounds", "only", "threads", "seed", "tried", "peers")
    device = {"device": jax.devices()[0].device_kind}
    return provenance_of("bench.kernels", names) | device


def measure_bandwidth() -> float:
    """Measure the bytes per second at which the device, or all cores together, read an array."""
    if jax.default_backend() == "cpu":
        parts = np.array_split(np.ones(1 << 26, np.int64), os.cpu_count())
        with ThreadPoolExecutor(len(parts)) as pool:
            best = min(_seconds(lambda: list(pool.map(np.sum, parts))) for _ in range(7))
        return sum(part.nbytes for part in parts) / best
    array, read = jnp.ones(1 << 28, jnp.float32), jax.jit(jnp.sum)
    read(array).block_until_ready()
    return array.nbytes / min(_seconds(lambda: read(array).block_until_ready()) for _ in range(7))


def measure_packing() -> list[dict[str, Any]]:
    """Measure millions of weights per second of packing and unpacking, for every type."""
    rows = []
    for qtype in packing.QTYPES:
        codes = random_codes(qtype, (PACKED_WEIGHTS // 4096, 4096))
        packed = packing.pack(codes, qtype)
        unpack = functools.partial(packing.unpack, packed, codes.shape[1], qtype)
        exact = bool((unpack() == codes).all())
        functions = {"pack": functools.partial(packing.pack, codes, qtype), "unpack": unpack}
        rate = {
            f"{way}_million_per_s": PACKED_WEIGHTS
            / 1e6
            / statistics.median(
                _seconds(lambda run=run: run().block_until_ready()) for _ in "12345"
            )
            for way, run in functions.items()
        }
        rows.append({"type": qtype, **rate, "bits": 8 * packed.nbytes / codes.size, "exact": exact})
    return rows


def random_codes(qtype: str, shape: tuple[int, int]) -> Array:
    """Draw uniformly distributed codes of a type."""
    steps = jax.random.normal(jax.random.key(FLAGS.seed), shape)
    low, high = quantization.code_range(qtype)
    if qtype == "ternary34":
        return quantization.round_to_codes(steps, qtype)
    return jax.random.randint(jax.random.key(FLAGS.seed), shape, low, high + 1).astype(jnp.int8)


def random_weights() -> list[Array]:
    """Return float32 weights of the chain."""
    keys = jax.random.split(jax.random.key(FLAGS.seed), FLAGS.layers)
    shape = (FLAGS.width, FLAGS.width)
    return [jax.random.normal(key, shape) * FLAGS.width**-0.5 for key in keys]


def random_rows(rows: int) -> Array:
    """Return random input activations of the chain."""
    return jax.random.normal(jax.random.key(FLAGS.seed + 1), (rows, FLAGS.width))


def measure(products: list[Product]) -> dict[str, list[float]]:
    """Measure the seconds of each product in each round; slow ones run in the first few only."""
    chosen = [p for i, p in enumerate(products) if not i or _wanted(p.name)]
    first = {p.name: (p.run(), min(_timed(p) for _ in "12"))[1] for p in chosen}
    limit = SLOW * first[chosen[0].name]
    seconds = {p.name: [] for p in chosen}
    for turn in range(FLAGS.rounds):
        for product in chosen if turn % 2 else chosen[::-1]:
            if turn < SLOW_ROUNDS or first[product.name] < limit:
                seconds[product.name].append(_timed(product))
    return seconds


def _timed(product: Product) -> float:
    start = time.perf_counter()
    milliseconds = product.run()
    return milliseconds if isinstance(milliseconds, float) else time.perf_counter() - start


def summarize(
    products: list[Product], seconds: dict[str, list[float]], bandwidth: float
) -> list[dict[str, Any]]:
    """Return one row per product; ratios are medians over rounds."""
    reference, rows = np.array(seconds[products[0].name]), []
    for product in products:
        if product.name not in seconds:
            continue
        times = np.array(seconds[product.name])
        ratio = np.quantile(times / reference[: len(times)], [0.25, 0.5, 0.75])
        rows.append(
            {
                "product": product.name,
                "ms": 1e3 * float(np.median(times)),
                "x_fp32": float(ratio[1]),
                "x_fp32_quartiles": [float(ratio[0]), float(ratio[2])],
                "of_limit": product.stored / bandwidth / float(np.median(times)),
                "stored_mb": product.stored / 1e6,
                "temporary_mb": None if product.temporary is None else product.temporary / 1e6,
                "error": product.error,
            }
        )
    return rows


def measure_decoding(shape: str) -> dict[str, float]:
    """Measure milliseconds per greedy step of a complete model, by format of its weights."""
    config, milliseconds = text_only(preset(shape)), {}
    model = MultimodalGLM(config)
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens))["params"]
    keys = iter(jax.random.split(jax.random.key(FLAGS.seed), len(jax.tree.leaves(shapes))))
    params = jax.tree.map(
        lambda leaf: (0.02 * jax.random.normal(next(keys), leaf.shape)).astype(jnp.bfloat16), shapes
    )
    for text in ("bfloat16", "int8-channel", "int4-channel", "int4-g32"):
        weights = params
        if text != "bfloat16":
            format = Format.parse(text)
            weights = jax.tree.map(
                lambda leaf, format=format: (
                    boxed(leaf.astype(jnp.float32), format) if leaf.ndim == 2 else leaf
                ),
                params,
            )
        for compute in ("float32", "bfloat16"):
            model = MultimodalGLM(config, compute)
            milliseconds[f"{text}, compute {compute}"] = decode_latency_ms(model, weights)
    return milliseconds


def _wanted(name: str) -> bool:
    return re.search(FLAGS.only, name) is not None


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = [name.replace("_", " ") for name in rows[0]]
    return header, [[_shown(value) for value in row.values()] for row in rows]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " - ".join(_shown(v) for v in value)
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return (
        f"{value:.1e}" if 0 < value < 0.005 else f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    )


if __name__ == "__main__":
    define_flags()
    launch(main)
