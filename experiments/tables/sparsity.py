"""Table (c): unstructured pruning from 50 M to 35 M parameters, and its effect on latency.

    python -m experiments.tables.sparsity --preset=quick

The claim: 100 -> 78 ms. A text encoder of 50 M parameters with random weights reads 128 tokens. In
`masked`, the smallest 30 % of each matrix are zero; dense kernels multiply zeros like any other
value, so no speed-up is expected. `masked, in its box` stores mask and values separately, as in
training, and multiplies them in every call. `narrow` also has 35 M parameters, but fewer neurons.
All run alternately. Bytes are stored bytes, including those of the mask.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.tables import measure, table
from experiments.tables.table import PHONE, Row
from glm_edge import params as boxes
from glm_edge.cli.console import launch
from glm_edge.compress import prune
from glm_edge.configs import TextConfig
from glm_edge.models.text import TextEncoder

FLAGS = flags.FLAGS
NAME = "sparsity"
CLAIMED_MS, CLAIMED_MILLIONS = (100.0, 78.0), (50.0, 35.0)
ROUNDS = {"quick": 9, "full": 40}


def define_flags() -> None:
    """Define this script's flags."""
    table.define_flags(NAME)
    flags.DEFINE_float("sparsity", 0.3, "Fraction of zeros, in 0..1.", 0.0, 1.0)
    flags.DEFINE_integer(
        "hidden_size", 768, "Hidden size of the encoder; 768 corresponds to 50 M parameters.", 64
    )
    flags.DEFINE_integer("tokens", 128, "Number of tokens per call.", 1)
    flags.DEFINE_integer(
        "rounds", None, "Number of measurements of each; default: 9, or 40 for full.", 1
    )
    flags.DEFINE_integer("threads", 2, "Number of LiteRT threads; JAX uses all available cores.", 1)


def main(argv: Sequence[str]) -> None:
    table.prepare(argv)
    sides = models(FLAGS.hidden_size, FLAGS.sparsity, FLAGS.seed)
    rounds = FLAGS.rounds or ROUNDS[FLAGS.preset]
    seconds = measure.encoder_times(sides, FLAGS.tokens, rounds, FLAGS.threads)
    sizes = {name: size_of(params) for name, (_, params) in sides.items()}
    table.publish(
        NAME,
        "Unstructured pruning: claimed 50 M -> 35 M parameters and 100 -> 78 ms",
        rows_of(seconds, sizes),
        ("sparsity", "hidden_size", "tokens", "rounds", "threads"),
        {"seconds": seconds, "sizes": sizes},
    )


def models(width: int, sparsity: float, seed: int) -> dict[str, tuple[TextEncoder, Any]]:
    """Make dense, masked (as an array and in a box) and narrow encoders."""
    config = TextConfig(
        vocab_size=13 * width,
        hidden_size=width,
        num_layers=6,
        num_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=512,
        type_vocab_size=0,
    )
    dense = random_encoder(config, seed)
    _, masked, _ = prune.magnitude(sparsity)(*dense)
    zeros = jax.tree.map(boxes.dense, masked, is_leaf=boxes.is_box)
    masked_out = boxes.count(masked) - size_of(masked)["parameters"]
    surplus = masked_out / (2 * config.num_layers * width)
    neurons = max(8, round((config.intermediate_size - surplus) / 8) * 8)
    narrow = random_encoder(dataclasses.replace(config, intermediate_size=neurons), seed)
    model = dense[0]
    return {
        "dense": dense,
        "masked": (model, zeros),
        "masked, in its box": (model, masked),
        "narrow": narrow,
    }


def random_encoder(config: TextConfig, seed: int) -> tuple[TextEncoder, Any]:
    """Return an encoder with random weights."""
    model = TextEncoder(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        weights = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(weights * leaf.shape[-1] ** -0.5)

    return model, jax.tree.map(draw, abstract["params"])


def size_of(params: Any) -> dict[str, float]:
    """Count the parameters that are not masked, and the stored bytes."""
    masks = [leaf.mask for _, leaf in boxes.path_items(params) if isinstance(leaf, boxes.Masked)]
    zeros = sum(int(jnp.sum(~mask)) for mask in masks)
    return {"parameters": boxes.count(params) - zeros, "bytes": boxes.stored_bytes(params)}


def rows_of(seconds: dict[str, list[float]], sizes: dict[str, dict[str, float]]) -> list[Row]:
    """Return the table's rows."""
    claims = {"dense": 0, "masked": 1}
    rows = []
    for name, kind in (("dense", "dense"), ("masked", "masked, in its box"), ("narrow", "narrow")):
        claim = CLAIMED_MILLIONS[claims[name]] if name in claims else None
        rows.append(
            Row(f"parameters, {name}", "M", claim, sizes[kind]["parameters"] / 1e6, note="not zero")
        )
        rows.append(Row(f"stored, {kind}", "MB", None, sizes[kind]["bytes"] / 1e6))
    for engine, title in measure.ENGINES.items():
        base = seconds[f"{engine} dense"]
        for key, timed in seconds.items():
            if not key.startswith(f"{engine} "):
                continue
            name = key.removeprefix(f"{engine} ")
            claim = CLAIMED_MS[claims[name]] if name in claims else None
            note = "claim on a different device" if claim else ""
            rows.append(Row(f"{name}, {title}", "ms", claim, measure.median_ms(timed), note=note))
            if name != "dense":
                low, middle, high = measure.ratio_quartiles(timed, base)
                claim = CLAIMED_MS[1] / CLAIMED_MS[0] if name == "masked" else None
                note = f"quartiles {low:.2f} - {high:.2f}"
                rows.append(Row(f"{name} over dense, {title}", "x", claim, middle, note=note))
    note = f"{PHONE}; a kernel for sparse matrices, which neither runtime has"
    rows.append(Row("masked, by a sparse kernel", "ms", CLAIMED_MS[1], None, note=note))
    return rows


if __name__ == "__main__":
    define_flags()
    launch(main)
